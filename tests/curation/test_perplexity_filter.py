"""The loss of documents by a plain forward pass, the thresholds of domains, and what a trained model rejects."""

import pickle
import random
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from lifecycle_hf.curation import PerplexityFilter


@pytest.fixture(scope="module")
def tiny(tiny_llama):
    make_model, tokenizer = tiny_llama
    return make_model(), tokenizer


def losses(model, ids):
    """−log p of each token of a list but the first."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].float()
    return cross_entropy(logits, torch.tensor(ids[1:]), reduction="none").tolist()


TEXTS = ["The capital of France is Paris.", "", "x", "Please tell me a story about a small red fox, and one more."]


def test_loss_of_short_documents(tiny):
    model, tokenizer = tiny
    found = PerplexityFilter(model, tokenizer, batch_size=2).scores(TEXTS)
    expected = [
        np.mean(losses(model, [tokenizer.bos_token_id, *tokenizer(t)["input_ids"]])) if t else np.nan for t in TEXTS
    ]
    assert found == pytest.approx(expected, abs=1e-5, nan_ok=True)


def test_loss_of_a_long_document_by_windows(tiny):
    """Context 10: the first window has BOS and 9 tokens, each further one 5 given ones and 5 predicted."""
    model, tokenizer = tiny
    ids = [tokenizer.bos_token_id, *tokenizer(TEXTS[3] * 2)["input_ids"]]
    sums = losses(model, ids[:10])
    for at in range(10, len(ids), 5):
        sums += losses(model, ids[at - 5 : at + 5])[4:]
    assert len(sums) == len(ids) - 1 > 20
    found = PerplexityFilter(model, tokenizer, context=10).scores([TEXTS[3] * 2])
    assert found == pytest.approx([np.mean(sums)], abs=1e-5)


class Lengths(PerplexityFilter):
    """The loss of a text is its length."""

    def scores(self, texts):
        return np.array([len(text) or np.nan for text in texts])


def test_thresholds_are_quantiles_of_the_domain():
    """Lengths 1 to 11 in "a", 10 to 110 in "b": the 10 % and 90 % quantiles are the second and the last but one.

    Of all 22 the 10 % quantile is .1 of the way from the third to the fourth, and the 90 % one .9 from 80 to 90.
    """
    texts = ["x" * n for n in range(1, 12)] + ["x" * (10 * n) for n in range(1, 12)] + [""]
    block = Lengths("model", lower=0.1, upper=0.9).fit(texts, ["a"] * 11 + ["b"] * 11 + [None])
    expected = {"a": (2, 10), "b": (20, 100), "": (3.1, 89)}
    assert block.thresholds == {domain: pytest.approx(bounds) for domain, bounds in expected.items()}
    asked = {"a": [1, 2, 10, 11], "b": [10, 20, 100, 110], None: [3, 4, 88, 90], "unknown": [3, 4, 88, 90]}
    for domain, lengths in asked.items():
        decisions = block(["x" * n for n in lengths], domains=[domain] * 4)
        assert [decision.reason for decision in decisions] == ["perplexity", "", "", "perplexity"]
        assert [decision.scores["nll"] for decision in decisions] == lengths
    assert block([""])[0].kept and not block([""])[0].scores
    assert (
        Lengths("model").fit(texts).thresholds[""][0] == 0
        and Lengths("model", upper=1).fit(texts)(["x" * 999])[0].kept
    )
    again = Lengths("model", thresholds=block.thresholds)
    assert again(texts, domains=["a"] * 23) == block(texts, domains=["a"] * 23)


def test_errors(tiny):
    model, tokenizer = tiny
    with pytest.raises(ValueError, match="must be quantiles, 0 ≤ lower < upper ≤ 1"):
        PerplexityFilter(model, tokenizer, lower=0.9, upper=0.1)
    with pytest.raises(ValueError, match="context=1 must be at least 2"):
        PerplexityFilter(model, tokenizer, context=1)
    with pytest.raises(ValueError, match="give its tokenizer"):
        PerplexityFilter(model)
    with pytest.raises(ValueError, match="has no thresholds: call `fit`"):
        PerplexityFilter(model, tokenizer)(["a"])
    with pytest.raises(ValueError, match="fit got 1 texts without a token"):
        PerplexityFilter(model, tokenizer).fit([""])


def test_read_from_a_path_and_pickled(tiny, tmp_path):
    model, tokenizer = tiny
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    block = PerplexityFilter(str(tmp_path)).fit(TEXTS)
    assert b"weight" not in pickle.dumps(block)
    found, direct = pickle.loads(pickle.dumps(block))(TEXTS), PerplexityFilter(model, tokenizer).scores(TEXTS)
    assert found == block(TEXTS) and found[0].scores["nll"] == pytest.approx(direct[0])


def area(clean, other):
    """P(a clean document has the lower loss)."""
    return np.mean([[c < o for o in other] for c in clean])


@pytest.mark.slow
def test_a_trained_model_rejects_shuffled_and_foreign_text(shared_data):
    """A model of two layers and 512 tokens, trained for some seconds on seven eighths of Python's documentation."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from lifecycle_hf.data.corpora import train_tokenizer

    torch.manual_seed(0)
    documents = [text for _, text in sorted(topics.items()) if len(text) > 1000]
    held_out, trained = documents[::8], [text for i, text in enumerate(documents) if i % 8]
    tokenizer = train_tokenizer(trained, 512)
    ids = torch.tensor([token for text in trained for token in tokenizer(text)["input_ids"]])
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = GPT2Config(vocab_size=512, n_positions=128, n_embd=64, n_layer=2, n_head=2, eos_token_id=0, **rates)
    model, draw = GPT2LMHeadModel(config).train(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(250):
        optimizer.param_groups[0]["lr"] = 2.5e-3 * min(1, (step + 1) / 30, (250 - step) / 100)
        starts = torch.randint(len(ids) - 128, (8,), generator=draw)
        batch = torch.stack([ids[start : start + 128] for start in starts.tolist()])
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    clean = [text[at : at + 600] for text in held_out for at in range(0, len(text) - 599, 600)][:60]
    mixed = random.Random(0)
    encoded = [tokenizer(text)["input_ids"] for text in clean]
    shuffled = [tokenizer.decode(mixed.sample(row, len(row))) for row in encoded]
    plays = (shared_data / "tinyshakespeare.txt").read_text()
    foreign = [plays[at : at + 600] for at in range(0, 600 * len(clean), 600)]
    block = PerplexityFilter(model, tokenizer, upper=0.9).fit(clean[::2])
    scores = [block.scores(texts) for texts in (clean, shuffled, foreign)]
    assert area(scores[0], scores[1]) >= 0.95 and area(scores[0], scores[2]) >= 0.95
    kept = [np.mean([decision.kept for decision in block(texts)]) for texts in (clean[1::2], shuffled, foreign)]
    assert kept[0] >= 0.75 and max(kept[1:]) <= 0.1
