"""What the benchmarks share: processes that take turns, clocks, memory, tables."""

import gzip
import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import torch
from scipy import stats

CACHE = Path.home() / ".cache" / "lifecycle_hf" / "bench"


def prepare() -> None:
    """Here and in the workers one thread unless told, and no progress bars; a side that waits burns no CPU."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ |= {"OMP_WAIT_POLICY": "passive", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    datasets.disable_progress_bars()


def alternate(work: Callable, given: dict[str, tuple], rounds: int) -> tuple[dict[str, object], dict[str, list]]:
    """Runs `work(side, *given[side], connection, folder)` in a process for each side, and their rounds in turn.

    A worker sends something when it is ready and one thing for every go that it gets; then it gets an end.

    Returns:
        what each side sent when it was ready, and for every round.
    """
    context, lines, workers, ready = multiprocessing.get_context("spawn"), {}, [], {}
    answers = {side: [] for side in given}
    with tempfile.TemporaryDirectory() as folder:
        for side in given:  # one after the other, up to the first round
            lines[side], there = context.Pipe()
            workers.append(
                context.Process(target=work, args=(side, *given[side], there, f"{folder}/{side}"), daemon=True)
            )
            workers[-1].start()
            there.close()
            ready[side] = lines[side].recv()
        for i in range(rounds):
            for side in given if i % 2 == 0 else reversed(given):
                lines[side].send("go")
                answers[side].append(lines[side].recv())
        for side, worker in zip(given, workers):
            lines[side].send("end")
            worker.join()
    return ready, answers


def installed(package: str, version: str) -> Path:
    """The folder that holds this version of a package and nothing else; it is installed there where it is not yet."""
    folder = CACHE / f"{package}-{version}"
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as new:
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", f"{new}/it"]
            subprocess.run([*command, f"{package}=={version}"], check=True)
            os.rename(f"{new}/it", folder)
    return folder


def read_rows(path: str) -> list[dict]:
    """The rows of a .jsonl or .jsonl.gz file."""
    with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def memory(cuda: bool) -> tuple[float, float]:
    """Now, and the peak since it was last reset, MiB: of the process, or of torch's allocator on CUDA."""
    if cuda:
        return torch.cuda.memory_allocated() / 2**20, torch.cuda.max_memory_allocated() / 2**20
    # Not ru_maxrss, which a process inherits from the one that started it.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]) / 1024, int(status["VmHWM"].split()[0]) / 1024


def clocks(cuda: bool) -> tuple[float, float]:
    """CPU seconds, user and system of all threads, and wall seconds, with all that CUDA was given to do done."""
    if cuda:
        torch.cuda.synchronize()
    return time.process_time(), time.perf_counter()


def matrix_rate(dtype: torch.dtype, size: int = 1024) -> float:
    """FLOP per CPU second of a matrix product on the threads in use, the best of a few."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(8):
        start = time.process_time()
        torch.mm(a, b.t())  # as a linear layer does it; other layouts may have no fast kernel
        seconds.append(time.process_time() - start)
    return 2 * size**3 / min(seconds)


def bf16_peak() -> float:
    """FLOP/s of the CUDA device, NaN where it is not known."""
    from lifecycle_hf.trainers.supervised.pretraining import peak_flops

    return peak_flops(torch.device("cuda")) or math.nan


def show(title: str, header: str, pattern: str, rows: list[list]) -> None:
    """A Markdown table; `pattern` formats the cells of a row."""
    lines = [header, " | ".join(["---:"] * (header.count("|") + 1)), *(pattern.format(*row) for row in rows)]
    print(f"\n## {title}\n\n" + "\n".join(f"| {line} |" for line in lines), flush=True)


def interval_over_seeds(first, second, level=0.95, resamples=2000):
    """(difference, low, high) of a metric between two settings, each a list of its `Measurement`s by seed.

    Of one seed the bootstrap's over items; of several Student's t over seeds, the items' spread added. Values that are
    no `Measurement`s have no interval.
    """
    pairs = list(zip(first, second, strict=True))
    differences = np.array([float(a) - float(b) for a, b in pairs])
    estimate, seeds = float(differences.mean()), len(pairs)
    if not all(hasattr(value, "columns") for pair in pairs for value in pair):
        return estimate, np.nan, np.nan
    n = len(pairs[0][0].columns)
    weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), resamples) / n
    draws = np.mean([a.statistic(weights @ a.columns) - b.statistic(weights @ b.columns) for a, b in pairs], 0)
    ends = [(1 - level) / 2, (1 + level) / 2]
    if seeds == 1:
        return estimate, *map(float, np.quantile(draws, ends))
    half = stats.t.ppf(ends[1], seeds - 1) * np.sqrt(differences.var(ddof=1) / seeds + draws.var())
    return estimate, float(estimate - half), float(estimate + half)
