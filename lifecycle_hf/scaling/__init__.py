"""Scaling laws, and the memory of a run: `python -m lifecycle_hf.scaling --help`, `...scaling.memory --help`."""

from lifecycle_hf.scaling.fit import fit_scaling_law
from lifecycle_hf.scaling.law import Optimum, ScalingLaw, plan_ladder
from lifecycle_hf.scaling.picture import draw_isoflop

__all__ = ["Optimum", "ScalingLaw", "draw_isoflop", "fit_scaling_law", "plan_ladder"]
