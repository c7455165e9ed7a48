"""The loss of a model on texts that it should still predict well: their mean NLL per token."""

from typing import Any

import torch
from datasets import Dataset
from torch import distributed, nn
from transformers import PreTrainedTokenizerBase

from lifecycle_hf.completions.scoring import Completions, completion_logprobs
from lifecycle_hf.data.collators import length_mask, pad_sequences, shuffled
from lifecycle_hf.data.tokenize import tokenize_texts


class PretrainingRows:
    """Batches of pretraining rows by micro-step: the seed and the step alone determine which rows a batch holds.

    Args:
        dataset: text, chat or prompt-completion rows, as for `tokenize_texts`. Rows without a token to predict after
            the first one are left out.
        batch_size: rows per process and micro-step.
        max_length: longer rows are cut to this many tokens.
        where: the dataset's name in errors and warnings.
        strict: whether a row that can't be used is an error.
        rank, world_size: by default those of torch.distributed at the first batch, or 0 of 1.

    Raises:
        ValueError: as `tokenize_texts`, or no row is left.
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 8,
        max_length: int = 512,
        seed: int = 0,
        where: str = "the capability dataset",
        strict: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"{where}: batch_size={batch_size} must be at least 1.")
        rows = tokenize_texts(dataset, tokenizer, max_length=max_length, where=where, strict=strict)
        self.dataset = rows.filter(lambda row: any(row["loss_mask"][1:]))
        if len(self.dataset) == 0:
            raise ValueError(f"{where} has no row with a token to predict after its first: give longer texts.")
        self.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self._order: tuple[int, list[int]] = (-1, [])

    def _row(self, position: int) -> dict[str, list[int]]:
        epoch, index = divmod(position, len(self.dataset))
        if self._order[0] != epoch:
            self._order = (epoch, shuffled(len(self.dataset), self.seed + epoch))
        return self.dataset[self._order[1][index]]

    def batch(self, micro_step: int, device) -> tuple[Completions, torch.Tensor]:
        """Return the rows as completions of their first token, and the loss mask [B, T] of these completions."""
        if self.world_size is None:
            started = distributed.is_available() and distributed.is_initialized()
            self.rank, self.world_size = (distributed.get_rank(), distributed.get_world_size()) if started else (0, 1)
        start = (micro_step * self.world_size + self.rank) * self.batch_size
        rows = [self._row(start + i) for i in range(self.batch_size)]
        ids = [row["input_ids"] for row in rows]
        texts = Completions.from_lists([i[:1] for i in ids], [i[1:] for i in ids], self.pad_token_id, device)
        mask = pad_sequences([row["loss_mask"][1:] for row in rows], 0).bool().to(device)
        return texts, mask & length_mask(texts.completion_lengths, mask.shape[1])


class CapabilityLoss:
    """Compute the mean NLL per token of the next batch of texts: −Σ m·log p(x_t | x_<t) / Σ m, nats, with gradient.

    It serves as an auxiliary loss of any trainer (`add_auxiliary_loss("capability", loss, 0.5)` is PTX), and wherever
    a function `f(model) -> scalar` is needed. Each call takes the next rows of a shuffle that is drawn anew in every
    epoch; the ranks get disjoint rows. Over several batches or ranks the mean of their means is taken.

    Args:
        dataset, tokenizer: rows and tokenizer, as in [`PretrainingRows`].
        reduction: "mean", or "sum" for the sum over the tokens; for one row, that is the loss of a Fisher information.
        options: `batch_size` (8, rows per process and call), `max_length` (512), `seed`, `where`, `strict`, `rank` and
            `world_size`, as in [`PretrainingRows`].

    Attributes:
        position: number of calls so far, which is the state to resume from.

    Raises:
        ValueError: batch_size is below 1, `reduction` is unknown, or as [`PretrainingRows`].
    """

    def __init__(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, reduction: str = "mean", **options):
        if reduction not in ("mean", "sum"):
            raise ValueError(f"CapabilityLoss: reduction={reduction!r} is unknown: choose 'mean' or 'sum'.")
        self.rows = PretrainingRows(dataset, tokenizer, **options)
        self.reduction, self.position = reduction, 0

    def __call__(self, model: nn.Module) -> torch.Tensor:
        texts, mask = self.rows.batch(self.position, next(model.parameters()).device)
        self.position += 1
        nll = -(completion_logprobs(model, texts).logprobs * mask).sum()
        return nll if self.reduction == "sum" else nll / mask.sum()

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]
