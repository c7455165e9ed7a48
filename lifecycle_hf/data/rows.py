"""Plans of rows: how many tokens of text a row takes from the corpus, and the inputs and labels made from them.

A plan has kinds of rows. A dataset draws a kind for each row, cuts `lengths[kind]` tokens from the corpus and calls
`row(kind, ids, rng)`, which returns int64 arrays.
"""

from collections.abc import Sequence

import numpy as np

from lifecycle_hf.data.denoising import (
    IGNORED,
    Denoiser,
    DenoisingTokens,
    check_sentinels,
    mask_tokens,
    planned_length,
)


class RowPlan:
    """Hold the kinds of rows: their names, the number of text tokens that each takes, and how often it is drawn.

    Raises:
        ValueError: `weights` does not have one number for each kind, or has a negative one, or is all zero.
    """

    def __init__(self, names: Sequence[str], lengths: Sequence[int], weights: Sequence[float] | None = None):
        self.names, self.lengths = list(names), np.asarray(lengths)
        weights = np.ones(len(names)) if weights is None else np.asarray(weights, dtype=float)
        if len(weights) != len(names) or not (weights >= 0).all() or not 0 < weights.sum() < np.inf:
            raise ValueError(f"weights={weights.tolist()}: one for each of {self.names}, none negative, not all zero.")
        self._cumulative = np.cumsum(weights) / weights.sum()
        self._cumulative[np.flatnonzero(weights)[-1] :] = 1

    def draw(self, rng: np.random.Generator, size: int | None = None) -> np.ndarray:
        """Draw kinds [size] with probabilities proportional to the weights."""
        return np.searchsorted(self._cumulative, rng.random(size), side="right")

    def row(self, kind: int, ids: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray | int]:
        """Return the example made from `lengths[kind]` tokens of text."""
        raise NotImplementedError


class CausalRows(RowPlan):
    """Return unchanged text as inputs and labels; models shift the labels themselves.

    Raises:
        ValueError: the context is shorter than two tokens.
    """

    def __init__(self, context_length: int):
        check_context(context_length)
        super().__init__(["causal"], [context_length])

    def row(self, kind, ids, rng):
        ids = ids.astype(np.int64)
        return {"input_ids": ids, "labels": ids}


class MaskedRows(RowPlan):
    """Mask rows of `context_length` tokens for masked LM; see `mask_tokens`.

    Raises:
        ValueError: there is no mask token, a rate is outside (0, 1), or the context is shorter than two tokens.
    """

    def __init__(self, tokens: DenoisingTokens, context_length: int, *, rate: float = 0.15):
        check_context(context_length)
        if tokens.mask_id is None:
            raise ValueError("masked LM needs a mask token: add_denoising_tokens(tokenizer, mask='<mask>') adds one.")
        if not 0 < rate < 1:
            raise ValueError(f"masked LM: rate={rate} must lie between 0 and 1.")
        super().__init__(["masked"], [context_length])
        ids = {"mask_id": tokens.mask_id, "special_ids": tokens.special_ids}
        self._options = ids | {"rate": rate, "vocab_size": tokens.vocab_size}

    def row(self, kind, ids, rng):
        inputs, labels = mask_tokens(ids, rng, **self._options)
        return {"input_ids": inputs.astype(np.int64, copy=False), "labels": labels, "denoiser": int(kind)}


class DenoisedRows(RowPlan):
    """Corrupt rows with a mixture of denoisers so that they fill the context; by default all are equally likely.

    One stack: `input_ids` are mode, inputs and targets; `labels` are aligned with them and -100 on the first
    `prefix_length` tokens, to which a prefix LM attends in both directions. Encoder and decoder (with
    `target_length`): `input_ids` are mode, inputs and EOS (as T5's), and `labels` are the targets. `denoiser` is the
    index of the row's denoiser.

    Raises:
        ValueError: the context is too short for a denoiser, there are fewer sentinels than spans, or the token of a
            mode is missing.
    """

    def __init__(
        self,
        denoisers: Sequence[Denoiser],
        tokens: DenoisingTokens,
        context_length: int,
        *,
        weights: Sequence[float] | None = None,
        target_length: int | None = None,
    ):
        lengths = [planned_length(denoiser, context_length, target_length) for denoiser in denoisers]
        super().__init__([denoiser.name for denoiser in denoisers], lengths, weights)
        for denoiser, length in zip(denoisers, lengths):
            what = f"denoiser {denoiser.name!r} in a row of {length} tokens (context_length={context_length})"
            check_sentinels(what, denoiser.spans(length), tokens.sentinel_ids)
            if denoiser.mode is not None and denoiser.mode not in tokens.mode_ids:
                raise ValueError(
                    f"denoiser {denoiser.name!r}: its token {denoiser.mode!r} is none of {list(tokens.mode_ids)}. "
                    f"Add it: add_denoising_tokens(tokenizer, modes=[..., {denoiser.mode!r}])."
                )
        self.denoisers, self.tokens, self.target_length = tuple(denoisers), tokens, target_length
        self._modes = [np.array([tokens.mode_ids[d.mode]] if d.mode else [], dtype=np.int64) for d in denoisers]

    def row(self, kind, ids, rng):
        inputs, targets = self.denoisers[kind].corrupt(ids, rng, self.tokens)
        if self.target_length is not None:
            inputs = np.concatenate((self._modes[kind], inputs, [self.tokens.eos_id]))
            return {"input_ids": inputs, "labels": targets.astype(np.int64), "denoiser": int(kind)}
        whole = np.concatenate((self._modes[kind], inputs, targets))
        labels = whole.copy()
        prefix = len(whole) - len(targets)
        labels[:prefix] = IGNORED
        return {"input_ids": whole, "labels": labels, "prefix_length": prefix, "denoiser": int(kind)}


def check_context(context_length: int) -> None:
    """Check that a row has a token to predict.

    Raises:
        ValueError: the context is shorter than two tokens.
    """
    if context_length < 2:
        raise ValueError(f"context_length={context_length}: a row needs at least 2 tokens to have one to predict.")
