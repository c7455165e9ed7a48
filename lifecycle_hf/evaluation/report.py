"""The table of metrics before and after a run, with the tax on each and its interval."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from lifecycle_hf.evaluation.bootstrap import Measurement, bootstrap_interval
from lifecycle_hf.scaling.tables import markdown_table, terminal_table

NO_DIFFERENCE = "not distinguishable from zero"
_MIXTURE_FORMATS = {"share": ".1%", "chains": ".1%", "token_share": ".1%", "epochs": ".2f", "tokens": ".0f"}


@dataclass
class TaxReport:
    """Compare metrics before and after training, and give the tax on each.

    tax = s·(before − after), s = +1 where higher is better and −1 where lower is: a positive tax is a loss. Where both
    values are a `Measurement` of two items or more, the tax has a bootstrap interval, paired where the counts of items
    agree, and a verdict: a loss or a gain, or "not distinguishable from zero" when the interval holds 0. The level is
    that of each row by itself, not of the table as a whole.

    Args:
        before, after: {metric: value}, the same metrics in both; a value is a number or a `Measurement`.
        higher_is_better: {metric: bool}, one entry per metric.
        labels: {metric: name to show}, the metric's own name by default.
        units: {metric: unit to show}.
        level: of the intervals.

    Raises:
        ValueError: the three do not name the same metrics.
    """

    before: dict[str, float]
    after: dict[str, float]
    higher_is_better: dict[str, bool]
    labels: dict[str, str] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)
    level: float = 0.95

    def __post_init__(self):
        for where, names in (("after", self.after), ("higher_is_better", self.higher_is_better)):
            odd = sorted(self.before.keys() ^ names.keys())
            if odd:
                raise ValueError(f"TaxReport: before and {where} must name the same metrics; only one has {odd}.")

    def rows(self) -> list[dict]:
        """Return dicts with metric, label, before, after, higher_is_better, tax, percent (100·tax / before; None
        where before is not positive, as a share of it says nothing), and where it has one, interval (low, high) of the
        tax with its verdict."""
        rows = []
        for name, before in self.before.items():
            after, higher = self.after[name], self.higher_is_better[name]
            tax = before - after if higher else after - before
            unit = f" ({self.units[name]})" if name in self.units else ""
            rows.append(
                {
                    "metric": name,
                    "label": self.labels.get(name, name.replace("_", " ")) + unit,
                    "before": float(before),
                    "after": float(after),
                    "higher_is_better": higher,
                    "tax": tax,
                    "percent": 100 * tax / before if before > 0 else None,
                }
                | self._uncertainty(*((before, after) if higher else (after, before)))
            )
        return rows

    def _uncertainty(self, first, second):
        if not all(isinstance(value, Measurement) and len(value.columns) > 1 for value in (first, second)):
            return {}
        low, high = bootstrap_interval(first, second, level=self.level)
        verdict = "loss" if low > 0 else "gain" if high < 0 else NO_DIFFERENCE
        return {"interval": [low, high], "verdict": verdict}

    def _table(self, colour: bool = False) -> tuple[list[str], list[list[str]]]:
        """Headings and cells; with `colour` the tax is green or red where it differs from zero."""
        rows = self.rows()
        headings = ["metric", "before", "after", "tax", "tax / before"]
        if any("verdict" in row for row in rows):
            headings += [f"tax, {100 * self.level:g} % interval", "verdict"]
        table = [_cells(row)[: len(headings)] for row in rows]
        for row, cells in zip(rows, table):
            unknown = not _finite(row["tax"]) or row["tax"] == 0 or row.get("verdict") == NO_DIFFERENCE
            if colour and not unknown:
                cells[3] = f"[{'red' if row['tax'] > 0 else 'green'}]{cells[3]}[/]"
        return headings, table

    def to_json(self) -> dict:
        """Return {metric: {before, after, higher_is_better, tax, percent[, interval, verdict]}} for `json.dump`."""
        return {row["metric"]: {key: row[key] for key in row if key not in ("metric", "label")} for row in self.rows()}

    def to_markdown(self) -> str:
        """Return the table in Markdown."""
        return markdown_table(*self._table())

    def to_terminal(self, title="Alignment tax", width=None) -> str:
        """Return the table drawn by rich, coloured when standard output is a terminal."""
        options = {"title": title, "caption": "tax: positive is a loss", "width": width or 118}
        return terminal_table(*self._table(colour=True), left=("verdict",), **options)


def _cells(row):
    arrow = "↑" if row["higher_is_better"] else "↓"
    told = _finite(row["percent"]) and abs(row["percent"]) < 1000  # a multiple of next to nothing tells nothing
    percent = f"{row['percent']:+.1f} %" if told else ""
    numbers = [_number(row["before"]), _number(row["after"]), _number(row["tax"], "+")]
    interval = " to ".join(_number(end, "+") for end in row.get("interval", ()))
    return [f"{row['label']} {arrow}", *numbers, percent, interval, row.get("verdict", "")]


def _number(value, sign=""):
    if not _finite(value):
        return "n/a"
    digits = 1 if abs(value) >= 100 else 2 if abs(value) >= 10 else 3
    return f"{value:{sign}.{digits}f}"


def _finite(value):
    return value is not None and math.isfinite(value)


def mixture_table(rows: list[dict], *, terminal: bool = False, **options) -> str:
    """Return the table of `InstructionMixture.report` in Markdown, or drawn for a terminal.

    Args:
        options: of `terminal_table`.
    """
    headings = [name.replace("_", " ") for name in rows[0]]
    cells = [
        ["" if value is None else format(value, _MIXTURE_FORMATS.get(name, "")) for name, value in row.items()]
        for row in rows
    ]
    return (
        terminal_table(headings, cells, left=("family",), **options) if terminal else markdown_table(headings, cells)
    )


def write_report(report: dict, output_dir: str | Path) -> None:
    """Write report.json in `output_dir`; NaN and infinity become null."""
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "report.json").write_text(json.dumps(json_ready(report), indent=2, ensure_ascii=False) + "\n")


def json_ready(value):
    """Return `value` for `json.dump`: keys as text, NaN and infinity as null."""
    if isinstance(value, dict):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
