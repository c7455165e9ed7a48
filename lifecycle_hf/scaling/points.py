"""Trained runs as rows of a file, and the report of their law."""

import csv
import json
from pathlib import Path

import numpy as np

from lifecycle_hf.scaling.law import COLUMNS, ScalingLaw
from lifecycle_hf.scaling.picture import budgets_of, draw_isoflop, merged


def read_points(path) -> np.ndarray:
    """Return [3, runs], the columns parameters, tokens and loss of a .csv or .jsonl file; others are ignored.

    Raises:
        ValueError: another kind of file, or a row without a number for each.
    """
    path, points = Path(path), []
    if path.suffix not in (".csv", ".jsonl"):
        raise ValueError(f"{path}: give a file ending in .csv or .jsonl.")
    with path.open(newline="", encoding="utf-8-sig") as file:
        for number, row in enumerate(csv.DictReader(file) if path.suffix == ".csv" else file, start=1):
            try:
                row = json.loads(row) if isinstance(row, str) else row
                points.append([float(row[name]) for name in COLUMNS])
            except (KeyError, TypeError, ValueError):
                wanted = ", ".join(COLUMNS)
                raise ValueError(f"{path}, row {number}: numbers {wanted} are needed; it is {row}.") from None
    return np.array(points).reshape(-1, 3).T


def load_runs(folder, settings: dict) -> list[dict]:
    """Return the rows of points.jsonl in `folder`, which `save_runs` wrote; none where there is no such file.

    Raises:
        ValueError: a row with other `settings`, whose loss can't be compared.
    """
    path = Path(folder) / "points.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for row in rows:
        for name, value in settings.items():
            if row["settings"].get(name) != value:
                found = row["settings"].get(name)
                raise ValueError(f"{path} has runs of {name}={found!r}, not {value!r}: give another output_dir.")
    return rows


def save_runs(folder, rows: list[dict]) -> None:
    """Write points.jsonl in `folder`, whole or not at all."""
    part = Path(folder) / "points.jsonl.part"
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    part.replace(part.with_suffix(""))


def tell(law: ScalingLaw, points, budgets=None, picture=None, kept=None, *, markdown: bool = False) -> dict:
    """Print the law with the best use of `budgets` (by default those of the runs), and return this for JSON.

    Args:
        points: [3, runs], those of `read_points`.
        picture, kept: files to draw to and to keep the law in.
    """
    own = budgets_of(6 * points[0] * points[1])
    print(law.summary(budgets or own, markdown=markdown))
    if picture:
        draw_isoflop(law, points, merged(own, budgets or []), picture)
    if kept:
        Path(kept).write_text(json.dumps(law.to_json()) + "\n")
    return law.report(budgets or own)
