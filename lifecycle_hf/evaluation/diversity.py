"""Diversity of what a model says: token entropy, distinct-n, self-BLEU."""

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedModel

from lifecycle_hf.evaluation.bootstrap import Measurement, ratio
from lifecycle_hf.evaluation.metrics import row_logits

_WORD = re.compile(r"\w+|[^\w\s]")


def token_entropy(
    model: PreTrainedModel, prompts: Sequence[list[int]], completions: Sequence[list[int]], *, batch_size: int = 8
) -> Measurement:
    """Return the mean over all completion tokens of −Σ_v π(v|s_t)·log π(v|s_t), nats, at temperature 1.

    Args:
        prompts, completions: token ids, one completion each, sampled from the model.
    """
    rows = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
    items = np.empty((len(rows), 2))
    for i, logits in row_logits(model, rows, batch_size=batch_size, prefixes=[len(prompt) for prompt in prompts]):
        n = len(completions[i])
        logprobs = logits[-n - 1 : -1].log_softmax(-1)
        items[i] = -(logprobs.exp() * logprobs).nan_to_num().sum().item(), n
    return Measurement(items, ratio)


def words(text: str) -> list[str]:
    """Return the words of a text: runs of letters and digits, and each other sign by itself."""
    return _WORD.findall(text)


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Return different n-grams / all n-grams of words, over all texts; it falls with the number and length of texts.

    It is a plain number, since resampling repeats texts, which would bias it. It is 0 where no text has n words.

    Reference: https://arxiv.org/abs/1510.03055, section 4.3.
    """
    counts = Counter(gram for text in texts for gram in _ngrams(words(text), n))
    return len(counts) / counts.total() if counts else 0.0


def self_bleu(texts: Sequence[str], *, max_n: int = 4) -> Measurement:
    """Return the mean BLEU of each text against all others, in [0, 1]: 1 when all are equal, lower is more diverse.

    BLEU of one sentence over `words`, as sacrebleu's `BLEU(effective_order=True, tokenize="none")`: clipped n-gram
    precisions, exponential smoothing, brevity penalty by the closest reference length. The texts are compared with one
    another, so an interval from them as items is approximate.

    Raises:
        ValueError: fewer than two texts.

    Reference: Texygen, https://arxiv.org/abs/1802.01886, section 3.2.
    """
    if len(texts) < 2:
        raise ValueError(f"self_bleu compares texts with one another; it got {len(texts)}.")
    split = [words(text) for text in texts]
    counts = [Counter(gram for n in range(1, max_n + 1) for gram in _ngrams(row, n)) for row in split]
    top: dict[tuple, tuple[int, int]] = {}
    for own in counts:
        for gram, count in own.items():
            best, second = top.get(gram, (0, 0))
            top[gram] = (count, best) if count > best else (best, max(second, count))
    lengths = Counter(map(len, split))
    return Measurement([_bleu(own, top, len(row), lengths, max_n) for own, row in zip(counts, split)])


def _bleu(own, top, length, lengths, max_n):
    """BLEU of one text; `top` has each n-gram's two highest counts, and a text with the highest meets the next one."""
    correct, total = [0] * max_n, [max(length - n, 0) for n in range(max_n)]
    for gram, count in own.items():
        best, second = top[gram]
        correct[len(gram) - 1] += min(count, second if count == best else best)
    if not any(correct):
        return 0.0
    logs, smooth = [], 1.0
    for right, all_ in zip(correct, total):
        if all_:
            smooth *= 1 if right else 2
            logs.append(math.log(right / all_ if right else 1 / (smooth * all_)))
    others = [other for other, count in lengths.items() if other != length or count > 1]
    closest = min(others, key=lambda other: (abs(other - length), other))
    return math.exp(min(0.0, 1 - closest / length) + sum(logs) / len(logs))


def _ngrams(row, n):
    return zip(*(row[i:] for i in range(n)))
