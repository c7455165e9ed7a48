"""Read and write the tensors of safetensors checkpoints piece by piece, by their places in the files."""

import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken")
"""Files of a checkpoint other than its weights: configs, tokenizer, index, code."""
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
PIECE = 2**18
"""Number of entries of a tensor that are in memory at one time."""


class Stored(NamedTuple):
    """Hold the place of a tensor: file, dtype as safetensors names it, shape, and the bytes from `start` to `end`."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def checkpoint_folder(name: str | Path) -> Path:
    """Return the folder of a checkpoint, and download it first if `name` is a Hub name.

    Raises:
        ValueError: `name` is neither a folder nor a possible Hub name.
    """
    if Path(name).is_dir():
        return Path(name)
    if not HUB_ID.fullmatch(str(name)):
        raise ValueError(f"There is no folder {name}, and it can't be a Hub name: give a folder or owner/name.")
    weights = ("model*.safetensors", "adapter_model.safetensors")
    return Path(snapshot_download(str(name), allow_patterns=[*weights, *COMPANIONS], ignore_patterns="*/*"))


def read_checkpoint(folder: Path) -> dict[str, Stored]:
    """Return the places of all tensors of a checkpoint (full model or adapter, one file or several), in file order.

    Raises:
        ValueError: there are no safetensors, a file is damaged or missing, or the weights are quantised.
    """
    config = folder / "config.json"
    if config.exists() and json.loads(config.read_text()).get("quantization_config"):
        raise ValueError(f"{folder} is quantised, so its weights can't be averaged: dequantise and save it first.")
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = set(json.loads(index.read_text())["weight_map"].values())
    else:
        names = [name for name in ("adapter_model.safetensors", "model.safetensors") if (folder / name).exists()][:1]
    if not names:
        raise ValueError(f"{folder} has no safetensors checkpoint: save the model with save_pretrained.")
    tensors = {}
    for path in sorted(folder / name for name in names):
        try:
            with safe_open(path, framework="pt"):  # safe_open checks lengths and offsets
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} can't be read: {error}. Download or save the checkpoint again.") from error
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            tensors[name] = Stored(path, entry["dtype"], tuple(entry["shape"]), start, end)
    return tensors


def piece_buffers() -> tuple[torch.Tensor, torch.Tensor]:
    """Return two buffers, so that [`pieces`] can read two tensors at the same time; reuse them for all tensors."""
    return tuple(torch.empty(2, PIECE * torch.float64.itemsize, dtype=torch.uint8))


def pieces(entry: Stored, buffer: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the bytes of a tensor, PIECE entries at a time; each piece overwrites the previous one in `buffer`.

    The file is read, not memory-mapped: mapped pages would count as memory of the process while the file is open.

    Raises:
        ValueError: the file ended early.
    """
    step = PIECE * ((entry.end - entry.start) // max(math.prod(entry.shape), 1))
    with entry.path.open("rb", buffering=0) as file:
        for at in range(entry.start, entry.end, step or 1):
            piece = buffer[: min(step, entry.end - at)]
            if os.preadv(file.fileno(), [piece.numpy()], at) != len(piece):
                raise ValueError(f"{entry.path} ended early: it changed while it was read. Start again.")
            yield piece


def find_twin(name: str, tensors: dict[str, Stored], names: Iterable[str]) -> str | None:
    """Return the matrix among `names` that has the same bytes as `name`, as a tied weight has that was saved twice."""
    entry, (mine, its) = tensors[name], piece_buffers()
    for other in (n for n in sorted(names) if tensors[n][1:3] == entry[1:3] and len(entry.shape) > 1):
        if all(map(torch.equal, pieces(entry, mine), pieces(tensors[other], its))):
            return other
    return None


def write_like(path: Path, model: Path, tensors: dict[Stored, Iterable[torch.Tensor]]) -> None:
    """Write a file that has the header of the file `model` and the given bytes for each of its tensors."""
    order = sorted(tensors, key=lambda entry: entry.start)
    with model.open("rb") as header, path.open("wb") as out:
        out.write(header.read(order[0].start))
        for entry in order:
            out.writelines(piece.numpy() for piece in tensors[entry])
