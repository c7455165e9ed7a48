"""KL control: objects a trainer asks for the KL coefficient β, and tells what KL came of it."""

import math

from lifecycle_hf.mitigation.trade_off import LagrangeMultiplier


class FixedKL:
    """Keeps β constant.

    Args:
        kl_coef: β ≥ 0.
    """

    def __init__(self, kl_coef: float):
        if not kl_coef >= 0:
            raise ValueError(f"kl_coef={kl_coef} must be at least 0.")
        self.kl_coef = kl_coef

    def update(self, kl: float, n: int) -> None:
        """Takes the KL of an update (mean over sequences of the sum over tokens, nats) and its `n` sequences."""

    def state_dict(self) -> dict[str, float]:
        return {"kl_coef": self.kl_coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.kl_coef = state["kl_coef"]


class AdaptiveKL(FixedKL):
    """Steers the KL to a target: β ← β·(1 + clip(KL/target − 1, ±0.2)·min(n/horizon, 1)).

    An update of more sequences than the horizon counts as one of `horizon`, so that β stays above 0.

    Args:
        kl_coef: β at the start, above 0 (0 would stay 0).
        target: KL to hold, sequence sum, nats.
        horizon: sequences over which β may change by about 20 %.

    Reference: https://arxiv.org/abs/1909.08593, section 2.2.
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


class ExponentialKL(FixedKL):
    """Raises β with the KL itself: β = clamp(β₀·exp(λ·KL), minimum, maximum).

    Args:
        kl_coef: β₀ above 0.
        rate: λ per nat.
        minimum, maximum: bounds of β.
    """

    def __init__(self, kl_coef: float, *, rate: float, minimum: float = 0.0, maximum: float = 1.0):
        super().__init__(kl_coef)
        if not 0 <= minimum <= kl_coef <= maximum:
            raise ValueError(f"Exponential KL control needs 0 <= {minimum=} <= {kl_coef=} <= {maximum=}.")
        self.initial, self.rate, self.minimum, self.maximum = kl_coef, rate, minimum, maximum

    def update(self, kl: float, n: int) -> None:
        # Past this exponent the clamp decides and exp would overflow.
        exponent = min(self.rate * kl, 700.0)
        self.kl_coef = min(max(self.initial * math.exp(exponent), self.minimum), self.maximum)


class KLBudget(FixedKL):
    """Lets a policy spend at most `budget` nats: β = kl_coef + λ, λ ← max(0, λ + rate·(KL − budget)), β ≤ maximum.

    λ is the multiplier of the constraint KL ≤ budget, so that β stays at its floor while the policy spends less. Dual
    ascent alone holds a constraint in the long run only. The hard part is the trainer's: an update after which
    [`rejects`] is true is taken back.

    Args:
        kl_coef: floor of β.
        budget: most KL of the policy, sequence sum, nats.
        rate: step of the dual ascent, β per nat.
        maximum: most that β becomes.
    """

    def __init__(self, kl_coef: float, *, budget: float, rate: float = 0.1, maximum: float = 1.0):
        super().__init__(kl_coef)
        if not budget > 0:
            raise ValueError(f"budget={budget} nats must be above 0.")
        if not maximum > kl_coef:
            raise ValueError(f"{maximum=} must lie above kl_coef={kl_coef}, or β could not rise.")
        self.floor, self.budget = kl_coef, budget
        self.multiplier = LagrangeMultiplier(budget, rate=rate, maximum=maximum - kl_coef)

    def rejects(self, kl: float) -> bool:
        """Whether a policy of this measured KL has spent more than the budget; one that is not finite has."""
        return not kl <= self.budget

    def update(self, kl: float, n: int) -> None:
        self.multiplier.update(kl)
        self.kl_coef = self.floor + self.multiplier.value

    def state_dict(self) -> dict[str, float]:
        return super().state_dict() | self.multiplier.state_dict()

    def load_state_dict(self, state: dict[str, float]) -> None:
        super().load_state_dict(state)
        self.multiplier.load_state_dict(state)
