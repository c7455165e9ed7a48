"""Capability against alignment, constrained either way: a Lagrange multiplier that a trainer weighs a loss by."""

import math


class LagrangeMultiplier:
    """λ ≥ 0 of one inequality constraint on a measured value c, by dual ascent after every measurement.

    min f subject to c ≤ limit ("at_most") is the saddle point min over the weights, max over λ ≥ 0, of
    f + λ·(c − limit); the weights descend on it, and λ ← clip(λ + rate·(c − limit), 0, maximum). c ≥ limit
    ("at_least") is −c ≤ −limit. On a convex problem both converge to the point and the λ of the KKT conditions: λ is 0
    where the constraint is slack, else the price in f of one unit of c.

    Args:
        limit: the ceiling or floor, in the unit of c.
        sense: "at_most" or "at_least".
        rate: step of the ascent, above 0, in units of f per unit of c squared.
        maximum: cap of λ, above 0; a λ that stays there says that the constraint can't be met.
        initial: λ at the start.

    Attributes:
        value: λ.
        violation: c − limit ("at_least": limit − c) of the last measurement, positive where it was broken.

    Raises:
        ValueError: an option that can't be meant, by name.

    Reference: Boyd & Vandenberghe, Convex Optimization, §5.5.3; with policies https://arxiv.org/abs/1805.11074, Eq. 6.
    """

    def __init__(self, limit: float, *, sense: str = "at_most", rate: float, maximum: float = 100.0, initial=0.0):
        if sense not in ("at_most", "at_least"):
            raise ValueError(f"sense={sense!r} is unknown: choose 'at_most' or 'at_least'.")
        if not math.isfinite(limit):
            raise ValueError(f"limit={limit} must be finite.")
        if not 0 < rate < math.inf:
            raise ValueError(f"rate={rate} must be above 0 and finite.")
        if not 0 <= initial <= maximum < math.inf or maximum == 0:
            raise ValueError(f"A multiplier needs 0 <= {initial=} <= {maximum=} and a finite maximum above 0.")
        self.limit, self.sign, self.rate, self.maximum = limit, 1 if sense == "at_most" else -1, rate, maximum
        self.value, self.violation = float(initial), 0.0

    @property
    def weight(self) -> float:
        """What c is weighed by in a loss to minimise: λ, or −λ where c must be at least the limit."""
        return self.sign * self.value

    def update(self, value: float) -> None:
        """Takes a measurement of c; one that is not finite changes nothing."""
        if math.isfinite(value):
            self.violation = self.sign * (value - self.limit)
            self.value = min(max(self.value + self.rate * self.violation, 0.0), self.maximum)

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value = state["value"]
