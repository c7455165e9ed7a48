"""Remove documents in other languages by a language identifier."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from lifecycle_hf.curation.decisions import Decision


class LanguageFilter:
    """Remove a document unless the probability of one of the wanted languages is above a threshold.

    These probabilities are kept as scores such as "language_en". A document without a word has none and is kept.

    Args:
        scorer: texts -> {language: probability} of each, or the file of a fastText model such as `lid.176.bin`. There
            is no default: datatrove's own filter downloads its model, which this library does not do.
        languages: as the scorer calls them.

    Raises:
        ValueError: there is no such file.
        ImportError: a file is given, and fastText is not installed (at the first call).
    """

    name = "language"

    def __init__(
        self, scorer: Callable[[Sequence[str]], Sequence[Mapping[str, float]]] | str | Path,
        languages: Sequence[str] = ("en",), threshold: float = 0.65,
    ):  # fmt: skip
        if not callable(scorer) and not Path(scorer).is_file():
            raise ValueError(
                f"LanguageFilter: there is no fastText model at {str(scorer)!r}. Download lid.176.bin from "
                "https://fasttext.cc/docs/en/language-identification.html and give its path, or give a callable."
            )
        self.scorer = scorer if callable(scorer) else FastText(scorer)
        self.languages, self.threshold = tuple(languages), threshold

    def __call__(self, texts: Sequence[str], *, urls=None, domains=None) -> list[Decision]:
        """Return for each text whether it is in one of the languages."""
        filled = [i for i, text in enumerate(texts) if text.strip()]
        found = dict(zip(filled, self.scorer([texts[i] for i in filled]), strict=True)) if filled else {}
        return [self._decide(found[i]) if i in found else Decision() for i in range(len(texts))]

    def _decide(self, found: Mapping[str, float]) -> Decision:
        scores = {f"language_{language}": float(found.get(language, 0)) for language in self.languages}
        return Decision("language" * all(score <= self.threshold for score in scores.values()), scores=scores)


class FastText:
    """Return the probabilities of languages by a fastText model, {language: probability} of each text."""

    def __init__(self, path: str | Path):
        self.path = str(path)

    def __getstate__(self):
        return {"path": self.path}

    @cached_property
    def _model(self):
        try:
            from fasttext import load_model
        except ImportError as error:
            raise ImportError(
                "LanguageFilter reads fastText models by the package fasttext: pip install fasttext-numpy2-wheel."
            ) from error
        return load_model(self.path)

    def __call__(self, texts: Sequence[str]) -> list[dict[str, float]]:
        found = (self._model.predict(text.replace("\n", " "), k=-1) for text in texts)
        return [{label.removeprefix("__label__"): float(p) for label, p in zip(*pairs)} for pairs in found]
