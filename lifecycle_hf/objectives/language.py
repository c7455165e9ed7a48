"""Language-modelling losses: negative log-likelihoods per token, not reduced."""

import torch
from torch.nn.functional import cross_entropy


def causal_lm_loss(logits: torch.Tensor, labels: torch.LongTensor) -> torch.Tensor:
    """Return −log p(x_t | x_<t) for every token.

    The loss of a batch is the sum of these, divided by the number of labels that are not -100 from the second column
    on, over all micro-batches and ranks. Objectives whose targets are tokens of the row itself use the same loss: a
    prefix LM, or span corruption in a decoder, has -100 for the tokens that it does not predict.

    Args:
        logits: [B, T, V]; those at position t predict token t + 1.
        labels: [B, T], the row's tokens; -100 for tokens that are not predicted.

    Returns:
        [B, T - 1] in fp32, nats; 0 where the label is -100.
    """
    return _nll(logits[:, :-1], labels[:, 1:])


def masked_lm_loss(logits: torch.Tensor, labels: torch.LongTensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Return −log p(x_t | corrupted x) at the masked positions.

    It is also the loss of a decoder whose inputs are already shifted (T5). With label smoothing ε it is
    −(1 − ε)·log p(x_t | …) − ε/V·Σ_v log p(v | …), https://arxiv.org/abs/1512.00567, §7.

    Args:
        logits: [B, T, V]; those at position t predict the label at t.
        labels: [B, T]; -100 for positions that are not predicted.
        label_smoothing: ε, in [0, 1).

    Returns:
        [B, T] in fp32, nats; 0 where the label is -100.

    Reference: BERT, https://arxiv.org/abs/1810.04805, §3.1.
    """
    return _nll(logits, labels, label_smoothing)


def _nll(logits: torch.Tensor, labels: torch.LongTensor, label_smoothing: float = 0.0) -> torch.Tensor:
    options = {"ignore_index": -100, "reduction": "none", "label_smoothing": label_smoothing}
    flat = cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), **options)
    return flat.view(labels.shape)
