"""The fit of Hoffmann et al., approach 3: a robust loss on log L, minimised from the best of thousands of starts."""

import math
from itertools import product

import numpy as np

from lifecycle_hf.scaling.law import ScalingLaw

LOGS, EXPONENTS = (0, 5, 10, 15, 20, 25), (0, 0.5, 1, 1.5, 2)
GRID = np.array(list(product((-1, -0.5, 0, 0.5, 1), LOGS, LOGS, EXPONENTS, EXPONENTS)), dtype=float)
"""Hoffmann et al.'s 4500 starts: log E, log A, log B, α, β."""
FEWEST = 8
LARGEST_EXP = 300.0
TRIED = 20
"""Starts that are tried: those of least loss."""


def fit_scaling_law(
    parameters, tokens, losses, *, delta: float = 1e-3, bootstrap: int = 1000, seed: int = 0, starts=GRID
) -> ScalingLaw:
    """Fit L(N, D) = E + A/N^α + B/D^β to runs (Eq. 2, approach 3 of Hoffmann et al. 2022, arXiv 2203.15556).

    min over a, b, e, α, β of Σ Huber_δ(LSE(a − α·log N, b − β·log D, e) − log L), A = e^a, B = e^b, E = e^e (Eq. 11).
    It is a sum, divided by δ²: a mean, stopped where it was small, spoilt the published constants (Besiroglu et al.
    2024, arXiv 2404.10102). BFGS runs from the 20 starts of least loss, and the best end is kept. Each resample of the
    points starts from there.

    Args:
        parameters, tokens, losses: N, D and final loss in nats per token of each run.
        delta: residuals of log L beyond it count linearly.
        bootstrap: resamples behind the intervals; 0 for none.
        starts: [starts, 5], log E, log A, log B, α, β.

    Raises:
        ValueError: too few points, a value that is not positive and finite, points that can't tell the constants
            apart, or a loss that does not fall with parameters or tokens.
    """
    points = _checked(parameters, tokens, losses)
    x, y = np.log(points[:2]), np.log(points[2])
    mean, spread = x.mean(axis=1), x.std(axis=1)
    # Log N and log D far from 0 tie log A to α and log B to β; around their means the five are nearly independent.
    standard = np.eye(5)
    standard[[3, 4], [1, 2]], standard[[3, 4], [3, 4]] = -mean, spread
    back, z, starts = np.linalg.inv(standard), (x - mean[:, None]) / spread[:, None], np.asarray(starts) @ standard

    best = _minimised(starts[np.argsort(_losses(starts, z, y, delta).sum(1))[:TRIED]], z, y, np.ones(len(y)), delta)
    law, error = _constants(best @ back), math.sqrt(np.mean(_residuals(best[None], z, y)[0] ** 2))
    for value, name, what in ((law[3], "alpha", "parameters"), (law[4], "beta", "tokens")):
        if value <= 0:
            raise ValueError(f"fit_scaling_law: {name}={value:.3g}, the loss of these runs does not fall with {what}.")
    samples = _resample(best, z, y, delta, bootstrap, seed) @ back if bootstrap else np.empty((0, 5))
    return ScalingLaw(*map(float, law), points=len(y), error=error, samples=_constants(samples))


def _resample(best, x, y, delta, count, seed):
    """[count, 5], θ fitted to resamples of the points; a resample is a row of weights."""
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(y), np.full(len(y), 1 / len(y)), size=count).astype(float)
    return np.stack([_minimised([best], x, y, own, delta) for own in weights])


def _minimised(starts, x, y, weights, delta):
    """The θ of least loss that BFGS finds from `starts`."""

    from scipy.optimize import minimize  # only those who fit a law need it

    def scaled(theta):
        value, gradient = objective(theta[None], x, y, weights[None], delta)
        return value[0] / delta**2, gradient[0] / delta**2

    with np.errstate(all="ignore"):  # a line search may try any step
        ends = [minimize(scaled, start, jac=True, method="BFGS", options={"gtol": 1e-6}) for start in starts]
    return min(ends, key=lambda end: end.fun).x


def _checked(parameters, tokens, losses) -> np.ndarray:
    """[3, points] of numbers that a fit can use."""
    columns = {"parameters": parameters, "tokens": tokens, "losses": losses}
    columns = {name: np.asarray(values, dtype=float).ravel() for name, values in columns.items()}
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"fit_scaling_law: a run has one of each, but the lengths are {lengths}.")
    for name, values in columns.items():
        for index in np.flatnonzero(~(np.isfinite(values) & (values > 0)))[:1]:
            raise ValueError(f"fit_scaling_law: {name}[{index}] is {values[index]}; it must be positive and finite.")
    if lengths["losses"] < FEWEST:
        raise ValueError(f"fit_scaling_law: {lengths['losses']} points for 5 constants; {FEWEST} are the fewest.")
    for name, exponent in (("parameters", "alpha"), ("tokens", "beta")):
        different = len(np.unique(columns[name]))
        if different < 3:
            many = f"all {name} are equal" if different == 1 else f"there are only 2 different {name}"
            raise ValueError(f"fit_scaling_law: {many}, so {exponent} is not identifiable; 3 are the fewest.")
    if np.ptp(np.log(columns["tokens"] / columns["parameters"])) < 1e-3:
        raise ValueError("fit_scaling_law: tokens per parameter are all equal: alpha and beta can't be told apart.")
    return np.stack(list(columns.values()))


def _constants(theta):
    return np.concatenate([np.exp(np.minimum(theta[..., :3], LARGEST_EXP)), theta[..., 3:]], axis=-1)


def _residuals(theta, x, y):
    return np.log(sum(_terms(theta, x))) - y


def _losses(theta, x, y, delta):
    """Huber's loss of every point, [rows, points]."""
    return _huber(_residuals(theta, x, y), delta)


def _terms(theta, x):
    """E, A/N^α and B/D^β, [rows, points] each; exp is capped, as a line search may try any step."""
    e, a, b, alpha, beta = theta.T[..., None]
    return [np.exp(np.minimum(t, LARGEST_EXP)) for t in (e + 0 * x[:1], a - alpha * x[0], b - beta * x[1])]


def _huber(residuals, delta):
    """½r² up to |r| = δ, δ(|r| − ½δ) beyond."""
    clipped = np.clip(residuals, -delta, delta)
    return clipped * (residuals - clipped / 2)


def objective(theta, x, y, weights, delta):
    """Σ_i w_i·Huber_δ(LSE(a − α·x₁ᵢ, b − β·x₂ᵢ, e) − y_i) and its gradient, for many θ at once (Eq. 11).

    Args:
        theta: [rows, 5], e, a, b, α, β.
        x: [2, points], log N and log D.
        y: [points], log L.
        weights: [rows or 1, points].

    Returns ([rows], [rows, 5]).
    """
    terms = _terms(theta, x)
    total = sum(terms)
    residuals = np.log(total) - y
    slope = weights * np.clip(residuals, -delta, delta) / total
    e, a, b = (slope * term for term in terms)
    gradient = np.stack([e.sum(axis=1), a.sum(axis=1), b.sum(axis=1), -(a @ x[0]), -(b @ x[1])], axis=1)
    return (weights * _huber(residuals, delta)).sum(axis=1), gradient
