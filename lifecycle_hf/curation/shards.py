"""Shards of a corpus, and arrays that a block of the whole corpus writes between its passes."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lifecycle_hf.data.json_lines import whole_file


def read_texts(shards: Path, rank: int) -> Iterator[str]:
    """Yield the texts of shard `rank`, a file of JSON lines with a "text" each, which may be empty."""
    with (shards / f"{rank:05d}.jsonl").open("rb") as file:
        for line in file:
            yield json.loads(line)["text"]


def save_array(path: Path, array: np.ndarray) -> Path:
    """Write an array as .npy, whole or not at all, and return the path."""
    with whole_file(path) as file:
        np.save(file, array)
    return path
