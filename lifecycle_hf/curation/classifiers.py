"""Probabilities of a class by any scorer: a callable, or a sequence classifier of transformers by its path."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

Scorer = Callable[[Sequence[str]], Sequence[float]]


def class_probabilities(scorer: Scorer, texts: Sequence[str], where: str) -> np.ndarray:
    """Return the scorer's probabilities of texts, [N] in float64; 0 for texts without a word, which it does not see.

    Raises:
        ValueError: their number is not that of the texts, or one is not in [0, 1].
    """
    filled = [i for i, text in enumerate(texts) if text.strip()]
    scores = np.zeros(len(texts))
    if filled:
        found = np.asarray(scorer([texts[i] for i in filled]), dtype=np.float64)
        if found.shape != (len(filled),) or not ((found >= 0) & (found <= 1)).all():
            raise ValueError(
                f"{where}: the scorer gave {found.shape} values for {len(filled)} texts, from {found.min(initial=0)} "
                f"to {found.max(initial=0)}. It must give one probability for each text."
            )
        scores[filled] = found
    return scores


class ClassifierScorer:
    """Return P(label | text) by a sequence classifier of transformers, read from its path at the first call.

    A text that is longer than `max_length` tokens is read in windows of so many. The softmax is over the labels; a
    multi-label classifier, or one of a single label, has a sigmoid.

    Args:
        model: path or name of the classifier, with its tokenizer.
        label: the name of the class in the model's config.
        reduce: "mean" or "max" over the windows of a text.
        device: by default a GPU if there is one.

    Raises:
        ValueError: there is no such label or reduction, or the checkpoint has no trained head (at the first call).
    """

    def __init__(
        self, model: str | Path, label: str, *, reduce: str = "mean", max_length: int = 512, batch_size: int = 16,
        device: str | None = None,
    ):  # fmt: skip
        if reduce not in ("mean", "max"):
            raise ValueError(f"ClassifierScorer: {reduce=} must be 'mean' or 'max'.")
        self.model, self.label, self.reduce, self.device = str(model), label, reduce, device
        self.max_length, self.batch_size = max_length, batch_size

    def __getstate__(self):
        return {key: value for key, value in vars(self).items() if key != "_loaded"}

    @cached_property
    def _loaded(self):
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        model, info = AutoModelForSequenceClassification.from_pretrained(self.model, output_loading_info=True)
        if missing := sorted(info["missing_keys"]):
            raise ValueError(
                f"{self.model} is no trained classifier: it lacks {missing[:3]}. Train one, or give its path."
            )
        columns = {name: column for column, name in model.config.id2label.items()}
        if self.label not in columns:
            raise ValueError(f"{self.model} has no label {self.label!r}; it has {', '.join(columns)}.")
        model.to(self.device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
        return model, AutoTokenizer.from_pretrained(self.model), columns[self.label]

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Return the probabilities of texts, [N]."""
        import torch

        model, tokenizer, column = self._loaded
        options = {"truncation": True, "max_length": self.max_length, "return_overflowing_tokens": True}
        read = tokenizer(list(texts), **options)
        owners, windows = np.array(read["overflow_to_sample_mapping"]), read["input_ids"]
        found = np.empty(len(windows))
        separate = model.config.problem_type == "multi_label_classification" or model.config.num_labels == 1
        order = sorted(range(len(windows)), key=lambda i: len(windows[i]))
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            batch = tokenizer.pad({"input_ids": [windows[i] for i in rows]}, return_tensors="pt").to(model.device)
            with torch.no_grad():
                logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
            found[rows] = (logits.sigmoid() if separate else logits.softmax(-1))[:, column].cpu()
        if self.reduce == "mean":
            return np.bincount(owners, weights=found, minlength=len(texts)) / np.bincount(owners, minlength=len(texts))
        highest = np.zeros(len(texts))
        np.maximum.at(highest, owners, found)
        return highest
