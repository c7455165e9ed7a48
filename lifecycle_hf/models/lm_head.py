"""Compute log-probs from the LM head chunk by chunk, so that the logits of all tokens never exist at once."""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lifecycle_hf.models.loading import is_sharded

CHUNK_LOGITS = {"cpu": 2**24, "cuda": 2**26}
"""Number of logits that exist at one time, by device type."""


def token_logprobs(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    entropy_gradient: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return log-probs of `tokens` under softmax(logits / temperature) and, on request, entropies, in fp32 and nats.

    The log-probs are `log_softmax(logits.float() / temperature, -1).gather(-1, tokens[..., None])[..., 0]`.

    Args:
        logits: [..., V].
        tokens: [...], int64.
        entropy: whether to compute the entropies.
        entropy_gradient: whether the entropies have a gradient; a metric does not need one.

    Returns:
        (log-probs [...], entropies [...] or None).
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits = logits if temperature == 1.0 else logits / temperature
    log_normaliser = logits.logsumexp(-1)
    logprobs = logits.gather(-1, tokens[..., None])[..., 0] - log_normaliser
    if not entropy:
        return logprobs, None
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        table = logits - log_normaliser[..., None]  # subtract first: large logits would magnify rounding
        return logprobs, -(table.exp() * table).sum(-1)


def head_logprobs(
    base: nn.Module | None,
    states: torch.Tensor,
    tokens: torch.Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    entropy_gradient: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return [`token_logprobs`] of the last hidden states, by chunks; the backward pass computes the logits again.

    Args:
        base: causal LM with the head to use; None if `states` are logits already.
        states: [M, H].
        tokens: [M].

    Returns:
        (log-probs [M], entropies [M] or None).
    """
    vocab_size = states.shape[-1] if base is None else base.config.get_text_config().vocab_size
    size = max(1, CHUNK_LOGITS.get(states.device.type, 2**26) // vocab_size)
    sharded = base is not None and is_sharded(base)
    if base is not None and _is_plain(base) and not sharded and not entropy_gradient:
        weight = base.get_output_embeddings().weight
        keep = torch.is_grad_enabled()
        logprobs, entropies = LinearLogProbs.apply(states, weight, tokens, temperature, entropy, size, keep)
        return logprobs, entropies if entropy else None
    options = {"temperature": temperature, "entropy": entropy, "entropy_gradient": entropy_gradient}
    return _chunked(nn.Identity() if base is None else read_head(base), size, states, tokens, sharded, **options)


def _scaling(base: nn.Module) -> tuple[float, float | None]:
    """Return the factor of the logits in the config, and the soft cap that is applied after it (or None)."""
    config = base.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    return scale, getattr(config, "final_logit_softcapping", None)


def read_head(base: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the function from hidden states to logits: the output embeddings, then the scaling of the config."""
    head, (scale, cap) = base.get_output_embeddings(), _scaling(base)

    def read(hidden):
        logits = head(hidden)
        logits = logits if scale == 1 else logits * scale
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return read


def _is_plain(base: nn.Module) -> bool:
    """Return whether the head is one matrix product without bias, scale or cap."""
    head = base.get_output_embeddings()
    return type(head) is nn.Linear and head.bias is None and _scaling(base) == (1, None)


def product(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return `states @ weight`; of half precision on CUDA in fp32 at once, without a copy in half precision."""
    if states.is_cuda and states.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(states, weight, out_dtype=torch.float32)
    return states @ weight


class LinearLogProbs(torch.autograd.Function):
    """Compute `token_logprobs(states @ weight.T, tokens)` by chunks; the backward pass computes the logits again.

    The result is that of [`_chunked`] with a plain head. Each chunk is changed in place, and the weight's gradient is
    summed in one buffer. The last chunk is kept for the backward pass, which needs the memory of one chunk anyway.
    The entropies have no gradient.
    """

    @staticmethod
    def forward(ctx, states, weight, tokens, temperature, entropy, size, keep=True):
        device = states.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
        ctx.temperature, ctx.size = temperature, size
        normalisers, logprobs, entropies = [], [], []
        cast = weight.to(ctx.dtype)
        for part, wanted in zip(states.split(size), tokens.split(size), strict=True):
            logits = LinearLogProbs.logits(ctx, part, cast)
            normalisers.append(logits.logsumexp(-1))
            table = logits.sub_(normalisers[-1][:, None])
            logprobs.append(table.gather(-1, wanted[:, None])[:, 0])
            if entropy:
                entropies.append(-table.exp().mul_(table).sum(-1))
        logprobs = torch.cat(logprobs)
        ctx.save_for_backward(states, weight, tokens, torch.cat(normalisers), table if keep else None)
        entropies = torch.cat(entropies) if entropy else logprobs.new_empty(0)
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def logits(ctx, states, weight):
        """Return logits [rows, V] divided by the temperature, in fp32 (fp64 for fp64 states)."""
        with torch.autocast(states.device.type, enabled=False):
            logits = product(states.to(ctx.dtype), weight.T)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits if ctx.temperature == 1.0 else logits.div_(ctx.temperature)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient, _):
        states, weight, tokens, normalisers, last = ctx.saved_tensors
        cast, for_weight = weight.to(ctx.dtype), None
        for_states = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        if ctx.needs_input_grad[1]:
            for_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        upstream = gradient[:, None] / ctx.temperature
        for start in range(0, len(states), ctx.size):
            rows = slice(start, start + ctx.size)
            # d log p(y) / d logits = 1[y] − softmax(logits)
            if start + ctx.size >= len(states):
                table = last.exp()
            else:
                table = LinearLogProbs.logits(ctx, states[rows], cast).sub_(normalisers[rows, None]).exp_()
            table = table.mul_(-upstream[rows]).scatter_add_(1, tokens[rows, None], upstream[rows]).to(ctx.dtype)
            if for_states is not None:
                for_states[rows] = (table @ cast).to(states.dtype)
            if for_weight is not None and for_weight.dtype == ctx.dtype:
                for_weight.addmm_(table.T, states[rows].to(ctx.dtype))
            elif for_weight is not None:
                for_weight += table.T @ states[rows].to(ctx.dtype)
        return for_states, None if for_weight is None else for_weight.to(weight.dtype), None, None, None, None, None


def _chunked(read, size: int, states: torch.Tensor, tokens: torch.Tensor, sharded: bool, **options):
    """Return [`token_logprobs`] of read(states) [M, V], `size` rows at a time, also in the backward pass."""

    def score(states, tokens):
        return token_logprobs(read(states), tokens, **options)

    chunks = -(-len(states) // size)
    if sharded:  # each call gathers the weight from all ranks, so all need the same number of calls
        most = torch.tensor(chunks, device=states.device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        chunks = int(most)
    parts = []
    for part in zip(states.tensor_split(chunks), tokens.tensor_split(chunks), strict=True):
        keep = torch.is_grad_enabled()
        parts.append(checkpoint(score, *part, use_reentrant=False, preserve_rng_state=False) if keep else score(*part))
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies) if options["entropy"] else None
