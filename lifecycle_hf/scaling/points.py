"""Runs that were trained, as rows of a file."""

import csv
import json
from pathlib import Path

import numpy as np

from lifecycle_hf.scaling.law import COLUMNS


def read_points(path) -> np.ndarray:
    """[3, runs], the columns parameters, tokens and loss of a .csv or .jsonl file; others are left alone.

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


def load_runs(path, settings: dict) -> list[dict]:
    """The rows of a file that `save_runs` wrote, none where there is no file.

    Raises:
        ValueError: a row with other `settings`, whose loss can't be compared.
    """
    path = Path(path)
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for row in rows:
        for name, value in settings.items():
            if row["settings"].get(name) != value:
                found = row["settings"].get(name)
                raise ValueError(f"{path} has runs of {name}={found!r}, not {value!r}: give another output_dir.")
    return rows


def save_runs(path, rows: list[dict]) -> None:
    """Write rows as .jsonl, whole or not at all."""
    part = Path(path).with_suffix(".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    part.replace(path)
