"""Perplexity against hand-computed means."""

import math

import pytest
import torch

from lifecycle_hf.alignment_tax.metrics import perplexity


class Bigram(torch.nn.Module):
    """p(next | current) from a table, so that every token's NLL is known."""

    def __init__(self, table):
        super().__init__()
        self.logits = torch.nn.Parameter(table.log())
        self.batches = []

    def forward(self, input_ids, attention_mask, use_cache):
        self.batches.append((attention_mask.sum(1).tolist(), self.training))
        return type("Output", (), {"logits": self.logits[input_ids]})


class Letters:
    """a, b and the end token as 0, 1, 2."""

    eos_token_id = 2

    def __call__(self, text):
        return {"input_ids": ["ab$".index(letter) for letter in text]}


# From a: a 1/2, b 1/4, end 1/4. From b: a 1/8, b 3/4, end 1/8.
TABLE = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125], [1 / 3, 1 / 3, 1 / 3]])
TEXTS = ["a", "aab", "bbbba"]
# a$: 1/4.  aab$: 1/2 1/4 1/8.  bbbba$: 3/4 three times, 1/8, 1/4.
PROBABILITIES = [0.25, 0.5, 0.25, 0.125, 0.75, 0.75, 0.75, 0.125, 0.25]
EXPECTED = math.exp(-sum(map(math.log, PROBABILITIES)) / 9)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_mean_over_all_tokens(batch_size):
    assert perplexity(Bigram(TABLE), Letters(), TEXTS, batch_size=batch_size) == pytest.approx(EXPECTED, rel=1e-6)


def test_neither_the_mean_of_texts_nor_of_batches():
    per_text = [[0.25], [0.5, 0.25, 0.125], [0.75, 0.75, 0.75, 0.125, 0.25]]
    mean_of_means = math.exp(-sum(sum(map(math.log, row)) / len(row) for row in per_text) / 3)
    assert abs(mean_of_means - EXPECTED) > 0.1
    assert perplexity(Bigram(TABLE), Letters(), TEXTS, batch_size=1) == pytest.approx(EXPECTED, rel=1e-6)


def test_a_uniform_model_has_the_vocabulary_as_perplexity():
    assert perplexity(Bigram(torch.full((3, 3), 1 / 3)), Letters(), TEXTS) == pytest.approx(3, rel=1e-6)


def test_an_end_token_is_not_doubled_and_texts_are_cut():
    assert perplexity(Bigram(TABLE), Letters(), ["a$"]) == pytest.approx(4)
    # Three tokens of bbbba$: two predictions, 3/4 each.
    assert perplexity(Bigram(TABLE), Letters(), ["bbbba"], max_length=3) == pytest.approx(4 / 3)


def test_masks_come_from_lengths_and_the_mode_is_left():
    model = Bigram(TABLE).train()
    perplexity(model, Letters(), TEXTS, batch_size=2)
    assert model.batches == [([2, 4], False), ([6], False)]
    assert model.training


def test_padding_does_not_matter_to_a_real_model(tiny_llama):
    make_model, tokenizer = tiny_llama
    model = make_model()
    texts = ["The capital of France is Paris.", "Two", "Please tell me a story about a small red fox."]
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]])
        log_probs = model(ids).logits[0, :-1].double().log_softmax(-1)
        total -= log_probs.gather(1, ids[0, 1:, None]).sum().item()
        count += ids.shape[1] - 1
    for batch_size in (1, 2, 3):
        value = perplexity(model, tokenizer, texts, batch_size=batch_size)
        assert value == pytest.approx(math.exp(total / count), rel=1e-5)


@pytest.mark.parametrize("texts", [[], [""]])
def test_nothing_to_predict(texts):
    with pytest.raises(ValueError, match=f"perplexity got {len(texts)} texts, none of two tokens or more"):
        perplexity(Bigram(TABLE), Letters(), texts)
