"""Overlap of two texts: ROUGE-L, and the form in which short answers are compared."""

import re
import string
from collections.abc import Iterable, Sequence

_WORD = re.compile("[a-z0-9]+")
_ARTICLES, _SIGNS = re.compile(r"\b(a|an|the)\b"), str.maketrans("", "", string.punctuation)


def rouge_words(text: str) -> list[str]:
    """Return the words that ROUGE compares: runs of a–z and 0–9 of the text in lower case, as `rouge-score` does."""
    return _WORD.findall(text.lower())


def lcs_lengths(words: Sequence[str], others: Iterable[Sequence[str]]) -> list[int]:
    """Return the length of the longest common subsequence of `words` with each of the other lists of words.

    Bit i of an integer stands for word i; the zeros of the last state are the words of one longest subsequence. It
    equals the usual table of len(words) × len(other), in len(other) steps.

    Reference: Hyyrö, "Bit-parallel LCS-length computation revisited", 2004.
    """
    places, full, found = {}, (1 << len(words)) - 1, []
    for i, word in enumerate(words):
        places[word] = places.get(word, 0) | 1 << i
    for other in others:
        state = full
        for word in other:
            matches = state & places.get(word, 0)
            state = (state + matches | state - matches) & full
        found.append(len(words) - state.bit_count())
    return found


def rouge_l(prediction: str, target: str) -> float:
    """Return ROUGE-L, in [0, 1]: F = 2·LCS / (words of the prediction + words of the target), 0 where LCS is 0.

    It equals 2PR / (P + R) with P = LCS / words of the prediction, R = LCS / words of the target, which `rouge-score`
    computes, without a stemmer.

    Reference: https://aclanthology.org/W04-1013, section 3.1, with β = 1.
    """
    ours, theirs = rouge_words(prediction), rouge_words(target)
    return 2 * lcs_lengths(ours, [theirs])[0] / (len(ours) + len(theirs)) if ours and theirs else 0.0


def normalized_answer(text: str) -> str:
    """Return a text as SQuAD compares it: lower case, without ASCII punctuation, a, an, the, and repeated blanks.

    A hyphen and a point are punctuation: "-3" becomes "3", and "1.5" becomes "15".

    Reference: the evaluation script of https://arxiv.org/abs/1606.05250.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_SIGNS)).split())
