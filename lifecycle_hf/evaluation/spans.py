"""Extractive question answering: the best spans by their logits, and SQuAD's exact match and F1."""

from collections import Counter
from collections.abc import Sequence

import torch

from lifecycle_hf.evaluation.text import normalized_answer


def best_spans(
    start_logits: torch.Tensor, end_logits: torch.Tensor, allowed: torch.Tensor, *, n: int, max_length: int
) -> tuple[torch.Tensor, torch.LongTensor, torch.LongTensor]:
    """Return the `n` best spans of each row by start + end logit, with start ≤ end < start + `max_length`.

    Args:
        start_logits, end_logits: [B, L].
        allowed: [B, L], true where a span may start and end; the tokens between need not be.
        max_length: most tokens of a span.

    Returns:
        (scores, starts, ends), [B, n] each, the best first. Where a row has fewer spans the scores are −inf.

    It equals the search of all pairs (start, end), in O(L · max_length).
    """
    start_logits, end_logits = (x.float().masked_fill(~allowed, -torch.inf) for x in (start_logits, end_logits))
    ends_after = torch.nn.functional.pad(end_logits, (0, max_length - 1), value=-torch.inf).unfold(1, max_length, 1)
    scores = (start_logits[:, :, None] + ends_after).flatten(1)
    scores = torch.nn.functional.pad(scores, (0, max(0, n - scores.shape[1])), value=-torch.inf)
    scores, places = scores.topk(n, dim=1)
    starts = places // max_length
    return scores, starts, starts + places % max_length


def squad_scores(prediction: str, answers: Sequence[str]) -> tuple[float, float]:
    """Return (exact match, F1) of a prediction, each the highest over the right answers, as SQuAD 2.0 scores them.

    Both compare the normalised texts (see `normalized_answer`). F1 is 2PR / (P + R) of the words that both have, each
    as often as it stands in both. Where one of the two texts is empty, F1 is 1 if both are, else 0. No answers, or
    none that is not empty after normalisation, mean that the question has no answer, and the prediction should be "".

    Reference: https://arxiv.org/abs/1806.03822 and its evaluation script; 1606.05250, §6.1.
    """
    golds = [gold for gold in map(normalized_answer, answers) if gold] or [""]
    said = normalized_answer(prediction)
    return float(said in golds), max(_word_f1(said, gold) for gold in golds)


def _word_f1(said: str, gold: str) -> float:
    ours, theirs = said.split(), gold.split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = (Counter(ours) & Counter(theirs)).total()
    return 2 * common / (len(ours) + len(theirs))
