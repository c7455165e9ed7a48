"""Restore the text of corrupted rows, to check that inputs and targets hold all of it."""

import numpy as np


def restore(inputs: np.ndarray, targets: np.ndarray, sentinel_ids: np.ndarray) -> np.ndarray:
    """Return the original ids [T] from a denoiser's inputs and targets, without mode token and without sentinels.

    Raises:
        ValueError: the sentinels of inputs and targets differ.
    """
    here, there = np.isin(inputs, sentinel_ids), np.isin(targets, sentinel_ids)
    if not np.array_equal(inputs[here], targets[there]):
        raise ValueError(f"the inputs have the sentinels {inputs[here]}, the targets {targets[there]}: no pair.")
    if not there.any():
        return np.concatenate((inputs, targets))
    holes = np.flatnonzero(here) - np.arange(np.count_nonzero(here))
    lengths = np.diff(np.flatnonzero(there), append=len(targets) - 1) - 1
    return np.insert(inputs[~here], np.repeat(holes, lengths), targets[:-1][~there[:-1]])
