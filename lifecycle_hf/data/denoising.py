"""Corrupt token ids for masked LM, span corruption, prefix LM and UL2's mixture, by functions of (ids, rng).

Masked LM: Devlin et al. 2019 (arXiv 1810.04805). Span corruption: Raffel et al. 2020 (arXiv 1910.10683). Mixture of
denoisers: Tay et al. 2023 (arXiv 2205.05131).
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

IGNORED = -100  # the label that the losses of transformers ignore


def example_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Return the random generator of one example, the same on every worker and rank and after a resumed run."""
    return np.random.default_rng((seed, epoch, index))


def is_any_of(ids: np.ndarray, sorted_ids: np.ndarray) -> np.ndarray:
    """Return the mask [T] of the `ids` that are in `sorted_ids`: `np.isin`, but faster, for a sorted array."""
    if not len(sorted_ids):
        return np.zeros(len(ids), dtype=bool)
    return sorted_ids.take(np.searchsorted(sorted_ids, ids), mode="clip") == ids


def mask_tokens(
    ids: np.ndarray,
    rng: np.random.Generator,
    *,
    rate: float = 0.15,
    mask_id: int,
    vocab_size: int,
    special_ids: Sequence[int],
) -> tuple[np.ndarray, np.ndarray]:
    """Return inputs and labels [T] of masked LM: each ordinary token is chosen with probability `rate`.

    Of the chosen tokens, 80 % are replaced by the mask token, 10 % by a random ordinary token, and 10 % stay. Labels
    are the original ids at chosen positions and -100 elsewhere. Ordinary tokens are those not in `special_ids`.
    """
    special = np.unique(np.asarray(special_ids, dtype=ids.dtype))
    draw = rng.random(len(ids))
    chosen = (draw < rate) & ~is_any_of(ids, special)
    labels = np.where(chosen, ids, np.int64(IGNORED))
    inputs = np.where(chosen & (draw < 0.8 * rate), mask_id, ids)
    swapped = np.flatnonzero(chosen & (draw >= 0.8 * rate) & (draw < 0.9 * rate))
    # The n-th ordinary id is n plus the number of special ids below it.
    nth = rng.integers(vocab_size - len(special), size=len(swapped))
    inputs[swapped] = nth + np.searchsorted(special - np.arange(len(special)), nth, side="right")
    return inputs, labels


def count_noise(length: int, rate: float) -> int:
    """Return the number of noise tokens in a row: round(length·rate), at least 1 and at most length - 1.

    Raises:
        ValueError: `length` is below 2.
    """
    if length < 2:
        raise ValueError(f"a row of {length} tokens can't be corrupted: it needs at least 2 tokens.")
    return min(max(round(length * rate), 1), length - 1)


def count_spans(length: int, rate: float, mean_span: float) -> int:
    """Return the number of noise spans in a row: round(noise / mean_span), at least 1, each after a kept token."""
    noise = count_noise(length, rate)
    return min(max(round(noise / mean_span), 1), noise, length - noise)


def random_spans_mask(
    length: int, rng: np.random.Generator, *, rate: float, mean_span: float, random_roll: bool = True
) -> np.ndarray:
    """Return a mask [length], true at noise, in which kept and noise segments alternate and no two spans touch.

    Every mask with the counts of [`count_noise`] and [`count_spans`] is equally likely. Without `random_roll` it is
    T5's `random_spans_noise_mask`: of these masks those that begin with a kept token and end with noise. Then a row
    with one span, as all up to 30 tokens with rate 0.15 and spans of 3, always has its last tokens hidden, the first
    token of no row is ever learnt, and what follows the last noise is never an input. So `random_roll` is the default.
    T5's own `random_roll` shifts the mask around the end of the row, which cuts a span in two and makes the row longer
    than planned; here no span is cut. A token less than a span away from an end is therefore noise less often.
    """
    noise, spans = count_noise(length, rate), count_spans(length, rate, mean_span)
    outer = 1 if random_roll else 0  # the first and the last kept segment may be empty
    segments = np.zeros((spans + 1, 2), dtype=np.intp)
    segments[: spans + outer, 0] = _random_parts(length - noise + 2 * outer, spans + outer, rng)
    segments[[0, -1], 0] -= outer
    segments[:-1, 1] = _random_parts(noise, spans, rng)
    return np.repeat(np.arange(2 * spans + 2) % 2 == 1, segments.ravel())


def _random_parts(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """Draw lengths [parts], each at least 1, whose sum is `total`. Every such list is equally likely."""
    cuts = np.empty(parts + 1, dtype=np.intp)
    cuts[0], cuts[-1] = 0, total
    cuts[1:-1] = np.sort(rng.choice(total - 1, parts - 1, replace=False, shuffle=False)) + 1
    return np.diff(cuts)


def corrupt_spans(
    ids: np.ndarray, mask: np.ndarray, sentinel_ids: np.ndarray, eos_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return inputs and targets of span corruption: the k-th span of `mask` in ids [T] becomes the k-th sentinel.

    a b C D e F -> inputs: a b <0> e <1>; targets: <0> C D <1> F EOS.

    Raises:
        ValueError: there are more spans than sentinels.
    """
    starts = mask.copy()
    starts[1:] &= ~mask[:-1]
    spans = int(np.count_nonzero(starts))
    check_sentinels("the mask", spans, sentinel_ids)
    inputs = ids.copy()
    inputs[starts] = sentinel_ids[:spans]
    noise = ids[mask]
    places = np.flatnonzero(starts[mask]) + np.arange(spans)
    # np.insert would make the same targets in about three times the time.
    targets = np.empty(len(noise) + spans + 1, dtype=ids.dtype)
    is_noise = np.ones(len(targets), dtype=bool)
    is_noise[places] = is_noise[-1] = False
    targets[places], targets[is_noise], targets[-1] = sentinel_ids[:spans], noise, eos_id
    return inputs[~mask | starts], targets


def check_sentinels(what: str, spans: int, sentinel_ids: np.ndarray) -> None:
    """Check that there is a sentinel for each of `spans` spans.

    Raises:
        ValueError: there are too few sentinels. The message says how many are needed and how to add them.
    """
    if spans > len(sentinel_ids):
        raise ValueError(
            f"{what} makes {spans} spans, and there are {len(sentinel_ids)} sentinels. Add more with "
            f"add_denoising_tokens(tokenizer, n_sentinels={spans}), or shorten the context."
        )


@dataclass(frozen=True, eq=False)
class DenoisingTokens:
    """Hold the token ids that corruption needs; `add_denoising_tokens` returns those of a tokenizer."""

    eos_id: int
    vocab_size: int
    sentinel_ids: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int32))
    mode_ids: dict[str, int] = field(default_factory=dict)
    mask_id: int | None = None
    special_ids: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int32))


@dataclass(frozen=True)
class Denoiser:
    """Corrupt the share `rate` of the tokens of a row, in spans with a mean length of `mean_span` tokens.

    Without `mean_span` it is prefix LM: the noise is one span at the end, the inputs are the prefix and the targets
    the rest, and neither sentinels nor EOS are added. Without `rate` too, the length of the prefix is drawn uniformly
    from 1 to T-1. `mode` is the token, if any, at the start of the inputs. A row with fewer noise tokens than
    `mean_span` has one shorter span. `random_roll` lets spans stand anywhere, see [`random_spans_mask`].

    Raises:
        ValueError: a rate outside (0, 1), a mean span below 1, or a mean span without rate.
    """

    name: str
    rate: float | None
    mean_span: float | None = None
    mode: str | None = None
    random_roll: bool = True

    def __post_init__(self):
        if self.rate is None and self.mean_span is not None:
            raise ValueError(f"denoiser {self.name!r}: mean_span={self.mean_span} needs a rate.")
        if self.rate is not None and not 0 < self.rate < 1:
            raise ValueError(f"denoiser {self.name!r}: rate={self.rate} must lie between 0 and 1.")
        if self.mean_span is not None and self.mean_span < 1:
            raise ValueError(f"denoiser {self.name!r}: mean_span={self.mean_span} must be at least 1.")

    def spans(self, length: int) -> int:
        """Return the number of sentinels that a row of `length` tokens needs."""
        return 0 if self.mean_span is None else count_spans(length, self.rate, self.mean_span)

    def sizes(self, length: int) -> tuple[int, int, int]:
        """Return the largest numbers of tokens in the inputs (with mode token), in the targets, and in both."""
        spans, mode = self.spans(length), int(self.mode is not None)
        end = int(spans > 0)
        fewest, most = (1, length - 1) if self.rate is None else [count_noise(length, self.rate)] * 2
        return mode + length - fewest + spans, most + spans + end, mode + length + 2 * spans + end

    def corrupt(
        self, ids: np.ndarray, rng: np.random.Generator, tokens: DenoisingTokens
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return inputs and targets made from ids [T], without the mode token."""
        if self.mean_span is not None:
            options = {"rate": self.rate, "mean_span": self.mean_span, "random_roll": self.random_roll}
            mask = random_spans_mask(len(ids), rng, **options)
            return corrupt_spans(ids, mask, tokens.sentinel_ids, tokens.eos_id)
        noise = int(rng.integers(1, len(ids))) if self.rate is None else count_noise(len(ids), self.rate)
        return ids[:-noise], ids[-noise:]


SPAN_CORRUPTION = Denoiser("span_corruption", rate=0.15, mean_span=3)
PREFIX_LM = Denoiser("prefix_lm", rate=None)
UL2_DENOISERS = (
    Denoiser("R3", rate=0.15, mean_span=3, mode="[R]"),
    Denoiser("R8", rate=0.15, mean_span=8, mode="[R]"),
    Denoiser("S", rate=0.25, mode="[S]"),
    Denoiser("X3", rate=0.5, mean_span=3, mode="[X]"),
    Denoiser("X8", rate=0.5, mean_span=8, mode="[X]"),
    Denoiser("X64", rate=0.15, mean_span=64, mode="[X]"),
    Denoiser("X64h", rate=0.5, mean_span=64, mode="[X]"),
)


def planned_length(denoiser: Denoiser, context_length: int, target_length: int | None = None) -> int:
    """Return the largest number of text tokens whose corrupted row fits, so that rows need no padding.

    One stack: mode + inputs + targets <= context_length. The row is up to two tokens shorter than the context if one
    more token of text would make one more span. Encoder and decoder (`target_length` given): inputs with EOS <=
    context_length and targets <= target_length.

    Raises:
        ValueError: no row fits, or none with a span of the denoiser's mean length.
    """

    def overflows(length):
        inputs, targets, both = denoiser.sizes(length)
        if target_length is None:
            return both > context_length
        return inputs + 1 > context_length or targets > target_length

    most = context_length + (target_length or 0)
    length = 1 + bisect_left(range(2, most + 1), True, key=overflows)
    if length <= max(denoiser.mean_span or 1, 1):
        limits = f"context_length={context_length}" + (f" and target_length={target_length}" if target_length else "")
        raise ValueError(
            f"denoiser {denoiser.name!r}: {limits} leaves room for {length if length > 1 else 0} tokens of text, too "
            f"few for a span of {denoiser.mean_span or 1} and a token beside it. Lengthen it or leave it out."
        )
    return length


def sentinels_needed(denoisers: Sequence[Denoiser], context_length: int, target_length: int | None = None) -> int:
    """Return the largest number of spans in a row of any denoiser: the `n_sentinels` of `add_denoising_tokens`."""
    return max(denoiser.spans(planned_length(denoiser, context_length, target_length)) for denoiser in denoisers)
