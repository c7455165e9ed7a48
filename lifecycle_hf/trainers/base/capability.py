"""What a model should still know, as a loss: texts in a fixed order, their mean NLL per token."""

from typing import Any

import torch
from datasets import Dataset
from torch import distributed, nn
from transformers import PreTrainedTokenizerBase

from lifecycle_hf.completions.scoring import Completions, completion_logprobs
from lifecycle_hf.data.collators import length_mask, pad_sequences, shuffled
from lifecycle_hf.data.tokenize import tokenize_texts


def prepare_texts(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int, where: str, strict: bool = False
) -> Dataset:
    """Tokenised rows (see `tokenize_texts`) with something to predict after their first token.

    Raises:
        ValueError: as `tokenize_texts`, or no row is left.
    """
    rows = tokenize_texts(dataset, tokenizer, max_length=max_length, where=where, strict=strict)
    rows = rows.filter(lambda row: any(row["loss_mask"][1:]))
    if len(rows) == 0:
        raise ValueError(f"{where} has no row with a token to predict after its first: give longer texts.")
    return rows


class PretrainingRows:
    """Pretraining rows by micro-step, without state: which rows come depends on the seed and the step alone.

    Args:
        dataset: columns "input_ids" and "loss_mask"; rows without a token to predict are left out.
        batch_size: rows per process and micro-step.
    """

    def __init__(self, dataset: Dataset, *, batch_size: int, pad_token_id: int, seed: int, rank: int, world_size: int):
        self.dataset, self.batch_size, self.pad_token_id = dataset, batch_size, pad_token_id
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self._order: tuple[int, list[int]] = (-1, [])

    def _row(self, position: int) -> dict[str, list[int]]:
        epoch, index = divmod(position, len(self.dataset))
        if self._order[0] != epoch:
            self._order = (epoch, shuffled(len(self.dataset), self.seed + epoch))
        return self.dataset[self._order[1][index]]

    def batch(self, micro_step: int, device) -> tuple[Completions, torch.Tensor]:
        """The rows as completions of their first token, and the loss mask [B, T] in completion coordinates."""
        start = (micro_step * self.world_size + self.rank) * self.batch_size
        rows = [self._row(start + i) for i in range(self.batch_size)]
        ids = [row["input_ids"] for row in rows]
        texts = Completions.from_lists([i[:1] for i in ids], [i[1:] for i in ids], self.pad_token_id, device)
        mask = pad_sequences([row["loss_mask"][1:] for row in rows], 0).bool().to(device)
        return texts, mask & length_mask(texts.completion_lengths, mask.shape[1])


class CapabilityLoss:
    """Mean NLL per token of the next batch of texts: −Σ m·log p(x_t | x_<t) / Σ m, nats, with its gradient.

    With `reduction="sum"` the sum over the tokens; of one row, that is the loss of a Fisher information.

    Serves as a trainer's auxiliary loss (PTX for any trainer: `add_auxiliary_loss("capability", loss, 0.5)`) and
    wherever `f(model) -> scalar` is asked for. Each call takes the next rows of a shuffle that is drawn anew in every
    epoch; the ranks hold disjoint rows. Over several batches or ranks the mean of their means is taken.

    Args:
        dataset: text, chat or prompt-completion rows, as for `tokenize_texts`.
        batch_size: rows per process and call.
        max_length: cut rows to this many tokens.
        where, strict: what errors and warnings call the dataset, and whether a row that can't be used is an error.
        rank, world_size: by default those of torch.distributed at the first call, or 0 of 1.

    Attributes:
        position: calls so far, the state to resume from.

    Raises:
        ValueError: batch_size below 1, or as [`prepare_texts`].
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 8,
        max_length: int = 512,
        reduction: str = "mean",
        seed: int = 0,
        where: str = "the capability dataset",
        strict: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"CapabilityLoss: batch_size={batch_size} must be at least 1.")
        if reduction not in ("mean", "sum"):
            raise ValueError(f"CapabilityLoss: reduction={reduction!r} is unknown: choose 'mean' or 'sum'.")
        texts = prepare_texts(dataset, tokenizer, max_length=max_length, where=where, strict=strict)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.rows = PretrainingRows(
            texts, batch_size=batch_size, pad_token_id=pad, seed=seed, rank=rank, world_size=world_size
        )
        self.reduction, self.position = reduction, 0

    def __call__(self, model: nn.Module) -> torch.Tensor:
        rows = self.rows
        if rows.world_size is None:
            there = distributed.is_available() and distributed.is_initialized()
            rows.rank, rows.world_size = (distributed.get_rank(), distributed.get_world_size()) if there else (0, 1)
        texts, mask = rows.batch(self.position, next(model.parameters()).device)
        self.position += 1
        nll = -(completion_logprobs(model, texts).logprobs * mask).sum()
        return nll if self.reduction == "sum" else nll / mask.sum()

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]
