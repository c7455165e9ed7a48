"""The quality classifier on two real sources, its sampling against GPT-3's formula, and scorers of other kinds."""

import gzip
import json
import pickle
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from lifecycle_hf.curation import ClassifierScorer, QualityClassifier, ToxicityFilter
from lifecycle_hf.curation.classifiers import class_probabilities
from lifecycle_hf.evaluation import expected_calibration_error


def pieces(text, size=200):
    """The text in pieces of about `size` characters, without white space at their ends."""
    found = (text[at : at + size].strip() for at in range(0, len(text), size))
    return [piece for piece in found if piece]


DOCUMENTATION = pieces("\n".join(topics.values()))


@pytest.fixture(scope="module")
def sides(shared_data):
    """Python's documentation, and plays with school sums, in short pieces: first and second half of each."""
    with gzip.open(shared_data / "gsm8k_train_1000.jsonl.gz", "rt") as file:
        sums = [json.loads(line)["question"][:200] for line in file]
    crawled = pieces((shared_data / "tinyshakespeare.txt").read_text()[:300_000]) + sums
    draw = np.random.default_rng(0)
    return [[side[i] for i in draw.permutation(len(side))] for side in (DOCUMENTATION, crawled)]


def test_real_sources_are_told_apart_and_calibrated(sides):
    """AUC by the rank-sum formula on texts that training has not seen."""
    halves = [(side[: len(side) // 2], side[len(side) // 2 :]) for side in sides]
    block = QualityClassifier.train(halves[0][0], halves[1][0])
    texts, labels = halves[0][1] + halves[1][1], np.repeat([1, 0], [len(half[1]) for half in halves])
    decisions = block(texts)
    scores = np.array([decision.scores["quality"] for decision in decisions])
    ranks = np.empty(len(scores))
    ranks[scores.argsort()] = np.arange(1, len(scores) + 1)
    positive = labels.sum()
    auc = (ranks[labels == 1].sum() - positive * (positive + 1) / 2) / (positive * (len(labels) - positive))
    assert auc >= 0.9 and block.report["auc"] >= 0.9
    assert float(expected_calibration_error(scores, labels)) <= 0.05 and block.report["ece"] <= 0.05
    assert [decision.reason for decision in decisions] == ["" if s >= 0.5 else "low_quality" for s in scores]


def test_hard_to_tell_texts_are_calibrated_too():
    """Texts of three words out of ten: class 1 has word i with a probability ∝ i + 5, class 0 ∝ 15 − i.

    The best possible score is the product of three likelihood ratios, so that most probabilities are far from 0 and 1.
    """
    draw, up = np.random.default_rng(0), np.arange(5, 15) / np.arange(5, 15).sum()
    words = [
        [f"w{i}" for i in draw.choice(10, 3, p=p)] + [f"n{draw.integers(10**6)}"]
        for p in [up] * 3000 + [up[::-1]] * 3000
    ]
    texts = [" ".join(row) for row in words]
    block = QualityClassifier.train(texts[:1500], texts[3000:4500], ngrams=1)
    tested = texts[1500:3000] + texts[4500:]
    scores = [decision.scores["quality"] for decision in block(tested)]
    assert 0.2 < np.quantile(scores, 0.25) < 0.5 < np.quantile(scores, 0.75) < 0.8
    assert float(expected_calibration_error(scores, np.repeat([1, 0], 1500))) <= 0.05


@pytest.mark.parametrize("score", [0.0, 0.5, 0.9, 1.0])
def test_pareto_sampling_keeps_the_share_of_the_formula(score):
    """GPT-3 keeps a document if np.random.pareto(9) > 1 − score: P = (2 − score)^−9; 4 standard deviations."""
    texts, expected = [f"text {i}" for i in range(4000)], (2 - score) ** -9
    block = QualityClassifier(lambda given: [score] * len(given), pareto=9)
    kept = [decision.kept for decision in block(texts)]
    drawn = (np.random.default_rng(0).pareto(9, 100_000) > 1 - score).mean()
    for share, n in ((np.mean(kept), 4000), (drawn, 100_000)):
        assert abs(share - expected) <= 4 * (expected * (1 - expected) / n) ** 0.5
    # It depends on the text and the seed, not on the position or the other texts.
    assert [block([text])[0].kept for text in texts[:50]] == kept[:50]
    other = QualityClassifier(block.scorer, pareto=9, seed=1)(texts)
    assert ([decision.kept for decision in other] != kept) == (score < 1)


def test_saved_without_pickle_and_read_again(tmp_path):
    noise = [" ".join(f"x{i % 7}y{j}" for j in range(9)) for i in range(200)]
    block = QualityClassifier.train(DOCUMENTATION[:200], [f"{i} {text}" for i, text in enumerate(noise)], size=2**12)
    block.save(tmp_path / "q")
    assert sorted(path.name for path in (tmp_path / "q").iterdir()) == ["quality.json", "quality.safetensors"]
    texts = [*DOCUMENTATION[200:220], noise[0], "", "ü \ud800"]
    again = QualityClassifier(tmp_path / "q", threshold=0.7)
    assert again.report == block.report and again.threshold == 0.7
    assert [decision.scores for decision in again(texts)] == [decision.scores for decision in block(texts)]
    assert pickle.loads(pickle.dumps(block))(texts) == block(texts)
    assert block([""])[0] == block([" \n"])[0] and block([""])[0].reason == "low_quality" and block([]) == []


def test_errors():
    with pytest.raises(ValueError, match="got 1 different trusted and 30 crawled texts: it needs 20"):
        QualityClassifier.train(["a"] * 30, map(str, range(30)))
    with pytest.raises(ValueError, match="save writes what `train` made"):
        QualityClassifier(lambda texts: [0.5] * len(texts)).save("x")
    for wrong in (lambda texts: [0.5], lambda texts: [2.0] * len(texts), lambda texts: [float("nan")] * len(texts)):
        with pytest.raises(ValueError, match="ToxicityFilter: the scorer gave .* one probability for each text"):
            ToxicityFilter(wrong)(["a", "b"])


def test_toxicity_by_a_callable():
    block = ToxicityFilter(lambda texts: [min(1, text.count("!") / 4) for text in texts], threshold=0.5)
    decisions = block(["fine", "no!!", "", "NO!!!"])
    assert [decision.reason for decision in decisions] == ["", "toxicity", "", "toxicity"]
    assert [decision.scores["toxicity"] for decision in decisions] == [0, 0.5, 0, 0.75]


@pytest.fixture
def classifier(tmp_path, tiny_llama):
    """A sequence classifier with random weights and the tiny tokenizer, in a folder."""
    torch.manual_seed(0)
    _, tokenizer = tiny_llama
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(tokenizer), **sizes, id2label={0: "fine", 1: "toxic", 2: "trusted"})
    model = BertForSequenceClassification(config).eval()
    model.classifier.weight.data *= 30
    model.save_pretrained(tmp_path / "c")
    tokenizer.save_pretrained(tmp_path / "c")
    return model, tokenizer, tmp_path / "c"


def test_a_classifier_of_transformers(classifier):
    """One text at a time and without padding; a long one in windows of 12 tokens: their mean, or the highest."""
    model, tokenizer, path = classifier

    def by_hand(ids, label):
        with torch.no_grad():
            return model(torch.tensor([ids])).logits.softmax(-1)[0, label].item()

    texts = [
        "The capital of France is Paris.",
        "no",
        "Tell me a story about a small fox, then a second one of a crow.",
    ]
    windows = [[ids[i : i + 12] for i in range(0, len(ids), 12)] for ids in tokenizer(texts)["input_ids"]]
    assert len(windows[2]) > 2
    mean = [np.mean([by_hand(window, 2) for window in own]) for own in windows]
    highest = [max(by_hand(window, 1) for window in own) for own in windows]
    scorer = ClassifierScorer(path, "trusted", max_length=12, batch_size=2)
    assert scorer(texts) == pytest.approx(mean, abs=1e-5)
    assert ClassifierScorer(path, "toxic", reduce="max", max_length=12)(texts) == pytest.approx(highest, abs=1e-5)
    again = pickle.loads(pickle.dumps(scorer))
    assert class_probabilities(again, ["", *texts], "test") == pytest.approx([0, *mean], abs=1e-5)
    whole = [by_hand(ids, 2) for ids in tokenizer(texts)["input_ids"]]
    found = [decision.scores["quality"] for decision in QualityClassifier(path)(texts)]
    assert found == pytest.approx(whole, abs=1e-5)
    assert ToxicityFilter(path)(texts)[0].scores["toxicity"] == pytest.approx(
        by_hand(tokenizer(texts[0]).input_ids, 1), abs=1e-5
    )


def test_several_labels_at_once_have_sigmoids(classifier):
    model, tokenizer, path = classifier
    model.config.problem_type = "multi_label_classification"
    model.save_pretrained(path)
    with torch.no_grad():
        expected = model(**tokenizer("Hello there", return_tensors="pt")).logits.sigmoid()[0, 1].item()
    assert ClassifierScorer(path, "toxic")(["Hello there"]) == pytest.approx([expected], abs=1e-5)


def test_errors_of_classifiers(classifier, tiny_llama, tmp_path):
    with pytest.raises(ValueError, match="has no label 'rude'; it has fine, toxic, trusted"):
        ClassifierScorer(classifier[2], "rude")(["a"])
    with pytest.raises(ValueError, match="reduce='sum' must be"):
        ClassifierScorer(classifier[2], "toxic", reduce="sum")
    tiny_llama[0]().save_pretrained(tmp_path / "lm")
    with pytest.raises(ValueError, match="is no trained classifier: it lacks"):
        ClassifierScorer(tmp_path / "lm", "LABEL_1")(["a"])
