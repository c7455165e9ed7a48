"""Pictures as PNG: a run's history, reliability, Pareto fronts, over-optimisation, mixtures of tasks, funnels."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lifecycle_hf.evaluation.calibration import expected_calibration_error, reliability_bins
from lifecycle_hf.evaluation.pareto import pareto_front
from lifecycle_hf.scaling.law import short_count
from lifecycle_hf.scaling.picture import GREY, INK, new_figure, style

PANELS = {
    "Reward": {
        "score": "proxy reward (rollouts)",
        "tax/proxy_reward": "proxy reward (held out)",
        "tax/gold_reward": "gold reward (held out)",
    },
    "Implicit reward": {
        "rewards/chosen": "chosen",
        "rewards/rejected": "rejected",
        "tax/reward_margin": "margin (held out)",
    },
    "Accuracy of the implicit reward": {"rewards/accuracies": "training", "tax/reward_accuracy": "held out"},
    "KL to the reference (nats per sequence)": {"kl": "rollouts", "tax/kl": "held out"},
    "Capability perplexity": {"tax/perplexity": "held out"},
}
COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea")


@style()
def plot_history(history, path, panels=None, title=None):
    """Draw metrics against the optimizer step, one panel side by side for each group, and save a PNG.

    Args:
        history: rows with `step` and any metrics, such as `trainer.state.log_history`.
        path: the PNG to write.
        panels: {panel title: {metric: label}}; metrics that no row has are left out, and panels left empty.
        title: a line above all panels.

    Raises:
        ValueError: no row has any of the metrics.
    """
    curves = {
        name: {label: points for metric, label in metrics.items() if (points := _points(history, metric))}
        for name, metrics in (PANELS if panels is None else panels).items()
    }
    curves = {name: lines for name, lines in curves.items() if lines}
    if not curves:
        keys = sorted({key for row in history for key in row})
        raise ValueError(f"plot_history: no row has a metric of the panels; the rows have {keys}.")
    figure = new_figure(4.4 * len(curves), 3.4)
    for axes, (name, lines) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items()):
        _draw_panel(axes, name, lines)
    if title:
        figure.suptitle(title)
    figure.savefig(path)


def _points(history, metric):
    rows = [(row["step"], row[metric]) for row in history if row.keys() >= {"step", metric} and _finite(row[metric])]
    return sorted(dict(rows).items())


def _draw_panel(axes, name, lines):
    colours = COLOURS if len(lines) <= len(COLOURS) else [f"C{i}" for i in range(len(lines))]
    for colour, (label, points) in zip(colours, lines.items()):
        steps, values = zip(*points)
        sparse = len(points) <= 12
        axes.plot(
            steps, values, color=colour, linewidth=1.8, marker="o" if sparse else None, markersize=4, label=label
        )
    axes.set(title=name, xlabel="optimizer step")
    axes.legend()


def _finite(value):
    return value is not None and math.isfinite(value)


@style()
def plot_reliability(confidence, correct, path: str | Path, *, bins: int = 10, title: str = "Calibration") -> None:
    """Draw the reliability diagram: accuracy against confidence, and the number of predictions per bin."""
    table = reliability_bins(confidence, correct, bins=bins)
    full, width = table["count"] > 0, 1.0 / bins
    middle = (table["edges"][:-1] + table["edges"][1:]) / 2
    figure = new_figure(4.4, 5.2)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    top.bar(middle[full], table["accuracy"][full], width=width * 0.95, color=COLOURS[0], alpha=0.6, label="accuracy")
    top.plot([0, 1], [0, 1], "--", color=INK, linewidth=1, label="perfect")
    top.plot(table["confidence"][full], table["accuracy"][full], "o", color=COLOURS[1], label="mean confidence")
    ece = expected_calibration_error(confidence, correct, bins=bins)
    name = f"{title}: ECE {ece:.3f}, n = {table['count'].sum()}"
    top.set(title=name, ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    top.legend(loc="upper left")
    bottom.bar(middle, table["count"], width=width * 0.95, color=GREY)
    bottom.set(xlabel="confidence", ylabel="count")
    figure.savefig(path)


@style()
def plot_overoptimization(kl, scores: dict[str, Sequence[float]], path: str | Path, title: str = "Over-optimisation"):
    """Draw scores, such as {"proxy reward": …, "gold reward": …}, against √KL(π‖π_ref) of the same measurements.

    Args:
        kl: [N], nats per sequence; below 0, which estimates can be, counts as 0.

    Reference: Gao et al., https://arxiv.org/abs/2210.10760, section 3.
    """
    distance = np.sqrt(np.maximum(kl, 0.0))
    order, figure = np.argsort(distance, kind="stable"), new_figure(5.2, 3.6)
    axes = figure.subplots()
    for colour, (label, values) in zip(COLOURS, scores.items()):
        axes.plot(distance[order], np.asarray(values)[order], "o-", color=colour, markersize=4, label=label)
    axes.set(title=title, xlabel="√KL to the reference (nats per sequence)", ylabel="reward")
    axes.legend()
    figure.savefig(path)


@style()
def plot_pareto(
    rows: Sequence[dict],
    path: str | Path,
    *,
    alignment: str = "alignment",
    capability: str = "capability",
    title: str = "Pareto front",
) -> None:
    """Draw runs by alignment and capability, both higher is better, and the front of those that none dominates.

    More runs than eight are numbered, with their labels beside the picture.

    Args:
        rows: {"label", "alignment", "capability"} each, and where known "alignment_interval" and
            "capability_interval" (low, high), drawn as error bars.
        alignment, capability: names of the axes.
    """
    points = np.array([(row["alignment"], row["capability"]) for row in rows])
    numbered = len(rows) > 8
    figure = new_figure(9.6 if numbered else 7.2, 5.0)
    axes = figure.subplots()
    front = pareto_front(points)
    steps = {"drawstyle": "steps-pre", "color": COLOURS[2], "linewidth": 1.4, "zorder": 1}
    axes.plot(*points[front].T, label="Pareto front", **steps)
    for i, row in enumerate(rows):
        bars = {
            f"{axis}err": np.abs(np.subtract(row[f"{name}_interval"], row[name]))[:, None]
            for axis, name in (("x", "alignment"), ("y", "capability"))
            if row.get(f"{name}_interval") is not None
        }
        colour = COLOURS[2] if i in front else GREY
        look = {"fmt": "o", "color": colour, "ecolor": (colour, 0.5), "elinewidth": 0.8, "capsize": 2, "zorder": 2}
        axes.errorbar(*points[i], **bars, **look)
    axes.set(title=title, xlabel=f"{alignment} →", ylabel=f"{capability} →")
    axes.margins(0.12)
    labels = [str(row["label"]) for row in rows]
    axes.legend()
    if numbered:
        key = "\n".join(f"{i}  {label}" for i, label in enumerate(labels, 1))
        axes.text(1.02, 1, key, transform=axes.transAxes, va="top", fontsize=8, linespacing=1.6)
        labels = [str(i) for i in range(1, len(labels) + 1)]
    _place_labels(axes, points, labels)
    figure.savefig(path)


def _place_labels(axes, points, labels):
    """Beside each point, from the top down, moved until it covers no other label."""
    axes.figure.draw_without_rendering()
    middle, taken = axes.bbox.x0 + axes.bbox.width / 2, []
    places = axes.transData.transform(points)
    for i in np.argsort(-places[:, 1], kind="stable"):
        side, width = 1 if places[i, 0] < middle else -1, 4.6 * len(labels[i])
        x, y = places[i] * 72 / axes.figure.dpi
        left = x + 7 if side > 0 else x - 7 - width
        near = [height for start, end, height in taken if left < end and start < left + width]
        shifts = [7, *range(-7, -12 * len(labels) - 12, -6)]
        shift = next((s for s in shifts if all(abs(y + s - height) >= 12 for height in near)), 7)
        taken.append((left, left + width, y + shift))
        arrow = None
        if abs(shift) > 7:
            arrow = {"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "relpos": (side < 0, 0.5)}
        offset = (16 if arrow else 7) * side, shift
        look = {"ha": "left" if side > 0 else "right", "va": "center", "fontsize": 8}
        text = axes.annotate(labels[i], points[i], offset, textcoords="offset points", arrowprops=arrow, **look)
        text.set_in_layout(False)


@style()
def plot_mixture(rows: Sequence[dict], path: str | Path, title: str = "Mixture of tasks") -> None:
    """Draw the rows of `InstructionMixture.report`: each task's shares of draws and of tokens, and its epochs."""
    figure, places = new_figure(8.4, 1.4 + 0.24 * len(rows)), np.arange(len(rows))
    shares, epochs = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    labels = {name: label for name, label in (("share", "draws"), ("token_share", "tokens")) if name in rows[0]}
    height = 0.8 / len(labels)
    for i, (colour, (name, label)) in enumerate(zip(COLOURS, labels.items())):
        widths = [100 * row[name] for row in rows]
        shares.barh(places - 0.4 + height * (i + 0.5), widths, height, color=colour, label=label)
    epochs.barh(places, [row["epochs"] for row in rows], 0.8, color=COLOURS[2])
    epochs.axvline(1, color=INK, linestyle="--", linewidth=1)
    names = [name if len(name) <= 36 else f"{name[:35]}…" for name in (row["task"] for row in rows)]
    shares.set(title=title, xlabel="share (%)", yticks=places, yticklabels=names, ylim=(len(rows) - 0.5, -0.5))
    epochs.set(xlabel="passes over the task in the run")
    shares.legend()
    figure.savefig(path)


@style()
def plot_funnel(rows: Sequence[dict], path: str | Path, title: str = "What is left after each step") -> None:
    """Draw the documents, bytes and tokens after each step of curation, as shares of those of the first.

    Args:
        rows: {"step", "documents", "bytes", "tokens"} of each step.
    """
    figure, places = new_figure(7.2, 1.4 + 0.5 * len(rows)), np.arange(len(rows))
    axes = figure.subplots()
    for i, (colour, name) in enumerate(zip(COLOURS, ("documents", "bytes", "tokens"))):
        shares = [100 * row[name] / max(rows[0][name], 1) for row in rows]
        label = f"{name} ({short_count(rows[0][name])} → {short_count(rows[-1][name])})"
        bars = axes.barh(places + 0.27 * (i - 1), shares, 0.25, color=colour, label=label)
        axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=7)
    names = [row["step"] for row in rows]
    axes.set(title=title, xlabel="share of what was read (%)", yticks=places, yticklabels=names, xlim=(0, 108))
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3)
    figure.savefig(path)
