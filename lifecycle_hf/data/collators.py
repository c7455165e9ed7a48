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
