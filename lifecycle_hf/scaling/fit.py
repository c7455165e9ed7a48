"""The fit of Hoffmann et al., approach 3: a robust loss on log L, minimised from thousands of starts at once."""

import math
from itertools import product

import numpy as np

from lifecycle_hf.scaling.law import ScalingLaw

LOGS, EXPONENTS = (0, 5, 10, 15, 20, 25), (0, 0.5, 1, 1.5, 2)
GRID = np.array(list(product((-1, -0.5, 0, 0.5, 1), LOGS, LOGS, EXPONENTS, EXPONENTS)), dtype=float)
"""Hoffmann et al.'s 4500 starts: log E, log A, log B, α, β."""
FEWEST = 8
LARGEST_EXP = 300.0


def fit_scaling_law(
    parameters, tokens, losses, *, delta: float = 1e-3, bootstrap: int = 1000, seed: int = 0, starts=GRID
) -> ScalingLaw:
    """Fit L(N, D) = E + A/N^α + B/D^β to runs (Eq. 2, approach 3 of Hoffmann et al. 2022, arXiv 2203.15556).

    min over a, b, e, α, β of Σ Huber_δ(LSE(a − α·log N, b − β·log D, e) − log L), A = e^a, B = e^b, E = e^e (Eq. 11).
    A sum, and a stop by relative progress: a mean, stopped where it was small, spoilt the published constants
    (Besiroglu et al. 2024, arXiv 2404.10102). BFGS from every start, all at once; the best end is kept. Each resample
    of the points starts from there and from its own two best points of the grid.

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

    ends, values = _minimise(starts, z, y, np.ones((1, len(y))), np.zeros(len(starts), dtype=int), delta)
    best = ends[values.argmin()]
    law, error = _constants(best @ back), math.sqrt(np.mean(_residuals(best[None], z, y)[0] ** 2))
    for value, name, what in ((law[3], "alpha", "parameters"), (law[4], "beta", "tokens")):
        if value <= 0:
            raise ValueError(f"fit_scaling_law: {name}={value:.3g}, the loss of these runs does not fall with {what}.")
    samples = _resample(best, starts, z, y, delta, bootstrap, seed) @ back if bootstrap else np.empty((0, 5))
    return ScalingLaw(*map(float, law), points=len(y), error=error, samples=_constants(samples))


def _resample(best, starts, x, y, delta, count, seed):
    """[count, 5], θ fitted to resamples of the points; a resample is a row of weights."""
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(y), np.full(len(y), 1 / len(y)), size=count).astype(float)
    near = np.argsort(_huber(_residuals(starts, x, y), delta) @ weights.T, axis=0)[:2].T
    tries = np.concatenate([np.broadcast_to(best, (count, 1, 5)), starts[near]], axis=1)
    each = tries.shape[1]
    ends, values = _minimise(tries.reshape(-1, 5), x, y, weights, np.arange(count).repeat(each), delta)
    return ends.reshape(-1, each, 5)[np.arange(count), values.reshape(-1, each).argmin(axis=1)]


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


def _minimise(starts, x, y, weights, weight_of, delta, rows=512):
    """BFGS from each start on the objective with its row of `weights`; a few hundred starts fill the cache."""
    ends = []
    for first in range(0, len(starts), rows):
        own = weights[weight_of[first : first + rows]] if len(weights) > 1 else None

        def function(theta, index, own=own):
            return objective(theta, x, y, weights if own is None else own[index], delta)

        ends.append(_bfgs(starts[first : first + rows], function, nothing=1e-10 * delta**2))
    return [np.concatenate(parts) for parts in zip(*ends)]


def _bfgs(theta, function, nothing, iterations=500, progress=1e-10, longest=5.0):
    """Minimise `function(theta, rows)` row by row; returns the ends and their values.

    H ← (I − ρsyᵀ)H(I − ρysᵀ) + ρssᵀ, ρ = 1/sᵀy (Nocedal & Wright, Eq. 6.17): of five unknowns L-BFGS keeps as much. A
    row stops when a step wins less than `progress` of its value, or `nothing`; `longest` bounds a coordinate's step.
    """
    theta, active = theta.copy(), np.arange(len(theta))
    value, gradient = function(theta, active)
    inverse = np.zeros((len(theta), 5, 5)) + np.eye(5)
    for iteration in range(iterations):
        if not len(active):
            break
        old, before = theta[active], (value[active], gradient[active])
        step = -np.einsum("rij,rj->ri", inverse[active], before[1])
        uphill = np.einsum("ri,ri->r", step, before[1]) >= 0
        inverse[active[uphill]], step[uphill] = np.eye(5), -before[1][uphill]
        step *= np.minimum(1, longest / np.maximum(np.abs(step).max(axis=1, keepdims=True), 1e-300))
        theta[active], value[active], gradient[active] = _line_search(old, step, *before, active, function)
        s, y = theta[active] - old, gradient[active] - before[1]
        curvature = np.einsum("ri,ri->r", s, y)
        kept = curvature > 1e-300
        rows, s, y, rho = active[kept], s[kept], y[kept], 1 / curvature[kept]
        if iteration == 0:
            inverse[rows] *= (1 / (rho * np.einsum("ri,ri->r", y, y)))[:, None, None]
        hy = np.einsum("rij,rj->ri", inverse[rows], y)
        cross = hy[:, :, None] * s[:, None]
        both = (rho * (1 + rho * np.einsum("ri,ri->r", y, hy)))[:, None, None] * s[:, :, None] * s[:, None]
        inverse[rows] += both - rho[:, None, None] * (cross + cross.transpose(0, 2, 1))
        active = active[before[0] - value[active] > np.maximum(progress * value[active], nothing)]
    return theta, value


def _line_search(theta, step, value, gradient, rows, function, tries=25):
    """(theta, value, gradient) after a step of weak-Wolfe length, found by bisection: safe where Huber's curvature
    jumps (Lewis & Overton 2013, Algorithm 2.6)."""
    slope = np.einsum("ri,ri->r", step, gradient)
    length, low, high = np.ones(len(theta)), np.zeros(len(theta)), np.full(len(theta), np.inf)
    new, todo = (theta.copy(), value.copy(), gradient.copy()), np.arange(len(theta))
    for _ in range(tries):
        tried = theta[todo] + length[todo, None] * step[todo]
        f, g = function(tried, rows[todo])
        falls = f <= value[todo] + 1e-4 * length[todo] * slope[todo]
        flat = np.einsum("ri,ri->r", g, step[todo]) >= 0.9 * slope[todo]
        for stored, found in zip(new, (tried, f, g)):
            stored[todo[falls]] = found[falls]
        short, long = todo[falls & ~flat], todo[~falls]
        low[short], high[long] = length[short], length[long]
        todo = todo[~(falls & flat)]
        if not len(todo):
            break
        length[todo] = np.where(np.isinf(high[todo]), 2 * low[todo], (low[todo] + high[todo]) / 2)
    return new
