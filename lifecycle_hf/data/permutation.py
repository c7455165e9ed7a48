"""Random numbers and permutations that are pure functions of integers: nothing is stored, and any place can be asked.

Reference: SplitMix64, Steele et al. 2014, https://doi.org/10.1145/2660193.2660195.
"""

import numpy as np

_ROUNDS = 8


def random_integers(*key) -> np.ndarray:
    """Return a random uint64 for each key, a tuple of integers. The parts are arrays [N] or single integers."""
    state = np.zeros(1, dtype=np.uint64)
    for part in key:
        part = part.astype(np.uint64) if isinstance(part, np.ndarray) else np.uint64(int(part) % 2**64)
        state = state + np.uint64(0x9E3779B97F4A7C15) + part
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB
        state = state ^ (state >> 31)
    return state


def uniform(*key) -> np.ndarray:
    """Return a random number from 0 to below 1 for each key; see [`random_integers`]."""
    return (random_integers(*key) >> 11) * 2.0**-53


def permuted(place: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Return where each place from 0 to size − 1 stands in a random permutation of these places, [N] each.

    The permutation depends on (size, key) alone. It is a Feistel network on a grid of width a = ⌈√size⌉ and height
    b = ⌈size / a⌉: in turn, the column moves by a random number that depends on the row, and the row by one that
    depends on the column. A place that leaves 0 … size − 1 is moved again until it is back.

    Reference: Black and Rogaway 2002, "Ciphers with arbitrary finite domains", methods 2 and 3.
    """
    place, size = place.astype(np.uint64), np.broadcast_to(size, place.shape).astype(np.uint64)
    width = np.ceil(np.sqrt(size)).astype(np.uint64)
    height = (size + width - np.uint64(1)) // width
    out, moving = place.copy(), np.arange(len(place))
    while len(moving):
        a, b, keys = width[moving], height[moving], key[moving]
        row, column = np.divmod(out[moving], a)
        for turn in range(_ROUNDS):
            column = (column + random_integers(keys, 2 * turn, row) % a) % a
            row = (row + random_integers(keys, 2 * turn + 1, column) % b) % b
        out[moving] = row * a + column
        moving = moving[out[moving] >= size[moving]]
    return out.astype(np.int64)
