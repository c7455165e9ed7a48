"""Methods that reduce the alignment tax: projection, EWC, interpolation, KL control, Lagrange multipliers."""

from lifecycle_hf.mitigation.ewc import EWC
from lifecycle_hf.mitigation.interpolation import interpolate, search_layer_ratios, sweep
from lifecycle_hf.mitigation.kl_control import AdaptiveKL, ExponentialKL, FixedKL, KLBudget, ZieglerKL
from lifecycle_hf.mitigation.projection import OrthogonalProjection
from lifecycle_hf.mitigation.trade_off import LagrangeMultiplier

__all__ = [
    "EWC",
    "AdaptiveKL",
    "ExponentialKL",
    "FixedKL",
    "KLBudget",
    "LagrangeMultiplier",
    "OrthogonalProjection",
    "ZieglerKL",
    "interpolate",
    "search_layer_ratios",
    "sweep",
]
