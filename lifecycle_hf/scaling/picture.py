"""The style of all pictures, and the picture of a scaling law: loss at equal compute, and the best use of compute."""

from contextlib import contextmanager

import numpy as np

from lifecycle_hf.scaling.law import ScalingLaw, between, short_count, short_flops

INK, GREY, BAND = "#1f2937", "#9ca3af", "#2563eb"
STYLE = {
    "figure.dpi": 150, "figure.constrained_layout.use": True, "figure.titlesize": 12, "figure.titleweight": "bold",
    "axes.titlesize": 10, "axes.titlelocation": "left", "axes.labelsize": 9, "axes.edgecolor": GREY,
    "axes.spines.left": False, "axes.spines.right": False, "axes.spines.top": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "#e5e7eb", "grid.linewidth": 0.8,
    "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8, "legend.frameon": False,
    "text.color": INK, "axes.labelcolor": INK, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    **{f"{axis}tick.{which}.size": 0 for axis in "xy" for which in ("major", "minor")},
}  # fmt: skip
"""Matplotlib's settings for every picture of the library."""
SAME_BUDGET = 0.1


@contextmanager
def style():
    """Draw in the style of the library inside the block, or inside a function that it decorates."""
    from matplotlib import rc_context  # here, because it takes half a second and few runs draw

    with rc_context(STYLE):
        yield


def new_figure(width: float, height: float):
    """Return an empty matplotlib figure of this size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def budgets_of(flops, most=8) -> list[float]:
    """Return budgets of runs in groups of about the same C, or five evenly spread ones where there are no groups."""
    flops = np.sort(flops)
    groups = np.split(flops, np.flatnonzero(np.diff(np.log(flops)) > SAME_BUDGET) + 1)
    if len(groups) <= most and min(map(len, groups)) >= 3:
        return [float(np.exp(np.log(group).mean())) for group in groups]
    return np.geomspace(flops[0], flops[-1], 5).tolist()


def merged(budgets, others) -> list[float]:
    """Return all budgets, ascending, without those of `budgets` that are about the same as one of `others`."""
    kept = [c for c in budgets if all(abs(np.log(c / other)) > SAME_BUDGET for other in others)]
    return sorted([*kept, *others])


@style()
def draw_isoflop(law: ScalingLaw, points, budgets, path, *, level: float = 0.95):
    """Draw loss against N at each budget, and N_opt and D_opt against C with their intervals, and save a PNG.

    Args:
        points: (parameters, tokens, losses) of the runs; those within 10 % of a budget take its colour.
        budgets: FLOPs C.
        path: the PNG to write.
    """
    from matplotlib import colormaps

    points, budgets = np.asarray(points, dtype=float), np.sort(budgets)
    colours = colormaps["viridis_r"](np.linspace(0.12, 0.95, len(budgets)))
    flops = 6 * points[0] * points[1]
    distance = np.abs(np.log(flops[:, None] / budgets))
    budget_of = np.where(distance.min(axis=1) < SAME_BUDGET, distance.argmin(axis=1), -1)
    figure = new_figure(13, 4.2)
    left, *right = figure.subplots(1, 3, width_ratios=(1.7, 1, 1))
    _draw_valleys(left, law, points, budgets, budget_of, colours)
    groups = [np.flatnonzero(budget_of == index) for index in range(len(budgets))]
    best_runs = [group[points[2, group].argmin()] for group in groups if len(group)]
    grid = np.geomspace(budgets[0] / 2, budgets[-1] * 2, 60)
    optima, marked = ([law.optimum(c, level) for c in values] for values in (grid, budgets))
    for axes, name, exponent, measured in zip(right, ("parameters", "tokens"), "ab", points):
        title = f"Best {name} ∝ C^{law.exponents[exponent]:.2f}"
        if len(law.samples):
            low, high = zip(*(getattr(best, f"{name}_interval") for best in optima))
            axes.fill_between(grid, low, high, color=BAND, alpha=0.2, linewidth=0, label=f"{100 * level:g} % interval")
            title += f" ({between(law.interval(exponent, level), '{:.2f}'.format)})"
        axes.plot(grid, [getattr(best, name) for best in optima], color=INK, linewidth=1.4, label="fitted law")
        axes.scatter(budgets, [getattr(best, name) for best in marked], marker="D", s=34, color=colours, zorder=4)
        axes.plot(flops[best_runs], measured[best_runs], "o", mfc="none", mec=INK, label="best run of a budget")
        axes.set_yscale("log")
        axes.set(title=title, xscale="log", xlabel="compute C = 6ND (FLOPs)")
        _label_counts(axes.yaxis)
        axes.legend(loc="upper left")
    figure.savefig(path)


def _draw_valleys(axes, law, points, budgets, budget_of, colours):
    """Loss against N: a curve, its runs and its minimum for every budget."""
    n, _, losses = points
    other = budget_of < 0
    axes.plot(n[other], losses[other], ".", color=GREY, markersize=3, alpha=0.6, zorder=1)
    minima = [law.optimum(flops) for flops in budgets]
    lowest = ([best.parameters for best in minima], [best.loss for best in minima])
    sizes = np.geomspace(min(n.min(), *lowest[0]) / 1.5, max(n.max(), *lowest[0]) * 1.5, 200)
    for index, (flops, colour) in enumerate(zip(budgets, colours)):
        own, curve = budget_of == index, law.loss(sizes, flops / (6 * sizes))
        axes.plot(sizes, curve, color=colour, linewidth=1.6, label=short_flops(flops))
        axes.plot(n[own], losses[own], "o", color=colour, markersize=5, mec="white", mew=0.6, zorder=3)
    between_them = [law.optimum(flops) for flops in np.geomspace(budgets[0], budgets[-1], 50)]
    descent = ([best.parameters for best in between_them], [best.loss for best in between_them])
    axes.plot(*descent, "--", color=INK, linewidth=1, zorder=3)
    axes.scatter(*lowest, marker="D", s=46, color=colours, edgecolors=INK, zorder=4)
    title = "Loss at equal compute: measured runs, law, and its minimum (◆)"
    axes.set(title=title, xscale="log", xlabel="parameters N")
    _label_counts(axes.xaxis)
    heights = np.concatenate([losses, lowest[1]])
    margin = 0.06 * np.ptp(heights)
    axes.set(ylabel="loss (nats per token)", ylim=(heights.min() - margin, heights.max() + margin))
    axes.set_xlim(sizes[0], sizes[-1])
    axes.legend(title="C (FLOPs)", title_fontsize=8, loc="upper right")


def _label_counts(axis):
    """Label a logarithmic axis 300M, 1B, 3B."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 3)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    axis.set_minor_formatter(NullFormatter())
