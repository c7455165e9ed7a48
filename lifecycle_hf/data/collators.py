"""Padding, and masks from lengths."""

import torch


def pad_sequences(
    sequences: list[list[int]], padding_value: int, side: str = "right", pad_to_multiple_of: int | None = None
) -> torch.LongTensor:
    """Token lists as one tensor [B, L], L the longest length (rounded up to `pad_to_multiple_of`).

    Raises:
        ValueError: no sequence, or a `side` that is neither "right" nor "left".
    """
    if not sequences:
        raise ValueError("pad_sequences got no sequence to pad.")
    if side not in ("right", "left"):
        raise ValueError(f"side={side!r}: padding goes to the 'right' or the 'left'.")
    width = max(len(sequence) for sequence in sequences)
    if pad_to_multiple_of:
        width = -(-width // pad_to_multiple_of) * pad_to_multiple_of
    padded = torch.full((len(sequences), width), padding_value, dtype=torch.long)
    for row, sequence in zip(padded, sequences, strict=True):
        start = 0 if side == "right" else width - len(sequence)
        row[start : start + len(sequence)] = torch.as_tensor(sequence, dtype=torch.long)
    return padded


def length_mask(lengths: torch.LongTensor, width: int) -> torch.BoolTensor:
    """Mask [B, width] that is true at the first `lengths[b]` positions of row b (right padding)."""
    return torch.arange(width, device=lengths.device)[None, :] < lengths[:, None]


def prompt_lengths(
    labels: torch.LongTensor, attention_mask: torch.Tensor | None = None, position_ids: torch.LongTensor | None = None
) -> torch.LongTensor:
    """How many tokens of each row stand before the first that is learnt (label not -100), padding left out.

    Args:
        labels, attention_mask: [B, L].
        position_ids: [B, L], without an `attention_mask`: each document of a packed row starts at position 0.

    Returns:
        [B, D], a number for each document; D = 1 with an `attention_mask`.
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
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
