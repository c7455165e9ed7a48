"""Objectives for single labelled answers: each completion has one log-ratio, one label and one loss, [batch B].

h = log π(y|x) − log π_ref(y|x) is the log-ratio of a completion, summed over its tokens. Inputs with fewer than 32
bits are converted to fp32; float64 stays float64.
"""

import torch


def kto_loss(
    logratios: torch.Tensor,
    labels: torch.Tensor,
    reference_point: torch.Tensor | float,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> torch.Tensor:
    """Return the Kahneman-Tversky loss.

    It is λ_D·(1 − σ(β(h − z₀))) for a desirable answer, and λ_U·(1 − σ(β(z₀ − h))) for an undesirable one. λ_U > λ_D
    is loss aversion: a bad answer above the reference point costs more than a good one at the same distance below it.

    Args:
        logratios: h, [B], nats.
        labels: [B], true on desirable answers.
        reference_point: z₀, one number for the batch, nats, from [`kto_reference_point`]; it gets no gradient.
        beta: β, how fast the value of an answer saturates with its distance from z₀.
        desirable_weight, undesirable_weight: λ_D and λ_U; [`class_balance`] computes the ratio of the two classes.

    Returns:
        [B], in [0, λ].

    Reference: KTO, https://arxiv.org/abs/2402.01306, Eq. 7.
    """
    logratios, labels = logratios.to(torch.promote_types(logratios.dtype, torch.float32)), labels.bool()
    z0 = torch.as_tensor(reference_point, dtype=logratios.dtype, device=logratios.device).detach()
    desirable = desirable_weight * torch.sigmoid(beta * (z0 - logratios))
    undesirable = undesirable_weight * torch.sigmoid(beta * (logratios - z0))
    return torch.where(labels, desirable, undesirable)


def kto_reference_point(total: torch.Tensor | float, count: torch.Tensor | int) -> torch.Tensor:
    """Return the reference point z₀ = max(0, total / count), an estimate of KL(π‖π_ref); 0 if `count` is 0.

    A mismatched log-ratio is that of an answer after the prompt of another example.

    Args:
        total: sum of the mismatched log-ratios of *all* ranks, nats.
        count: number of them.

    Returns:
        0-dim, nats.

    Reference: KTO, https://arxiv.org/abs/2402.01306, the estimate ẑ₀ below the loss.
    """
    total, count = torch.as_tensor(total), torch.as_tensor(count)
    total = total.to(torch.promote_types(total.dtype, torch.float32))
    return torch.where(count > 0, total / count.clamp(min=1), 0.0).clamp(min=0)


def class_balance(
    desirable: float, undesirable: float, *, desirable_weight: float, undesirable_weight: float
) -> float:
    """Return the weight of the desirable class over that of the other: λ_D·n_D / (λ_U·n_U); [1, 4/3] is recommended.

    Args:
        desirable, undesirable: n_D and n_U, numbers of examples.
        desirable_weight, undesirable_weight: λ_D and λ_U.

    Returns:
        The ratio: inf if λ_U·n_U is 0, and 0 if only λ_D·n_D is 0.

    Reference: KTO, https://arxiv.org/abs/2402.01306, Eq. 8.
    """
    weight = undesirable_weight * undesirable
    return desirable_weight * desirable / weight if weight else float("inf")
