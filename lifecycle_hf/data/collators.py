"""Padding of token lists, masks made from lengths, and permutations made from a seed."""

import torch
from torch.nn.utils.rnn import pad_sequence


def pad_sequences(sequences: list[list[int]], padding_value: int, side: str = "right") -> torch.LongTensor:
    """Return token lists as one tensor [B, L], where L is the length of the longest list.

    Raises:
        ValueError: there is no sequence, or `side` is neither "right" nor "left".
    """
    if not sequences:
        raise ValueError("pad_sequences got no sequence to pad.")
    if side not in ("right", "left"):
        raise ValueError(f"side={side!r}: it must be 'right' or 'left'.")
    rows = [torch.as_tensor(sequence, dtype=torch.long) for sequence in sequences]
    return pad_sequence(rows, batch_first=True, padding_value=padding_value, padding_side=side)


def on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Move a tensor of the host; to CUDA without waiting for what was queued there before."""
    if torch.device(device or "cpu").type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def length_mask(lengths: torch.LongTensor, width: int) -> torch.BoolTensor:
    """Return the mask [B, width] that is true at the first `lengths[b]` positions of row b (right padding)."""
    return torch.arange(width, device=lengths.device)[None, :] < lengths[:, None]


def prompt_lengths(
    labels: torch.LongTensor, attention_mask: torch.Tensor | None = None, position_ids: torch.LongTensor | None = None
) -> torch.LongTensor:
    """Return the number of tokens before the first one with a label (not -100), without padding.

    Args:
        labels, attention_mask: [B, L].
        position_ids: [B, L], used without an `attention_mask`: each document of a packed row starts at position 0.

    Returns:
        [B, D], one number for each of the D documents of a row; D = 1 with an `attention_mask`.
    """
    learnt = labels != -100
    if attention_mask is not None:
        return (attention_mask.bool() & (learnt.cumsum(1) == 0)).sum(1, keepdim=True)
    first = torch.zeros_like(learnt) if position_ids is None else position_ids == 0
    first[:, 0] = True
    documents, places = first.cumsum(1) - 1, torch.arange(labels.shape[1], device=labels.device)
    start = (places * first).cummax(1).values
    before = (learnt.cumsum(1) - learnt.long()).gather(1, start)
    lengths = labels.new_zeros(len(labels), int(documents.max()) + 1)
    return lengths.scatter_add(1, documents, (learnt.cumsum(1) == before).long())


def shuffled(n: int, seed: int) -> list[int]:
    """Return a permutation of range(n) that depends on `seed` alone."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).numpy().tolist()
