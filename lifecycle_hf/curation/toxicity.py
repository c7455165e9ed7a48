"""Remove toxic documents by a classifier's probability."""

from collections.abc import Sequence
from pathlib import Path

from lifecycle_hf.curation.classifiers import ClassifierScorer, Scorer, class_probabilities
from lifecycle_hf.curation.decisions import Decision


class ToxicityFilter:
    """Remove a document whose probability of being toxic is at least a threshold; each score is kept as "toxicity".

    Args:
        scorer: texts -> probabilities, or the path of a sequence classifier of transformers. Of a text longer than
            its context the most toxic window counts.
        threshold: from which on a document is removed.
        label: the classifier's name of the toxic class.
    """

    name = "toxicity"

    def __init__(self, scorer: Scorer | str | Path, threshold: float = 0.5, *, label: str = "toxic"):
        self.scorer = scorer if callable(scorer) else ClassifierScorer(scorer, label, reduce="max")
        self.threshold = threshold

    def __call__(self, texts: Sequence[str], *, urls=None, domains=None) -> list[Decision]:
        """Return for each text whether it is toxic."""
        scores = class_probabilities(self.scorer, texts, "ToxicityFilter").tolist()
        return [Decision("toxicity" * (score >= self.threshold), scores={"toxicity": score}) for score in scores]
