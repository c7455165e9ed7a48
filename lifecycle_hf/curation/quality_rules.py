"""Remove documents by written rules: Gopher's of quality and of repetition, and C4's, through datatrove's filters.

datatrove splits each text into words by spaCy for each filter, at 0.4 MB/s. Here words are what stands between white
space, and repeated runs of words are counted only where there can be too many of them: about 2 MB/s.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.filters import C4QualityFilter, GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.filters.c4_filters import CITATION_REGEX
from datatrove.pipeline.filters.gopher_repetition_filter import find_all_duplicate
from datatrove.utils.text import split_into_sentences, split_into_words
from datatrove.utils.word_tokenizers import WordTokenizer

from lifecycle_hf.curation.decisions import Decision
from lifecycle_hf.curation.hashing import ODD
from lifecycle_hf.data.templates import build

_SENTENCE_END = re.compile(r"(?<![.!?])[.!?]++[\"')\]”’]*+(?=\s|$)")


class Spaces(WordTokenizer):
    """Split texts into words at white space, and into sentences after . ! or ? before white space."""

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        return [text[start:end] for start, end in self.span_tokenize(text)]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        ends = [match.end() for match in _SENTENCE_END.finditer(text)]
        ends += [len(text)] * bool(text[ends[-1] if ends else 0 :].strip())
        return list(zip([0, *ends], ends))


class _Repetition(GopherRepetitionFilter):
    """Decide as datatrove's filter does, and count runs of words only where a bound doesn't tell that they are few."""

    def __init__(self, **options):
        super().__init__(**options)
        self.runs, self.top_n_grams, self.dup_n_grams = (self.top_n_grams, self.dup_n_grams), (), ()

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        found = super().filter(doc)  # which now looks at lines and paragraphs
        return found if found is not True else self._repeated(doc.text)

    def _repeated(self, text: str) -> bool | tuple[bool, str]:
        words, (top, repeated) = split_into_words(text, self.language), self.runs
        longest, count = max(map(len, words), default=0), len(words)
        for n, most in sorted(top):
            # A longer run stands no more often than a shorter one, so `count` bounds it.
            if count * (n * longest + n - 1) > most * len(text):
                counts = Counter(zip(*(words[i:] for i in range(n))))
                run, count = max(counts.items(), key=lambda item: item[1], default=((), 0))
                if len(" ".join(run)) * count / len(text) > most:
                    return False, f"top_{n}_gram"
        for n, most in repeated:
            if covered_characters(words, n) <= min(most for _, most in repeated) * len(text):
                break  # the characters inside longer runs are no more
            if find_all_duplicate(words, n) / len(text) > most:
                return False, f"duplicated_{n}_n_grams"
        return True


def covered_characters(words: Sequence[str], n: int) -> int:
    """Return the characters of the words in runs of n words that stand earlier in the text too.

    Those that datatrove's `find_all_duplicate` counts, of runs that do not overlap, are at most as many.
    """
    hashes = np.array([hash(word) for word in words], dtype=np.int64).view(np.uint64)
    again = np.ones(max(0, len(words) - n + 1), dtype=np.int64)
    runs = np.zeros(len(again), dtype=np.uint64)
    for i in range(n):
        runs = runs * np.uint64(ODD) + hashes[i : i + len(again)]
    again[np.unique(runs, return_index=True)[1]] = 0
    if not again.any():
        return 0
    inside = np.convolve(again, np.ones(n, dtype=np.int64)) > 0
    return int(np.array([len(word) for word in words])[inside].sum())


class _C4(C4QualityFilter):
    """Remember what datatrove's filter decides about each line, which it only counts."""

    def stat_update(self, *labels: str, **options) -> None:
        self.lines += [label.removeprefix("line-filter-") for label in labels if label != "line-total"]

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        self.lines = []
        return super().filter(doc)

    def cut(self, text: str) -> list[tuple[int, int, str]]:
        """Return what the last call cut out of the text that it read: whole lines or sentences, and citations."""
        spans, at = [], 0
        parts = text.splitlines() if self.split_paragraph else split_into_sentences(text, self.language)
        for part, label in zip(parts, self.lines):
            start = text.index(part, at)
            at = start + len(part)
            if label != "line-kept" and part.strip():
                spans.append((start, at, label))
            elif self.remove_citations:
                found = (match.span() for match in CITATION_REGEX.finditer(text, start, at))
                spans += [(*span, "citation") for span in found]
        return spans


class QualityRules:
    """Remove documents by the rules of Gopher and C4.

    C4's rules come first: they cut lines out, and the others read what is left. The reason is datatrove's name of the
    rule, such as "gopher_short_doc", "dup_line_frac" or "too_few_sentences"; it is "empty" where no word is left.
    "gopher_enough_stop_words" tells that there are too few of them.

    Args:
        gopher_quality: True, or options of datatrove's `GopherQualityFilter`: number and length of words, symbols,
            bullets, ellipses, words without a letter, stop words (English by default). False leaves the group out.
        gopher_repetition: the same of `GopherRepetitionFilter`: repeated lines, paragraphs and runs of words.
        c4: the same of `C4QualityFilter`. Lines without punctuation at their end, with fewer than 3 words, or on
            JavaScript or cookies are cut out; a text with fewer than 5 sentences, a curly bracket or "lorem ipsum" is
            removed, so that no code is left.
        language: None for words between white space. A language of datatrove, such as "en", gives the words of its own
            tokenizer, of which punctuation is a part; that is 6 times slower.

    Raises:
        ValueError: a group has an option that datatrove's filter does not have.

    References: Gopher, https://arxiv.org/abs/2112.11446, appendix A.1.1; C4, https://arxiv.org/abs/1910.10683.
    """

    name = "rules"

    def __init__(
        self, *, gopher_quality: Mapping | bool = True, gopher_repetition: Mapping | bool = True,
        c4: Mapping | bool = False, language: str | None = None,
    ):  # fmt: skip
        self.options = {"gopher_quality": gopher_quality, "gopher_repetition": gopher_repetition, "c4": c4}
        self.options["language"] = language
        words = {"language": Spaces() if language is None else language}
        groups = (
            (_C4, c4, "c4"),
            (GopherQualityFilter, gopher_quality, "gopher_quality"),
            (_Repetition, gopher_repetition, "gopher_repetition"),
        )
        self.filters = [
            build(kind, words | (dict(options) if isinstance(options, Mapping) else {}), f"QualityRules: {group}")
            for kind, options, group in groups
            if options or isinstance(options, Mapping)
        ]

    def __call__(self, texts: Sequence[str], *, urls=None, domains=None) -> list[Decision]:
        """Return for each text the first rule that it breaks, and what C4's rules left of it."""
        return [self._decide(text) for text in texts]

    def _decide(self, text: str) -> Decision:
        document, spans = Document(text=text, id=""), ()
        for step in self.filters:
            if not document.text.strip():
                return Decision("empty")
            found = step.filter(document)
            if found is not True:
                return Decision(found[1])
            if isinstance(step, _C4):
                spans = tuple(step.cut(text))
        if document.text == text:
            return Decision()
        return Decision(text=document.text, spans=spans) if document.text else Decision("empty")
