"""Diversity by hand, and self-BLEU against sacrebleu."""

import math
import random

import pytest
import torch
from bigram_setting import TABLE, Bigram

from lifecycle_hf.evaluation.diversity import distinct_n, self_bleu, token_entropy, words


def test_distinct_by_hand():
    """Words: a b a b. and a c: 7 unigrams, 4 different (a b . c); bigrams ab ba ab b. ac: 5, of which 4 differ."""
    texts = ["a b a b.", "a c"]
    assert words(texts[0]) == ["a", "b", "a", "b", "."]
    assert distinct_n(texts, 1) == pytest.approx(4 / 7) and distinct_n(texts, 2) == pytest.approx(4 / 5)
    assert distinct_n(texts, 9) == 0 and distinct_n(["", ""], 1) == 0  # a model that has collapsed


def test_entropy_by_hand():
    """States after the prompt a: a (1/2, 1/4, 1/4), then b (1/8, 3/4, 1/8); of the other row b alone."""
    of_a = 0.5 * math.log(2) + 0.5 * math.log(4)
    of_b = 0.25 * math.log(8) + 0.75 * math.log(4 / 3)
    measured = token_entropy(Bigram(TABLE), [[0], [0, 1]], [[1, 2], [1]])
    assert measured == pytest.approx((of_a + of_b + of_b) / 3, rel=1e-6)
    assert measured.columns[:, 1].tolist() == [2, 1]
    certain = Bigram(torch.tensor([[0.0, 1.0, 0.0]] * 3))
    assert token_entropy(certain, [[0]], [[1]]) == 0


def test_self_bleu_by_hand():
    """Unigrams 2/3 (the second "the" is clipped), bigrams 0/2 -> 1/(2·2), trigrams 0/1 -> 1/(4·1), equal lengths."""
    got = self_bleu(["the cat the", "the dog cat"])
    assert got.columns[0, 0] == pytest.approx((2 / 3 * 1 / 4 * 1 / 4) ** (1 / 3))
    assert self_bleu(["one text"] * 3) == 1 and self_bleu(["a b", "c d", ""]) == 0
    with pytest.raises(ValueError, match="it got 1"):
        self_bleu(["alone"])


def test_self_bleu_is_sacrebleus():
    metrics = pytest.importorskip("sacrebleu.metrics")
    draw = random.Random(0)
    texts = [" ".join(draw.choices(["a", "the", "cat", "dog", "sat", ","], k=draw.randrange(12))) for _ in range(40)]
    texts += texts[:3]
    bleu = metrics.BLEU(effective_order=True, tokenize="none")
    scores = [bleu.sentence_score(text, texts[:i] + texts[i + 1 :]).score for i, text in enumerate(texts)]
    assert self_bleu(texts).columns[:, 0].tolist() == pytest.approx([score / 100 for score in scores], abs=1e-6)
