"""KL control: objects that hold the KL coefficient β of a trainer and update it from the measured KL."""

import math

from lifecycle_hf.mitigation.trade_off import LagrangeMultiplier


class FixedKL:
    """Keep β constant.

    Args:
        kl_coef: β ≥ 0.
    """

    def __init__(self, kl_coef: float):
        if not kl_coef >= 0:
            raise ValueError(f"kl_coef={kl_coef} must be at least 0.")
        self.kl_coef = kl_coef

    def update(self, kl: float, n: int) -> None:
        """Adapt β to the KL of an update (nats, sum over tokens, mean over sequences) that had `n` sequences."""

    def state_dict(self) -> dict[str, float]:
        return {"kl_coef": self.kl_coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.kl_coef = state["kl_coef"]


class ZieglerKL(FixedKL):
    """Steer the KL to a target by the classical rule: β ← β·(1 + clip(KL/target − 1, ±0.2)·min(n/horizon, 1)).

    An update of more than `horizon` sequences counts as one of `horizon` sequences, so that β stays above 0. β falls
    while the KL is below its target. So β is small when the KL gets there, and the KL overshoots.

    Args:
        kl_coef: β at the start, above 0 (0 would stay 0).
        target: target of the KL, sum over tokens, nats.
        horizon: sequences over which β may change by about 20 %.

    Reference: Ziegler et al., https://arxiv.org/abs/1909.08593, section 2.2.
    """

    def __init__(self, kl_coef: float, *, target: float, horizon: int):
        super().__init__(kl_coef)
        for name, value in (("kl_coef", kl_coef), ("target", target), ("horizon", horizon)):
            if not value > 0:
                raise ValueError(f"{name}={value} must be above 0 for adaptive KL control.")
        self.target, self.horizon = target, horizon

    def update(self, kl: float, n: int) -> None:
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.kl_coef *= 1 + error * min(n / self.horizon, 1)


class AdaptiveKL(ZieglerKL):
    """Steer the KL to a target by the logarithm of β: log β ← log β + (e − e₋) + rate·min(n/horizon, 1)·e.

    e = log(KL/target), within [−1, 1], is the error and e₋ the error before. By the first term β is proportional to
    the KL near the target: it rises while the KL climbs, before it is above the target. `rate` is 0.2, but 0.03 where
    e < 0 and β is not above `kl_coef`: so β hardly falls below its start while the KL is small, and a leap of the KL
    does not leave a large β behind.

    Args:
        kl_coef, target, horizon: as of [`ZieglerKL`]; `horizon` sequences move log β by `rate` where e is 1.
        minimum: smallest β.
    """

    RATE, BELOW_START = 0.2, 0.03

    def __init__(self, kl_coef: float, *, target: float, horizon: int, minimum: float = 0.0):
        super().__init__(kl_coef, target=target, horizon=horizon)
        if not 0 <= minimum <= kl_coef:
            raise ValueError(f"{minimum=} must lie between 0 and kl_coef={kl_coef}.")
        self.start, self.minimum, self.error = kl_coef, minimum, None

    def update(self, kl: float, n: int) -> None:
        error = min(max(math.log(max(kl / self.target, 1e-3)), -1.0), 1.0)
        change = 0.0 if self.error is None else error - self.error
        rate = self.RATE if error > 0 or self.kl_coef > self.start else self.BELOW_START
        step = change + rate * error * min(n / self.horizon, 1)
        self.kl_coef, self.error = max(self.kl_coef * math.exp(step), self.minimum), error

    def state_dict(self) -> dict[str, float | None]:
        return super().state_dict() | {"error": self.error}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        super().load_state_dict(state)
        self.error = state.get("error")


class ExponentialKL(FixedKL):
    """Raise β with the KL: β = clamp(β₀·exp(λ·KL), minimum, maximum).

    Args:
        kl_coef: β₀, within the bounds.
        rate: λ per nat.
        minimum, maximum: bounds of β.
    """

    def __init__(self, kl_coef: float, *, rate: float, minimum: float = 0.0, maximum: float = 1.0):
        super().__init__(kl_coef)
        if not 0 <= minimum <= kl_coef <= maximum:
            raise ValueError(f"Exponential KL control needs 0 <= {minimum=} <= {kl_coef=} <= {maximum=}.")
        self.initial, self.rate, self.minimum, self.maximum = kl_coef, rate, minimum, maximum

    def update(self, kl: float, n: int) -> None:
        growth = math.exp(min(self.rate * kl, 700.0))  # a larger exponent would overflow
        self.kl_coef = min(max(self.initial * growth, self.minimum), self.maximum)


class KLBudget(FixedKL):
    """Hold the KL at or below `budget`: β = kl_coef + λ, λ ← max(0, λ + rate·(KL − budget)), β ≤ maximum.

    λ is the multiplier of the constraint KL ≤ budget. β stays at its minimum kl_coef while the KL is lower. Dual
    ascent alone holds the constraint only in the long run. For the hard bound the trainer undoes each update after
    which [`rejects`] is true.

    Args:
        kl_coef: minimum of β.
        budget: largest KL of the policy, sum over tokens, nats.
        rate: step of the dual ascent, β per nat.
        maximum: largest β.
    """

    def __init__(self, kl_coef: float, *, budget: float, rate: float = 0.1, maximum: float = 1.0):
        super().__init__(kl_coef)
        if not budget > 0:
            raise ValueError(f"budget={budget} nats must be above 0.")
        if not maximum > kl_coef:
            raise ValueError(f"{maximum=} must lie above kl_coef={kl_coef}, so that β can rise.")
        self.floor, self.budget = kl_coef, budget
        self.multiplier = LagrangeMultiplier(budget, rate=rate, maximum=maximum - kl_coef)

    def rejects(self, kl: float) -> bool:
        """Return whether a measured KL lies above the budget or is NaN."""
        return not kl <= self.budget

    def update(self, kl: float, n: int) -> None:
        self.multiplier.update(kl)
        self.kl_coef = self.floor + self.multiplier.value

    def state_dict(self) -> dict[str, float]:
        return super().state_dict() | self.multiplier.state_dict()

    def load_state_dict(self, state: dict[str, float]) -> None:
        super().load_state_dict(state)
        self.multiplier.load_state_dict(state)
