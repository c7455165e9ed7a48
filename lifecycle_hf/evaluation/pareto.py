"""The Pareto front of runs by alignment and capability, its hypervolume, and what it costs at equal alignment."""

import math
from collections.abc import Sequence

import numpy as np


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return indices of the non-dominated points (alignment, capability), higher is better, by alignment ascending.

    A point is dominated by one that is at least as good in both and better in one; equal points stand together.

    Raises:
        ValueError: not [N, 2], or not finite.
    """
    points = _checked(points)
    at_least, better = ((points[:, None] >= points).all(-1), (points[:, None] > points).any(-1))
    front = np.flatnonzero(~(at_least & better).any(0))
    return front[np.lexsort((front, points[front, 0]))].tolist()


def hypervolume(points: Sequence[tuple[float, float]], reference: tuple[float, float]) -> float:
    """Return the area between the reference point and the front of the points (alignment, capability).

    Raises:
        ValueError: as `pareto_front`.

    Reference: Zitzler and Thiele 1998, "Multiobjective optimization using evolutionary algorithms".
    """
    points = _checked(points)
    front = points[pareto_front(points)] if len(points) else points
    area, reached = 0.0, reference[0]
    for alignment, capability in front:
        area += max(alignment - reached, 0.0) * max(capability - reference[1], 0.0)
        reached = max(reached, alignment)
    return float(area)


def capability_at(points: Sequence[tuple[float, float]], alignment: float) -> float:
    """Return the capability of the front of the points (alignment, capability) at a given alignment.

    Between two neighbours on the front it is interpolated linearly. Below the first it is that of the first, and NaN
    above the last, which no point reaches. So runs can be compared by what they cost at equal alignment.

    Raises:
        ValueError: as `pareto_front`.
    """
    points = _checked(points)
    front = points[pareto_front(points)]
    if not len(front) or alignment > front[-1, 0]:
        return math.nan
    return float(np.interp(alignment, *front.T))


def _checked(points):
    points = np.asarray(points, dtype=float).reshape(-1, 2) if len(points) == 0 else np.asarray(points, dtype=float)
    if points.ndim != 2 or points.shape[1] != 2 or not np.isfinite(points).all():
        raise ValueError(f"points must be finite pairs (alignment, capability); got the shape {points.shape}.")
    return points
