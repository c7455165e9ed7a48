"""Permutations and random numbers that are functions of integers."""

from itertools import permutations

import numpy as np
import pytest
from scipy import stats

from lifecycle_hf.data.permutation import permuted, random_integers, uniform

ENOUGH = 0.001  # the chance that a right generator fails a test below; the keys are fixed, so it never does


def test_splitmix64():
    """The generator's first output for state 0 is published: https://prng.di.unimi.it/splitmix64.c."""
    assert random_integers(0)[0] == 0xE220A8397B1DCDAF
    assert random_integers(-1)[0] == random_integers(2**64 - 1)[0]


def test_uniform_numbers():
    """Uniform, and pairs of neighbours and of streams independent: the 100 cells of a grid are equally full."""
    draw = np.arange(100_000)
    first, second = uniform(7, 0, draw), uniform(7, 1, draw)
    assert first.min() >= 0 and first.max() < 1
    for x, y in ((first, second), (first[:-1], first[1:]), (first, uniform(8, 0, draw))):
        cells = np.histogram2d(x, y, bins=10, range=[[0, 1], [0, 1]])[0]
        assert stats.chisquare(cells.ravel()).pvalue > ENOUGH


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 100, 1001, 65536])
def test_every_place_once(size):
    key = random_integers(3, np.zeros(size, dtype=int))
    assert sorted(permuted(np.arange(size), np.array(size), key)) == list(range(size))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_order_is_equally_likely(size):
    keys = random_integers(1, np.arange(20_000))
    orders = np.stack([permuted(np.full(len(keys), i), np.array(size), keys) for i in range(size)], axis=1)
    counts = [int((orders == order).all(1).sum()) for order in permutations(range(size))]
    assert stats.chisquare(counts).pvalue > ENOUGH


def test_places_go_everywhere():
    """Place 0 of 1,000, and the place that follows the image of 0, over 50,000 keys."""
    keys, size = random_integers(2, np.arange(50_000)), np.array(1000)
    first, second = (permuted(np.full(len(keys), i), size, keys) for i in (0, 1))
    assert stats.chisquare(np.bincount(first, minlength=1000)).pvalue > ENOUGH
    assert stats.chisquare(np.bincount((second - first) % 1000, minlength=1000)[1:]).pvalue > ENOUGH


def test_sizes_and_keys_may_differ():
    sizes, keys = np.array([5, 70, 1]), random_integers(np.array([1, 2, 3]))
    together = permuted(np.array([4, 69, 0]), sizes, keys)
    alone = [permuted(np.array([n - 1]), np.array([n]), keys[i : i + 1])[0] for i, n in enumerate(sizes)]
    assert together.tolist() == alone
