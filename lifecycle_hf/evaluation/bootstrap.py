"""Metrics that remember the items they came from, and bootstrap intervals for them and for their differences.

Runs by seed are few and independent: for statistics of them there is the jackknife, and Holm's correction.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
_CELLS = 1 << 22


def first_column(means: np.ndarray) -> np.ndarray:
    """Return the plain mean, the first of the K column means: [..., K] -> [...]."""
    return means[..., 0]


class Measurement(float):
    """Hold a number with the items that it comes from: value = statistic(x̄), x̄ the mean over N items of K columns.

    Means, ratios of sums and ECE are all of that form, so that resamples need no more than weighted means. To
    code that does not know about items it is a float.

    Args:
        items: [N] or [N, K], finite; the same items in the same order where two measurements are to be compared.
        statistic: [..., K] -> [...], vectorised; by default the mean of the first column.

    Raises:
        ValueError: no item, more than two axes, or a value that is not finite.
    """

    def __new__(cls, items, statistic: Callable[[np.ndarray], np.ndarray] = first_column):
        columns = np.asarray(items, dtype=np.float64)
        columns = columns[:, None] if columns.ndim == 1 else columns
        if columns.ndim != 2 or not columns.size or not np.isfinite(columns).all():
            raise ValueError(f"A Measurement needs finite items, [N] or [N, K]; got the shape {columns.shape}.")
        self = super().__new__(cls, statistic(columns.mean(0)))
        self.columns, self.statistic = columns, statistic
        return self

    def __getnewargs__(self):
        return self.columns, self.statistic


def ratio(means: np.ndarray) -> np.ndarray:
    """Return Σa / Σb from the means of the columns (a, b)."""
    return means[..., 0] / means[..., 1]


def exp_ratio(means: np.ndarray) -> np.ndarray:
    """Return exp(Σa / Σb), the perplexity, from the means of the columns (NLL, tokens)."""
    return np.exp(ratio(means))


def bootstrap_interval(
    first: Measurement,
    second: Measurement | None = None,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval (low, high) of `first`, or of the difference `first` − `second`.

    Of two measurements with as many items each, the items are taken for the same ones and resampled together
    (paired); of two with different counts, each by itself. In simulations BCa covered no better.

    Args:
        level: nominal coverage, between 0 and 1.
        resamples: bootstrap samples.

    Raises:
        ValueError: a level outside (0, 1), or a measurement of one item, which shows no spread.

    Reference: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    parts = [first] if second is None else [first, second]
    if not 0 < level < 1 or min(len(part.columns) for part in parts) < 2:
        raise ValueError(f"bootstrap_interval needs 0 < {level=} < 1, and two items or more in a measurement.")
    rng = np.random.default_rng(seed)
    if second is not None and len(first.columns) == len(second.columns):
        means = _resampled_means(np.hstack([first.columns, second.columns]), resamples, rng)
        means = np.split(means, [first.columns.shape[1]], axis=1)
    else:
        means = [_resampled_means(part.columns, resamples, rng) for part in parts]
    draws = np.stack([part.statistic(drawn) for part, drawn in zip(parts, means)])
    low, high = np.quantile(draws[0] if second is None else draws[0] - draws[1], [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


class Difference(NamedTuple):
    """Hold an estimate, the ends of its interval, and the two-sided p-value of the estimate being 0."""

    estimate: float
    low: float
    high: float
    p: float


def jackknife(statistic: Callable[[list[int]], float], n: int, *, level: float = 0.95) -> Difference:
    """Return a statistic of `n` independent runs with the interval of the delete-one jackknife.

    θ̂ ± t(n − 1)·√((n − 1)/n · Σ (θ̂₋ᵢ − θ̄)²), θ̂₋ᵢ without run i and θ̄ their mean. For a mean it is Student's interval.
    If the statistic is not finite without some run, so are the interval and p.

    Args:
        statistic: from the numbers of the runs that count, 0 to n − 1, to a number.

    Raises:
        ValueError: fewer than two runs.

    Reference: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 11.
    """
    from scipy.stats import t as student  # slow to import, and few processes need it

    if n < 2:
        raise ValueError(f"jackknife needs two runs or more, and got {n}.")
    estimate = float(statistic(list(range(n))))
    parts = np.array([statistic([j for j in range(n) if j != i]) for i in range(n)], dtype=float)
    error = math.sqrt((n - 1) / n * np.square(parts - parts.mean()).sum())
    half = student.ppf((1 + level) / 2, n - 1) * error
    p = (
        2 * student.sf(abs(estimate) / error, n - 1)
        if error
        else float(estimate == 0)
        if estimate == estimate
        else math.nan
    )
    return Difference(estimate, float(estimate - half), float(estimate + half), float(p))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values corrected for how many there are: the k-th smallest of m is multiplied by m − k + 1.

    No corrected value is smaller than that of a smaller p, nor above 1. A NaN stays NaN and still counts. Reject below
    0.05, and the chance of one wrong rejection or more is at most 0.05.

    Reference: Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    order, corrected, largest = np.argsort(p_values, kind="stable"), [math.nan] * len(p_values), 0.0
    for rank, i in enumerate(order):
        if p_values[i] == p_values[i]:
            largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
            corrected[i] = largest
    return corrected


def _resampled_means(columns: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Means over N items drawn with replacement, [resamples, K], some millions of draws at a time."""
    n = len(columns)
    parts = []
    for rows in np.diff([*range(0, resamples, max(1, _CELLS // n)), resamples]):
        drawn = rng.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
        parts.append(np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n) @ columns / n)
    return np.concatenate(parts)
