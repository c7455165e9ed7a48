"""Constrained trade-off of capability and alignment: a Lagrange multiplier that weights a loss of a trainer."""

import math


class LagrangeMultiplier:
    """The multiplier λ ≥ 0 of one inequality constraint on a measured value c, updated by dual ascent.

    The minimum of f subject to c ≤ limit ("at_most") is the saddle point of f + λ·(c − limit): the minimum over the
    weights and the maximum over λ ≥ 0. The weights descend on it, and λ ← clip(λ + rate·(c − limit), 0, maximum) after
    every measurement. c ≥ limit ("at_least") is −c ≤ −limit. On a convex problem the weights and λ converge to those
    of the KKT conditions: λ is 0 where the constraint is slack, else the fall of f per unit of a looser limit.

    Args:
        limit: the largest or smallest c that is allowed, in the unit of c.
        sense: "at_most" or "at_least".
        rate: step of the ascent, above 0, in units of f per unit of c squared.
        maximum: largest λ, above 0. A λ that stays there shows that the constraint can't be met.
        initial: λ at the start.

    Attributes:
        value: λ.
        violation: c − limit ("at_least": limit − c) of the last measurement; positive if violated.

    Raises:
        ValueError: an option is unknown or out of range.

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
        """Coefficient of c in a loss to minimise: λ, or −λ where c must be at least the limit."""
        return self.sign * self.value

    def update(self, value: float) -> None:
        """Update λ from a measurement of c; one that is not finite changes nothing."""
        if math.isfinite(value):
            self.violation = self.sign * (value - self.limit)
            self.value = min(max(self.value + self.rate * self.violation, 0.0), self.maximum)

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value = state["value"]
