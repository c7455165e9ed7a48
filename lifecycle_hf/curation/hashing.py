"""Hashes of bytes, of numbers, and of ranges of numbers, in 64 bits."""

import hashlib
from functools import lru_cache

import numpy as np

ODD = 0x9E3779B97F4A7C15
_MIX = (30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)


def digest(content: bytes | np.ndarray) -> int:
    """Return the hash of bytes, in [0, 2⁶⁴)."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def mixed(values: np.ndarray) -> np.ndarray:
    """Return the values after splitmix64's last step, in which each bit of a value changes half of all bits."""
    for shift, factor in _MIX:
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(factor)
    return values


def range_hashes(values: np.ndarray, starts: np.ndarray | slice, ends: np.ndarray | slice) -> np.ndarray:
    """Return the hash of values[start:end] for each of the ranges, as uint64.

    It is Σ values[start + i] · ODDⁱ mod 2⁶⁴, mixed, of which prefix sums give all ranges at once. The values must be
    random, such as those of `mixed`.
    """
    powers, inverses = _powers(len(values).bit_length())
    sums = np.zeros(len(values) + 1, dtype=np.uint64)
    np.cumsum(values * powers[: len(values)], out=sums[1:])
    return mixed((sums[ends] - sums[starts]) * inverses[starts])


@lru_cache(maxsize=32)
def _powers(bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ODDⁱ and ODD⁻ⁱ mod 2⁶⁴ for i < 2^bits."""
    return tuple(
        np.cumprod(np.r_[np.ones(1, np.uint64), np.full((1 << bits) - 1, factor, np.uint64)])
        for factor in (ODD, pow(ODD, -1, 1 << 64))
    )
