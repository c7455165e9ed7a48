"""Completions in, per-token log-probs out: the one home of scoring.

Everything is in completion coordinates, [batch B, completion tokens T]: column t belongs to the t-th token of the
completion and is read from the position *before* it.
"""

import inspect
from dataclasses import dataclass, fields

import torch
from torch import nn

from lifecycle_hf.data.collators import length_mask, pad_sequences


@dataclass
class Completions:
    """Prompts with their completions, padded on the right.

    Attributes:
        input_ids: [B, L], prompt then completion then padding.
        prompt_lengths, completion_lengths: [B].
    """

    input_ids: torch.Tensor
    prompt_lengths: torch.Tensor
    completion_lengths: torch.Tensor

    @classmethod
    def from_lists(cls, prompts: list[list[int]], completions: list[list[int]], pad_token_id: int, device=None):
        """Pads token lists.

        Raises:
            ValueError: if a prompt or a completion is empty, naming the row.
        """
        for name, rows in (("prompt", prompts), ("completion", completions)):
            empty = [i for i, row in enumerate(rows) if not row]
            if empty:
                raise ValueError(f"Row {empty[0]} has an empty {name}: every {name} needs at least one token.")
        ids = [p + c for p, c in zip(prompts, completions, strict=True)]
        return cls(
            pad_sequences(ids, pad_token_id).to(device),
            torch.tensor([len(p) for p in prompts], device=device),
            torch.tensor([len(c) for c in completions], device=device),
        )

    @property
    def attention_mask(self) -> torch.Tensor:
        """[B, L], 1 on prompt and completion."""
        return length_mask(self.prompt_lengths + self.completion_lengths, self.input_ids.shape[1]).long()

    @property
    def mask(self) -> torch.Tensor:
        """[B, T], true on completion tokens."""
        return length_mask(self.completion_lengths, int(self.completion_lengths.max()))

    def positions(self, extra: int = 0) -> torch.Tensor:
        """[B, T + extra], the position each completion token is predicted from; padding points at the last token."""
        steps = torch.arange(int(self.completion_lengths.max()) + extra, device=self.input_ids.device)
        last = self.prompt_lengths + self.completion_lengths - 1
        return torch.minimum(self.prompt_lengths[:, None] - 1 + steps, last[:, None])

    def to(self, device) -> "Completions":
        return Completions(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def token_logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, *, temperature: float = 1.0, entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probs of `tokens` under softmax(logits / temperature) and, on request, the entropies, in fp32 and nats.

    Naively: `log_softmax(logits.float() / temperature, -1).gather(-1, tokens[..., None])[..., 0]`.

    Args:
        logits: [..., V].
        tokens: [...], int64.

    Returns:
        (log-probs [...], entropies [...] or None).
    """
    logits = logits.float() / temperature
    log_normaliser = logits.logsumexp(-1)
    logprobs = logits.gather(-1, tokens[..., None])[..., 0] - log_normaliser
    if not entropy:
        return logprobs, None
    return logprobs, log_normaliser - (torch.softmax(logits, -1) * logits).sum(-1)


def completion_logprobs(
    model: nn.Module, batch: Completions, *, temperature: float = 1.0, entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probs of the completion tokens of `batch` under a causal LM, and on request the entropies.

    log π(y_t | x, y_<t) at the temperature in force. The LM head is applied from the shortest prompt's end on, not to
    the whole prompt, where the model's forward takes `logits_to_keep`.

    Returns:
        (log-probs [B, T], entropies [B, T] or None), fp32, nats, 0 on padding.
    """
    start, end = int(batch.prompt_lengths.min()) - 1, batch.input_ids.shape[1] - 1
    kept = torch.arange(start, end, device=batch.input_ids.device)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    if _takes_logits_to_keep(model):
        logits = model(**inputs, logits_to_keep=kept).logits
    else:
        logits = model(**inputs).logits[:, start:end]
    logprobs, entropies = token_logprobs(
        logits, batch.input_ids[:, start + 1 :], temperature=temperature, entropy=entropy
    )
    columns = (batch.positions() - start).clamp(max=end - start - 1)
    mask = batch.mask
    logprobs = torch.where(mask, logprobs.gather(1, columns), 0.0)
    return logprobs, torch.where(mask, entropies.gather(1, columns), 0.0) if entropy else None


def completion_hidden_states(backbone: nn.Module, batch: Completions, *, extra: int = 0) -> torch.Tensor:
    """Last hidden states that precede each completion token, [B, T + extra, hidden].

    With `extra=1` the last column that belongs to a row is the state after its last token, that of a bootstrap value.
    """
    hidden = backbone(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    ).last_hidden_state
    positions = batch.positions(extra)
    return hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))


def _takes_logits_to_keep(model: nn.Module) -> bool:
    inner = model
    while True:
        if "logits_to_keep" in inspect.signature(inner.forward).parameters:
            return True
        wrapped = getattr(inner, "module", None) or (
            inner.get_base_model() if hasattr(inner, "get_base_model") else None
        )
        if wrapped is None or wrapped is inner:
            return False
        inner = wrapped
