"""ROUGE-L: by hand, and against the rouge-score package on random strings."""

import random

import pytest

from lifecycle_hf.evaluation.text import lcs_lengths, rouge_l


def test_rouge_l_by_hand():
    # 4 words each; "police the gunman" is the longest common subsequence: 2·3 / (4 + 4)
    assert rouge_l("Police killed the gunman.", "police ended the gunman") == 0.75
    # 2 of 3 and 5 words: 2·2 / 8; case, signs and letters other than a-z part words
    assert rouge_l("a-b, C!", "a x b y z") == 0.5
    assert rouge_l("the same", "The same") == 1.0
    assert rouge_l("", "a") == rouge_l("a", "?!") == rouge_l("", "") == 0.0
    assert rouge_l("a b c d e f g x y z", "a b c d e f g u v w") == 0.7  # exactly the threshold of Self-Instruct


def test_lcs_is_that_of_the_table():
    draw = random.Random(0)
    for _ in range(100):
        a, b = ([draw.choice("abcd") for _ in range(draw.randrange(90))] for _ in range(2))
        table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
        assert lcs_lengths(a, [b, a]) == [table[-1][-1], len(a)]


def test_rouge_l_equals_rouge_score_on_random_strings():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=False)
    draw = random.Random(1)
    signs = ["a", "b", "C", "7", "ab", "ABC", "é", "ß", "İ", "中", "_", "-", "\n", ".", " ", "  ", "k"]
    for _ in range(300):
        ours, theirs = ("".join(draw.choices(signs, k=draw.randrange(120))) for _ in range(2))
        expected = scorer.score(theirs, ours)["rougeL"].fmeasure
        assert rouge_l(ours, theirs) == pytest.approx(expected, rel=1e-12)
