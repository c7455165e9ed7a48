"""Paying less alignment tax, and knowing what was paid."""

from importlib import import_module

_HOMES = {
    "bootstrap": ("Measurement", "bootstrap_interval"),
    "calibration": ("brier_score", "expected_calibration_error", "negative_log_likelihood", "reliability_bins"),
    "diversity": ("distinct_n", "self_bleu", "token_entropy"),
    "ewc": ("EWC",),
    "interpolation": ("interpolate", "search_layer_ratios", "sweep"),
    "kl_control": ("AdaptiveKL", "ExponentialKL", "FixedKL", "KLBudget"),
    "metrics": ("exact_match", "kl_to_reference", "multiple_choice", "perplexity"),
    "pareto": ("hypervolume", "pareto_front"),
    "pictures": ("plot_history", "plot_overoptimization", "plot_pareto", "plot_reliability"),
    "projection": ("OrthogonalProjection",),
    "report": ("TaxReport",),
    "trade_off": ("LagrangeMultiplier",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)


def __getattr__(name):
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__():
    return __all__
