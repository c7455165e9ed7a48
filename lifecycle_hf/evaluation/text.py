"""Overlap of texts: ROUGE-L, BLEU, the form in which short answers are compared, and what a copy would score."""

import re
import string
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import takewhile

import numpy as np

from lifecycle_hf.evaluation.bootstrap import Measurement

_WORD = re.compile("[a-z0-9]+")
_SENTENCE_END = re.compile(r"(?<=\w{3}[.!?])\s+(?=\W*[A-Z])")
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


def bleu(predictions: Sequence[str], references: Sequence[str]) -> Measurement:
    """Return corpus BLEU in [0, 1], as sacrebleu's with its defaults (tokenizer 13a, exponential smoothing).

    Each text counts by its n-grams and lengths, which are summed before the precisions are taken.

    Reference: https://aclanthology.org/P02-1040; https://arxiv.org/abs/1804.08771.
    """
    from sacrebleu.metrics import BLEU  # here, since few programs that import this file need it

    count = BLEU(effective_order=True)  # which changes the scores of sentences, but no count; otherwise each warns
    scores = [count.sentence_score(text, [right]) for text, right in zip(predictions, references, strict=True)]
    columns = [[*score.counts, *score.totals, score.sys_len, score.ref_len] for score in scores]
    return Measurement(columns, partial(_corpus_bleu, BLEU.compute_bleu, len(columns)))


def _corpus_bleu(compute, n: int, means: np.ndarray) -> np.ndarray:
    """Return BLEU from the means over `n` texts of the columns of [`bleu`], [..., 10] -> [...]."""

    def score(sums):
        return compute(sums[:4], sums[4:8], *sums[8:]).score / 100

    sums = np.rint(n * np.asarray(means)).astype(int)
    return np.array([score(row.tolist()) for row in sums.reshape(-1, 10)]).reshape(sums.shape[:-1])


def leads(prompts: Sequence[str]) -> list[str]:
    """Return of each prompt the first sentence of its first line, behind the instruction: a baseline of summaries.

    The instruction is what all prompts begin with, in whole words. A sentence ends with a point or another sign after
    three letters, before a capital letter.
    """
    ends = (re.findall(r"\S+\s*", text) for text in (min(prompts), max(prompts)))  # between which all others stand
    shared = "".join(word for word, _ in takewhile(lambda pair: pair[0] == pair[1], zip(*ends)))
    rests = [prompt if len(prompt) == len(shared) else prompt.removeprefix(shared).strip() for prompt in prompts]
    return [_SENTENCE_END.split(rest.splitlines()[0].strip())[0] for rest in rests]
