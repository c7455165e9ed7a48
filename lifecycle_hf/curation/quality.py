"""Keep documents that look like trusted text, by a classifier that is trained on trusted and on crawled text."""

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from scipy.special import expit

from lifecycle_hf.curation.classifiers import ClassifierScorer, Scorer, class_probabilities
from lifecycle_hf.curation.decisions import Decision
from lifecycle_hf.curation.hashing import digest
from lifecycle_hf.evaluation.calibration import expected_calibration_error

_WEIGHTS, _NOTES = "quality.safetensors", "quality.json"


class LinearScorer:
    """Return P(trusted | text) = σ(w·x + b) of texts, with x the hashed counts of runs of words, of length 1.

    Words stand between white space, in lower case, as in GPT-3's classifier.

    Args:
        weights: w, [2^k] in float32.
        bias: b.
        ngrams: most words of a run.
    """

    def __init__(self, weights: np.ndarray, bias: float, ngrams: int):
        self.weights, self.bias, self.ngrams = weights, bias, ngrams

    @cached_property
    def _features(self):
        return _hashed(len(self.weights), self.ngrams)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Return the probabilities of texts, [N]."""
        return expit(self._features.transform(texts) @ self.weights.astype(np.float64) + self.bias)


def _hashed(size: int, ngrams: int):
    from sklearn.feature_extraction.text import HashingVectorizer

    options = {"tokenizer": _words, "token_pattern": None, "lowercase": False, "alternate_sign": False}
    return HashingVectorizer(n_features=size, ngram_range=(1, ngrams), **options)


def _words(text: str) -> list[str]:
    """Return the words of a text in lower case; halves of surrogate pairs, which can't be hashed, become "?"."""
    return text.lower().encode("utf-8", "replace").decode().split()


class QualityClassifier:
    """Remove documents that look unlike trusted text; P(trusted | text) of each is kept as the score "quality".

    Args:
        scorer: texts -> probabilities, the folder that `save` wrote, or the path of a sequence classifier of
            transformers.
        threshold: below which a document is removed.
        pareto: α of GPT-3's sampling, which keeps some documents of low scores too, in place of the threshold: a
            document is kept if a number X of the Pareto distribution P(X > x) = (1 + x)^−α is above 1 − score, so with
            probability (2 − score)^−α. GPT-3 took 9. X depends on the text and the seed alone.
        seed: of these draws.
        label: the name of the class of trusted text in the config of a classifier of transformers.

    Attributes:
        report: after `train`: "auc" and "ece" on texts that neither the weights nor the calibration have seen.

    Reference: GPT-3, https://arxiv.org/abs/2005.14165, appendix A.
    """

    name = "quality"

    def __init__(
        self, scorer: Scorer | str | Path, *, threshold: float = 0.5, pareto: float | None = None, seed: int = 0,
        label: str = "trusted",
    ):  # fmt: skip
        self.report: dict[str, float] = {}
        if not callable(scorer) and (Path(scorer) / _NOTES).is_file():
            notes = json.loads((Path(scorer) / _NOTES).read_text())
            self.report = notes["report"]
            scorer = LinearScorer(load_file(Path(scorer) / _WEIGHTS)["weights"], notes["bias"], notes["ngrams"])
        self.scorer = scorer if callable(scorer) else ClassifierScorer(scorer, label)
        self.threshold, self.pareto, self.seed = threshold, pareto, seed

    @classmethod
    def train(
        cls, trusted: Iterable[str], crawled: Iterable[str], *, ngrams: int = 2, size: int = 2**18,
        held_out: float = 0.3, seed: int = 0, **options,
    ) -> "QualityClassifier":  # fmt: skip
        """Return a block with a `LinearScorer` that tells trusted from crawled text.

        A logistic regression is fitted to 1 − held_out of the texts. A second one of its logit alone calibrates it on
        half of the rest (Platt's scaling), and the other half gives the report. Texts that stand twice count once. The
        probabilities are right for documents of which the same share is trusted as in what is given.

        Args:
            ngrams: most words of a run.
            size: of the table of hashed runs.
            options: of the block.

        Raises:
            ValueError: one side has fewer than 20 different texts.
        """
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import roc_auc_score
        from sklearn.model_selection import train_test_split

        sides = [list(dict.fromkeys(side)) for side in (trusted, crawled)]
        if min(map(len, sides)) < 20:
            raise ValueError(
                f"QualityClassifier.train got {len(sides[0])} different trusted and {len(sides[1])} crawled texts: it "
                "needs 20 of each at least."
            )
        texts, labels = sides[0] + sides[1], np.repeat([1, 0], list(map(len, sides)))
        split = {"random_state": seed, "stratify": labels}
        fitted, rest = train_test_split(np.arange(len(texts)), test_size=held_out, **split)
        second, third = train_test_split(rest, test_size=0.5, random_state=seed, stratify=labels[rest])
        counts = _hashed(size, ngrams).transform(texts)
        model = LogisticRegression(C=10, max_iter=1000).fit(counts[fitted], labels[fitted])
        logits = model.decision_function(counts)
        scale = logits[second].std()
        platt = LogisticRegression(C=100).fit(logits[second, None] / scale, labels[second])
        slope = platt.coef_[0, 0] / scale
        bias = slope * model.intercept_[0] + platt.intercept_[0]
        scorer = LinearScorer((slope * model.coef_[0]).astype(np.float32), float(bias), ngrams)
        scores = scorer([texts[i] for i in third])
        block = cls(scorer, seed=seed, **options)
        block.report = {
            "auc": float(roc_auc_score(labels[third], scores)),
            "ece": float(expected_calibration_error(scores, labels[third])),
        }
        return block

    def save(self, folder: str | Path) -> None:
        """Write a `LinearScorer` and the report to a folder, which `QualityClassifier(folder)` reads.

        Raises:
            ValueError: the scorer is another one.
        """
        if not isinstance(self.scorer, LinearScorer):
            raise ValueError(f"QualityClassifier.save writes what `train` made; this scorer is {self.scorer!r}.")
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file({"weights": self.scorer.weights}, Path(folder) / _WEIGHTS)
        notes = {"bias": self.scorer.bias, "ngrams": self.scorer.ngrams, "report": self.report}
        (Path(folder) / _NOTES).write_text(json.dumps(notes, indent=2) + "\n")

    def __call__(self, texts: Sequence[str], *, urls=None, domains=None) -> list[Decision]:
        """Return for each text whether it is like trusted text."""
        scores = class_probabilities(self.scorer, texts, "QualityClassifier").tolist()
        return [
            Decision("" if score >= self._least(text) else "low_quality", scores={"quality": score})
            for text, score in zip(texts, scores)
        ]

    def _least(self, text: str) -> float:
        """Return the score from which on a text is kept."""
        if self.pareto is None:
            return self.threshold
        key = digest(f"{self.seed} {text}".encode("utf-8", "replace"))
        left = 1 - (key >> 11) / 2**53  # in (0, 1], exact in double precision
        return 2 - left ** (-1 / self.pareto)  # 1 − X
