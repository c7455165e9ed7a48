"""Interpolating two checkpoints from file to file against copying one of them: seconds, and memory of the process.

    export OMP_NUM_THREADS=1
    python benchmarks/interpolation.py               # two files of 540 MB; 2.7 GB of disk, about a minute
    python benchmarks/interpolation.py --dtypes BF16 --rounds 20

The sides take turns in one process, and the order changes with every round; what they write is deleted in between.
Wall and CPU seconds; ratios to `shutil.copyfile` are medians over rounds with the smallest and largest. Memory is the
peak of a process of its own that interpolates once, above what it had before.
"""

import argparse
import json
import multiprocessing
import shutil
import tempfile
from pathlib import Path
from statistics import median

import torch
from measuring import clocks, memory, prepare, show
from safetensors.torch import load_file, save_file

from lifecycle_hf.mitigation.interpolation import interpolate

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
VOCAB, HIDDEN, INTERMEDIATE, LAYERS = 49152, 576, 1536, 30
"""SmolLM2-135M's, whose weights in fp32 are 538 MB."""


def checkpoint(folder: Path, dtype: torch.dtype, seed: int) -> Path:
    """Random tensors of SmolLM2-135M's shapes, twice as many layers and tokens where two bytes make an entry."""
    generator, times = torch.Generator().manual_seed(seed), 4 // dtype.itemsize
    layer = {
        "q_proj": (HIDDEN, HIDDEN), "k_proj": (HIDDEN // 3, HIDDEN), "v_proj": (HIDDEN // 3, HIDDEN),
        "o_proj": (HIDDEN, HIDDEN), "gate_proj": (INTERMEDIATE, HIDDEN), "up_proj": (INTERMEDIATE, HIDDEN),
        "down_proj": (HIDDEN, INTERMEDIATE), "norm": (HIDDEN,),
    }  # fmt: skip
    shapes = {"embed_tokens.weight": (times * VOCAB, HIDDEN), "norm.weight": (HIDDEN,)}
    shapes |= {f"layers.{i}.{n}.weight": shape for i in range(times * LAYERS) for n, shape in layer.items()}
    folder.mkdir(parents=True)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def alone(base: Path, aligned: Path, output: Path, line) -> None:
    """Interpolates in this process; sends MiB before and the peak."""
    interpolate(base / "tiny", base / "tiny", 0.5, output / "tiny")  # imports and first allocations
    before, _ = memory(cuda=False)
    interpolate(base, aligned, 0.3, output / "alone")
    line.send((before, memory(cuda=False)[1]))


def timed(work) -> tuple[float, float]:
    cpu, wall = clocks(cuda=False)
    work()
    cpu_after, wall_after = clocks(cuda=False)
    return wall_after - wall, cpu_after - cpu


def measure(folder: Path, name: str, rounds: int) -> dict:
    """Seconds of both sides by round, MiB of a file, and MiB before and at the peak of an interpolation."""
    base, aligned = (checkpoint(folder / f"{name}_{i}", DTYPES[name], i) for i in (0, 1))
    source = aligned / "model.safetensors"
    (base / "tiny").mkdir()
    save_file({"w": torch.ones(9)}, base / "tiny" / "model.safetensors")
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    worker = context.Process(target=alone, args=(base, aligned, folder / f"{name}_out", there))
    worker.start()
    before, peak = here.recv()
    worker.join()
    check(base, aligned, folder / f"{name}_out" / "alone")
    shutil.rmtree(folder / f"{name}_out")
    sides = {
        "copy": lambda: shutil.copyfile(source, folder / "copy"),
        "interpolate": lambda: interpolate(base, aligned, 0.3, folder / "between"),
    }
    found = {side: [] for side in sides}
    for i in range(rounds + 1):
        for side in sides if i % 2 else reversed(sides):
            seconds = timed(sides[side])
            shutil.rmtree(folder / "between", ignore_errors=True)
            (folder / "copy").unlink(missing_ok=True)
            if i:  # the first round reads the files into the page cache
                found[side].append(seconds)
    return {"MiB": source.stat().st_size / 2**20, "before": before, "peak": peak} | found


def check(base: Path, aligned: Path, output: Path) -> None:
    """The file reads back, and its largest tensor is what torch makes of the whole two."""
    low, high, found = (
        load_file(path / "model.safetensors")["embed_tokens.weight"] for path in (base, aligned, output)
    )
    expected = (0.7 * low[:4096].double() + 0.3 * high[:4096].double()).to(found.dtype)
    torch.testing.assert_close(found[:4096], expected, rtol=2 * torch.finfo(found.dtype).eps, atol=1e-6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--folder", help="where the files are made, by default a temporary folder")
    parser.add_argument("--output", default="output/bench_interpolation.json")
    args = parser.parse_args()
    prepare()
    found, table = {}, []
    for name in args.dtypes:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            found[name] = result = measure(Path(folder), name, args.rounds)
        row = [name, result["MiB"]]
        for clock in (0, 1):
            copy, ours = ([times[clock] for times in result[side]] for side in ("copy", "interpolate"))
            ratios = [b / a for a, b in zip(copy, ours, strict=True)]
            row += [median(copy), median(ours), median(ratios), min(ratios), max(ratios)]
        table.append([*row, result["peak"] - result["before"], result["before"]])
    sides = " | ".join(f"copy, {clock} s | interpolate | ratio (min–max)" for clock in ("wall", "CPU"))
    header = f"dtype | MiB | {sides} | MiB above | floor, MiB"
    pattern = "{} | {:.0f}" + 2 * " | {:.3f} | {:.3f} | {:.2f} ({:.2f}–{:.2f})" + " | {:.1f} | {:.0f}"
    show("Interpolation of two checkpoints against the copy of one", header, pattern, table)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
