"""Objectives for preference pairs: their inputs have one number per completion, their losses one per pair, [batch B].

h = log π(y|x) − log π_ref(y|x) is the log-ratio of a completion; w is the preferred answer, l the other one. Inputs
with fewer than 32 bits are converted to fp32; float64 stays float64.
"""

import torch
from torch.nn.functional import logsigmoid


def _at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def dpo_loss(
    chosen_logratios: torch.Tensor,
    rejected_logratios: torch.Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Return the loss of direct preference optimisation: −(1−ε)·log σ(βΔ) − ε·log σ(−βΔ), Δ = h_w − h_l.

    Args:
        chosen_logratios, rejected_logratios: h_w and h_l, [B], nats, summed over the tokens of the completion.
        beta: β, the KL coefficient of the problem that DPO solves.
        label_smoothing: ε, the probability that a label is wrong; 0 is DPO, more is conservative DPO.

    Returns:
        [B], nats.

    Reference: DPO, https://arxiv.org/abs/2305.18290, Eq. 7; ε as in Mitchell, "A note on DPO with noisy preferences
    & relationship to IPO" (2023).
    """
    logits = beta * (_at_least_fp32(chosen_logratios) - _at_least_fp32(rejected_logratios))
    return -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)


def ipo_loss(chosen_logratios: torch.Tensor, rejected_logratios: torch.Tensor, *, tau: float = 0.1) -> torch.Tensor:
    """Return the loss of identity preference optimisation: (h_w − h_l − 1/(2τ))².

    h has no factor β: with β·h instead of h and τ = β, the optimum would move from 1/(2β) to 1/(2β²).

    Args:
        chosen_logratios, rejected_logratios: h_w and h_l, [B], nats. The paper writes the log-ratio of the whole
            completion; its authors average over the tokens, and so does the trainer by default (`length_normalize`).
        tau: τ; the loss is 0 where h_w − h_l = 1/(2τ).

    Returns:
        [B], nats².

    Reference: https://arxiv.org/abs/2310.12036, Eq. 17.
    """
    return (_at_least_fp32(chosen_logratios) - _at_least_fp32(rejected_logratios) - 1 / (2 * tau)).square()


def log_odds(mean_logps: torch.Tensor) -> torch.Tensor:
    """Return the log odds of a completion whose mean log-probability per token is p̄: p̄ − log(1 − e^p̄).

    p̄ is clamped to at most −1e-8: the odds of a certain completion are infinite, and rounding can put p̄ above 0.
    Above the clamp the log odds are 18.4 and the gradient is 0; below it the gradient 1/(1 − e^p̄) is at most 1e8.

    Args:
        mean_logps: p̄, any shape, nats per token.

    Returns:
        Shape of `mean_logps`, fp32 or float64.

    Reference: ORPO, https://arxiv.org/abs/2403.07691, Eq. 4.
    """
    mean_logps = _at_least_fp32(mean_logps).clamp(max=-1e-8)
    return mean_logps - torch.log(-torch.expm1(mean_logps))


def orpo_loss(
    chosen_nll: torch.Tensor,
    chosen_mean_logps: torch.Tensor,
    rejected_mean_logps: torch.Tensor,
    *,
    lambda_or: float = 0.1,
) -> torch.Tensor:
    """Return the loss of odds-ratio preference optimisation: NLL(y_w) − λ·log σ(log odds(y_w) − log odds(y_l)).

    Args:
        chosen_nll: NLL(y_w), [B], nats per token.
        chosen_mean_logps, rejected_mean_logps: p̄ of y_w and y_l as in [`log_odds`], [B], nats per token.
        lambda_or: λ.

    Returns:
        [B], nats.

    Reference: https://arxiv.org/abs/2403.07691, Eqs. 6 and 7.
    """
    ratio = log_odds(chosen_mean_logps) - log_odds(rejected_mean_logps)
    return _at_least_fp32(chosen_nll) - lambda_or * logsigmoid(ratio)
