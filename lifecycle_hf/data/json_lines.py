"""Rows in files of JSON lines that a run adds to as it goes, and finds again after it was killed."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


def check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Write the settings of a folder, or compare them with those that it was made with.

    Raises:
        ValueError: a setting differs; names it and both values.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(settings).encode())
        return
    before = json.loads(path.read_text())
    for name, value in settings.items():
        if before.get(name) != value:
            raise ValueError(
                f"{path.parent} holds samples made with {name}={before.get(name)!r}, and this run has {value!r}: give "
                "the same, another output_dir, or delete that folder."
            )


def append_samples(path: Path, rows: list[dict]) -> list[dict]:
    """Append rows to a file of JSON lines, whole and on the disk, and return them."""
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        file.flush()
        os.fsync(file.fileno())
    return rows


def read_samples(path: Path) -> list[dict]:
    """Return the rows of a file of JSON lines, [] if there is none; a last batch that was cut off is taken out.

    A batch is the rows with one "start"; "of" is their number. A row without them is a batch by itself.
    """
    if not path.exists():
        return []
    found = path.read_bytes()  # a kill may leave part of a character
    lines = [line + b"\n" for line in found.split(b"\n")[:-1]]
    rows = [json.loads(line) for line in lines]
    sizes = Counter(row.get("start") for row in rows)
    whole = [i for i, row in enumerate(rows) if "of" not in row or sizes[row["start"]] == row["of"]]
    kept = b"".join(lines[i] for i in whole)
    if kept != found:
        write_whole(path, kept)
    return [rows[i] for i in whole]


def write_samples(path: Path, rows: list[dict]) -> None:
    """Write rows as a file of JSON lines, which is there whole or not at all."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all when the process is killed."""
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(content)
    part.replace(path)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write to, which appears under its name when all of it is written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            yield file
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
