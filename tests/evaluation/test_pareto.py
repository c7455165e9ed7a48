import numpy as np
import pytest

from lifecycle_hf.evaluation.pareto import capability_at, hypervolume, pareto_front

# (3, 1) and (1, 3) and (2, 2) are beaten by none; (2, 1) by (3, 1), (1, 2) by (1, 3), (0, 0) by all.
POINTS = [(2, 1), (3, 1), (1, 3), (0, 0), (2, 2), (1, 2)]


def test_front_by_hand():
    assert pareto_front(POINTS) == [2, 4, 1]
    assert pareto_front([(1, 1), (1, 1)]) == [0, 1] and pareto_front([]) == []


def test_hypervolume_by_hand():
    """Against (0, 0): 1·3 up to alignment 1, 1·2 up to 2, 1·1 up to 3. Against (1, 1): the square of (2, 2)."""
    assert hypervolume(POINTS, (0, 0)) == 6 and hypervolume(POINTS, (1, 1)) == 1
    assert hypervolume(POINTS, (3, 0)) == 0 and hypervolume([], (0, 0)) == 0
    assert hypervolume([(0.5, -2.0), (0.75, -4.0)], (0.25, -5.0)) == pytest.approx(0.25 * 3 + 0.25 * 1)


def test_capability_at_by_hand():
    """The front is (1, 3), (2, 2), (3, 1): a quarter of the way from the second to the third costs a quarter of 1."""
    assert capability_at(POINTS, 2.25) == 1.75 and capability_at(POINTS, 3) == 1
    assert capability_at(POINTS, 0.5) == 3
    assert np.isnan(capability_at(POINTS, 3.01)) and np.isnan(capability_at([], 0))


def test_against_counting_and_pairwise_comparison():
    rng = np.random.default_rng(0)
    points = rng.random((40, 2)).round(1)
    front = [i for i, p in enumerate(points) if not any((q >= p).all() and (q > p).any() for q in points)]
    assert sorted(pareto_front(points)) == front
    grid = rng.random((100_000, 2))
    share = (grid[:, None] <= points[front]).all(-1).any(1).mean()
    assert hypervolume(points, (0, 0)) == pytest.approx(share, abs=0.01)


def test_points_that_are_none():
    with pytest.raises(ValueError, match="finite pairs"):
        pareto_front([(1.0, float("nan"))])
