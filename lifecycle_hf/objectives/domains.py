"""What DoReMi learns the weights of domains by: clipped excess losses, and the step of the weights.

Reference: Xie et al., https://arxiv.org/abs/2305.10429, algorithm 1.
"""

import torch


def domain_sums(values: torch.Tensor, mask: torch.Tensor, domains: torch.LongTensor, count: int) -> torch.Tensor:
    """Return for each domain the sum of `values` where the mask is true, and the number of these entries.

    Args:
        values, mask: [B, T].
        domains: [B], the domain of each row, from 0 to count − 1.

    Returns:
        [count, 2] in fp64.
    """
    rows = torch.stack([(values.double() * mask).sum(1), mask.double().sum(1)], 1)
    return rows.new_zeros(count, 2).index_add_(0, domains, rows)


def excess_loss(
    nll: torch.Tensor, reference_nll: torch.Tensor, mask: torch.Tensor, domains: torch.LongTensor, count: int
) -> torch.Tensor:
    """Return for each domain the sum of max(ℓ_proxy − ℓ_ref, 0) over its tokens, and the number of its tokens.

    The excess loss of domain k is λ_k = sum / number. Sums and numbers of all micro-batches and ranks are added before
    they are divided.

    Args:
        nll, reference_nll, mask: [B, T]; −log p of each token under the proxy and the reference, in nats, and whether
            the token is predicted.
        domains: [B], the domain of each row, from 0 to count − 1.

    Returns:
        [count, 2] in fp64.
    """
    return domain_sums((nll - reference_nll).clamp(min=0), mask, domains, count)


def doremi_weights(
    weights: torch.Tensor, excess: torch.Tensor, *, step_size: float = 1.0, smoothing: float = 1e-3
) -> torch.Tensor:
    """Return the weights of K domains after a step: w_k·exp(η·λ_k), normalised to u, then (1 − c)·u + c / K.

    Args:
        weights: [K], w, with sum 1.
        excess: [K], λ, nats per token.
        step_size: η.
        smoothing: c.
    """
    return (1 - smoothing) * (weights.log() + step_size * excess).softmax(0) + smoothing / len(weights)
