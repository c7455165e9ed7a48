"""The before/after table of a run and its picture: know what you paid."""

import math
from dataclasses import dataclass, field
from io import StringIO

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
INK, FAINT = "#1f2937", "#e5e7eb"


@dataclass
class TaxReport:
    """Metrics before and after training, and the tax on each.

    tax = s·(before − after), s = +1 where higher is better and −1 where lower is: a positive tax is a loss.

    Args:
        before, after: {metric: value}, the same metrics in both.
        higher_is_better: {metric: bool}, one entry per metric.
        labels: {metric: name to show}, the metric's own name by default.
        units: {metric: unit to show}.

    Raises:
        ValueError: the three do not name the same metrics.
    """

    before: dict[str, float]
    after: dict[str, float]
    higher_is_better: dict[str, bool]
    labels: dict[str, str] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        for where, names in (("after", self.after), ("higher_is_better", self.higher_is_better)):
            odd = sorted(self.before.keys() ^ names.keys())
            if odd:
                raise ValueError(f"TaxReport: before and {where} must name the same metrics; only one has {odd}.")

    def rows(self) -> list[dict]:
        """One dict per metric: metric, label, before, after, higher_is_better, tax, percent (100·tax / before; None
        where before is not positive, as a share of it says nothing)."""
        rows = []
        for name, before in self.before.items():
            after, higher = self.after[name], self.higher_is_better[name]
            tax = before - after if higher else after - before
            unit = f" ({self.units[name]})" if name in self.units else ""
            rows.append(
                {
                    "metric": name,
                    "label": self.labels.get(name, name.replace("_", " ")) + unit,
                    "before": before,
                    "after": after,
                    "higher_is_better": higher,
                    "tax": tax,
                    "percent": 100 * tax / before if before > 0 else None,
                }
            )
        return rows

    def to_json(self) -> dict:
        """{metric: {before, after, higher_is_better, tax, percent}}, ready for `json.dump`."""
        return {row["metric"]: {key: row[key] for key in row if key not in ("metric", "label")} for row in self.rows()}

    def to_markdown(self) -> str:
        lines = ["| metric | before | after | tax | tax / before |", "|---|---:|---:|---:|---:|"]
        lines += [f"| {' | '.join(_cells(row))} |" for row in self.rows()]
        return "\n".join(lines)

    def to_terminal(self, title="Alignment tax", width=None) -> str:
        """The table drawn by rich, as text to print; coloured when standard output is a terminal."""
        import sys

        from rich import box
        from rich.console import Console
        from rich.table import Table

        table = Table(title=title, box=box.SIMPLE_HEAD, title_style="bold", caption="tax: positive is a loss")
        table.add_column("metric")
        for heading in ("before", "after", "tax", "tax / before"):
            table.add_column(heading, justify="right")
        for row in self.rows():
            style = "" if not _finite(row["tax"]) or row["tax"] == 0 else "red" if row["tax"] > 0 else "green"
            name, before, after, tax, percent = _cells(row)
            table.add_row(name, before, after, f"[{style}]{tax}[/]" if style else tax, percent)
        text = StringIO()
        Console(file=text, force_terminal=sys.stdout.isatty(), width=width or 100).print(table)
        return text.getvalue().rstrip()


def _cells(row):
    arrow = "↑" if row["higher_is_better"] else "↓"
    percent = "" if row["percent"] is None or not _finite(row["percent"]) else f"{row['percent']:+.1f} %"
    return f"{row['label']} {arrow}", _number(row["before"]), _number(row["after"]), _number(row["tax"], "+"), percent


def _number(value, sign=""):
    if not _finite(value):
        return "n/a"
    digits = 1 if abs(value) >= 100 else 2 if abs(value) >= 10 else 3
    return f"{value:{sign}.{digits}f}"


def _finite(value):
    return value is not None and math.isfinite(value)


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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = {
        name: {label: points for metric, label in metrics.items() if (points := _points(history, metric))}
        for name, metrics in (PANELS if panels is None else panels).items()
    }
    curves = {name: lines for name, lines in curves.items() if lines}
    if not curves:
        keys = sorted({key for row in history for key in row})
        raise ValueError(f"plot_history: no row has a metric of the panels; the rows have {keys}.")
    figure = Figure(figsize=(4.4 * len(curves), 3.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, lines) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items()):
        _draw_panel(axes, name, lines)
    if title:
        figure.suptitle(title, fontsize=12, fontweight="bold", color=INK)
    figure.savefig(path, facecolor="white")


def _points(history, metric):
    rows = [(row["step"], row[metric]) for row in history if metric in row and "step" in row and _finite(row[metric])]
    return sorted(dict(rows).items())


def _draw_panel(axes, name, lines):
    for colour, (label, points) in zip(COLOURS, lines.items()):
        steps, values = zip(*points)
        sparse = len(points) <= 12
        axes.plot(
            steps, values, color=colour, linewidth=1.8, marker="o" if sparse else None, markersize=4, label=label
        )
    axes.set_title(name, fontsize=10, loc="left", color=INK)
    axes.set_xlabel("optimizer step", fontsize=9, color=INK)
    axes.grid(color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, colors=INK, length=0)
    axes.margins(x=0.02, y=0.12)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color("#9ca3af")
    axes.legend(fontsize=8, frameon=False, loc="best")
