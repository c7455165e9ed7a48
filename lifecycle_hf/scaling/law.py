"""The scaling law of Hoffmann et al.: exponents, the best use of a budget, the runs to train."""

import math
from dataclasses import asdict, dataclass, field

import numpy as np

from lifecycle_hf.scaling.tables import markdown_table, terminal_table

CONSTANTS = ("E", "A", "B", "alpha", "beta")
COLUMNS = ("parameters", "tokens", "loss")


@dataclass(frozen=True)
class Optimum:
    """Hold the best use of a budget: parameters, tokens, their loss, and intervals (None without a bootstrap)."""

    flops: float
    parameters: float
    tokens: float
    loss: float
    parameters_interval: tuple[float, float] | None = None
    tokens_interval: tuple[float, float] | None = None
    loss_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class ScalingLaw:
    """L(N, D) = E + A/N^α + B/D^β, nats per token (Hoffmann et al. 2022, arXiv 2203.15556, Eq. 2).

    Args:
        points: how many runs it was fitted to.
        error: root mean square of log L's residuals; about the relative error of a point.
        samples: [bootstrap, 5], the constants fitted to each resample.
    """

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    points: int = 0
    error: float | None = None
    samples: np.ndarray = field(default_factory=lambda: np.empty((0, 5)), repr=False, compare=False)

    @property
    def constants(self) -> np.ndarray:
        """[5]: E, A, B, α, β."""
        return np.array([getattr(self, name) for name in CONSTANTS])

    @property
    def exponents(self) -> dict[str, float]:
        """N_opt ∝ C^a and D_opt ∝ C^b: a = β/(α+β), b = α/(α+β) (Eq. 4)."""
        total = self.alpha + self.beta
        return {"a": self.beta / total, "b": self.alpha / total}

    def loss(self, parameters, tokens):
        """Return the loss, nats per token, of N `parameters` after D `tokens`; numbers or arrays that broadcast."""
        n, d = np.asarray(parameters, dtype=float), np.asarray(tokens, dtype=float)
        return self.E + self.A / n**self.alpha + self.B / d**self.beta

    def interval(self, name: str, level: float = 0.95) -> tuple[float, float]:
        """Return the percentile bootstrap interval of E, A, B, alpha, beta, a or b.

        Raises:
            ValueError: another name, or a law without samples.
        """
        if name not in (*CONSTANTS, *self.exponents):
            raise ValueError(f"interval({name!r}): choose one of {', '.join((*CONSTANTS, *self.exponents))}.")
        if name in CONSTANTS:
            return percentile_interval(self.samples[:, CONSTANTS.index(name)], level)
        alpha, beta = self._falling()[:, 3:].T
        return percentile_interval((beta if name == "a" else alpha) / (alpha + beta), level)

    def optimum(self, flops: float, level: float = 0.95) -> Optimum:
        """Return the N and D of least loss with 6·N·D = C = `flops`.

        N_opt = G·(C/6)^a, D_opt = (C/6)^b / G, G = (αA/(βB))^(1/(α+β)) (Eq. 4).

        Raises:
            ValueError: a budget that is no positive number.
        """
        if not (flops > 0 and math.isfinite(flops)):
            raise ValueError(f"optimum: flops={flops!r}; a budget is a positive number of FLOPs.")
        best = frontier(self.constants, flops)
        if not len(self.samples):
            return Optimum(flops, *map(float, best))
        intervals = [percentile_interval(values, level) for values in frontier(self._falling(), flops)]
        return Optimum(flops, *map(float, best), *intervals)

    def _falling(self):
        """The samples with α, β > 0; the others have no optimum."""
        return self.samples[(self.samples[:, 3:] > 0).all(axis=1)]

    def summary(self, budgets=(), *, markdown: bool = False, level: float = 0.95) -> str:
        """Return the constants, and the optimum of each budget, as tables drawn by rich or in Markdown."""
        titles = (f"L = E + A/N^α + B/D^β{self._quality()}", "Best use of C = 6·N·D FLOPs")
        tables = self._tables(budgets, level)
        if markdown:
            return "\n\n".join(markdown_table(*table) for table in tables)
        drawn = [f"{title}\n{terminal_table(*table)}" for title, table in zip(titles, tables)]
        return "\n\n".join(drawn)

    def _quality(self):
        lost = len(self.samples) - len(self._falling())
        unusable = f", {lost} of {len(self.samples)} resamples without an optimum" if lost else ""
        return f" ({self.points} points, error {100 * self.error:.2g} %{unusable})" if self.points else ""

    def _tables(self, budgets, level):
        """(headings, rows) of the constants and, if there are budgets, of their optima."""
        share, with_samples = f"{100 * level:g} %", len(self.samples) > 0
        values = {name: getattr(self, name) for name in CONSTANTS} | self.exponents
        meanings = {"E": "E, nats", "alpha": "α", "beta": "β", "a": "a: N_opt ∝ C^a", "b": "b: D_opt ∝ C^b"}
        rows = [[meanings.get(name, name), f"{value:.4g}"] for name, value in values.items()]
        if with_samples:
            rows = [row + [between(self.interval(name, level), "{:.4g}".format)] for row, name in zip(rows, values)]
        tables = [(["constant", "value", share][: 2 + with_samples], rows)]
        if len(budgets):
            headings, rows = ["FLOPs", "parameters", "tokens", "tokens/parameter", "loss"], []
            for best in (self.optimum(budget, level) for budget in budgets):
                cells = [short_count(best.parameters), short_count(best.tokens), f"{best.loss:.3f}"]
                if with_samples:
                    spread = (best.parameters_interval, best.tokens_interval, best.loss_interval)
                    shapes = (short_count, short_count, "{:.3f}".format)
                    cells = [f"{c}  {between(s, shape)}" for c, s, shape in zip(cells, spread, shapes)]
                cells.insert(2, f"{best.tokens / best.parameters:.3g}")
                rows.append([short_flops(best.flops), *cells])
            tables.append((headings, rows))
        return tables

    def report(self, budgets=()) -> dict:
        """Return constants, exponents and optima of `budgets`, with intervals where there are samples, for JSON."""
        values = {name: getattr(self, name) for name in CONSTANTS} | self.exponents
        intervals = {name: self.interval(name) for name in values} if len(self.samples) else {}
        return {"law": values, "intervals": intervals, "best": [asdict(self.optimum(budget)) for budget in budgets]}

    def to_json(self) -> dict:
        """Return every field, ready for `json.dump`."""
        return asdict(self) | {"samples": self.samples.tolist()}

    @classmethod
    def from_json(cls, fields: dict) -> "ScalingLaw":
        return cls(**(fields | {"samples": np.array(fields["samples"], dtype=float).reshape(-1, 5)}))


def frontier(constants, flops):
    """(N_opt, D_opt, loss) of constants [..., 5]."""
    E, A, B, alpha, beta = np.moveaxis(constants, -1, 0)
    log_g = (np.log(alpha * A) - np.log(beta * B)) / (alpha + beta)
    log_n = log_g + beta / (alpha + beta) * np.log(flops / 6)
    log_d = np.log(flops / 6) - log_n
    loss = E + np.exp(np.log(A) - alpha * log_n) + np.exp(np.log(B) - beta * log_d)
    return np.exp(log_n), np.exp(log_d), loss


def percentile_interval(values, level):
    if not len(values):
        raise ValueError("interval: this law has no usable bootstrap samples; fit it with bootstrap=1000.")
    return tuple(float(edge) for edge in np.quantile(values, ((1 - level) / 2, (1 + level) / 2)))


def plan_ladder(budgets, sizes, *, tokens_per_parameter=(1, 400), most_tokens=math.inf) -> list[tuple[float, float]]:
    """Return (N, D) of the runs to train: every size at every budget, D = C / (6N).

    Args:
        budgets: FLOPs C.
        sizes: parameter counts N.
        tokens_per_parameter: least and most D/N; runs outside, far from any optimum, are left out.
        most_tokens: largest D, where the text is short; runs beyond are left out, too.

    Raises:
        ValueError: a budget is left with fewer than 3 sizes, too few to show where its loss is least.
    """
    least, most = tokens_per_parameter
    ladder = []
    for budget in budgets:
        runs = [(size, budget / (6 * size)) for size in sorted(sizes)]
        runs = [(n, d) for n, d in runs if least <= d / n <= most and d <= most_tokens]
        if len(runs) < 3:
            low, high = (math.sqrt(budget / (6 * ratio)) for ratio in (most, least))
            low, high = short_count(max(low, budget / (6 * most_tokens))), short_count(high)
            raise ValueError(
                f"plan_ladder: budget {short_flops(budget)} needs 3 sizes between {low} and {high} parameters."
            )
        ladder += runs
    return ladder


def short_count(value):
    """Return a number with three digits and a letter: 1.23M, 4.56B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def short_flops(value):
    return f"{value:.3g}".replace("e+", "e")


def between(interval, shape):
    return f"{shape(interval[0])} to {shape(interval[1])}"
