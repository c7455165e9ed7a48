"""Runs of the recipes in the toy world that stay on disk with what was measured of them, for benchmarks over seeds.

A run is a recipe with options. Its folder holds the model, `made_with.json` (the options), `log.txt` (what the recipe
printed) and `measured.json` (the values of every item). A run that is complete is not made again, so a benchmark that
was killed goes on where it stopped.
"""

import contextlib
import json
import multiprocessing
import os
import runpy
import sys
import time
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import numpy as np
from measuring import prepare

ROOT = Path(__file__).resolve().parents[1]
METRICS = {"gold_reward": True, "benign_accuracy": True, "facts": True, "refusal_rate": True, "perplexity": False}
"""What is measured of each run, and whether higher is better."""
TEXTS = {"ptx_dataset_name": "toyworld", "ptx_batch_size": 32, "ptx_max_length": 64}


@dataclass(frozen=True)
class Run:
    """A recipe with its options and the folder that keeps it; of `alpha` < 1 a model between the SFT model and it."""

    recipe: str
    options: dict = field(hash=False)
    folder: Path
    alpha: float = 1.0

    @property
    def command(self) -> list[str]:
        words = [f"recipes/{self.recipe}.py", "--output_dir", str(self.folder)]
        return words + [str(word) for name, value in self.options.items() for word in (f"--{name}", value)]

    @property
    def made_with(self) -> dict:
        return {"recipe": self.recipe, "alpha": self.alpha, "world": world()} | self.options


@cache
def world() -> str:
    """The key of the toy world's SFT and reward model, which changes with them: a run is of one world."""
    from lifecycle_hf import toyworld

    return toyworld.stage_checkpoint("reward").parent.name


def complete(run: Run, name: str) -> bool:
    """Whether the folder holds the file `name` of this very run.

    Raises:
        ValueError: the folder holds a run with other options.
    """
    noted = run.folder / "made_with.json"
    if not (run.folder / name).exists():
        return False
    if json.loads(noted.read_text()) != run.made_with:
        raise ValueError(f"{run.folder} holds a run made with {noted.read_text()}, not {run.made_with}: delete it.")
    return True


def train(run: Run) -> None:
    """Run the recipe in this process, as its command line would."""
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "made_with.json").write_text(json.dumps(run.made_with))
    argv, sys.argv = sys.argv, [run.command[0], *run.command[1:], "--disable_tqdm", "true"]
    try:
        with (
            (run.folder / "log.txt").open("w") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            runpy.run_path(str(ROOT / run.command[0]), run_name="__main__")
    except SystemExit as error:  # which would end a process of a pool, and the pool would wait for ever
        raise RuntimeError(f"{' '.join(run.command)} stopped; {run.folder / 'log.txt'} tells why.") from error
    finally:
        sys.argv = argv


def measure(folder, rows: int) -> dict:
    """The metrics of the model in `folder`, each a Measurement."""
    from lifecycle_hf import toyworld
    from lifecycle_hf.evaluation.metrics import multiple_choice
    from lifecycle_hf.models.loading import load_causal_lm, load_tokenizer

    model, tokenizer = load_causal_lm(str(folder)).eval(), load_tokenizer(str(folder))
    asked = toyworld.questions()
    facts = multiple_choice(model, tokenizer, asked["question"], asked["choices"], asked["answer"], batch_size=64).acc
    return toyworld.measure(model, tokenizer, n=rows) | {"facts": facts}


def make(run: Run, rows: int) -> float:
    """Train and measure the run unless that is done; returns the seconds that its training took."""
    os.chdir(ROOT)
    prepare()
    if run.alpha < 1 and not complete(run, "model.safetensors"):
        from lifecycle_hf import toyworld
        from lifecycle_hf.mitigation.interpolation import interpolate

        run.folder.mkdir(parents=True, exist_ok=True)
        interpolate(str(toyworld.stage_checkpoint("sft")), run.folder.parent / "alpha_1", run.alpha, run.folder)
        (run.folder / "measured.json").unlink(missing_ok=True)  # copied with the other files of the aligned model
        (run.folder / "made_with.json").write_text(json.dumps(run.made_with))
    start = time.perf_counter()
    if not complete(run, "model.safetensors"):
        train(run)
    seconds = time.perf_counter() - start
    if not complete(run, "measured.json"):
        text = {name: value.columns.tolist() for name, value in measure(run.folder, rows).items()}
        (run.folder / "measured.json").write_text(json.dumps(text))
    return seconds


def values_of(run: Run) -> dict:
    """The metrics of a run that was made, each a Measurement."""
    return read(run.folder / "measured.json")


def read(path: Path) -> dict:
    from lifecycle_hf.evaluation.bootstrap import Measurement, exp_ratio, first_column

    columns = json.loads(path.read_text())
    statistics = {"perplexity": exp_ratio}
    return {name: Measurement(items, statistics.get(name, first_column)) for name, items in columns.items()}


def _attempt(rows: int, run: Run) -> tuple[Run, float | Exception]:
    """`make`, with the error instead of the seconds if it fails."""
    try:
        return run, make(run, rows)
    except Exception as error:
        return run, error


def make_all(runs: list[Run], rows: int, workers: int) -> None:
    """Make all runs in `workers` processes, and say what each ended at."""
    world()  # built once, before the processes need it
    wanted = [run for run in runs if not complete(run, "measured.json")]
    failed = 0
    with multiprocessing.get_context("spawn").Pool(workers, maxtasksperchild=12) as pool:
        for run, result in pool.imap_unordered(partial(_attempt, rows), wanted):
            if isinstance(result, Exception):
                failed += 1
                print(f"failed: {run.folder}: {result}", flush=True)
                continue
            found = ", ".join(f"{name} {float(value):.3f}" for name, value in values_of(run).items())
            print(f"{'/'.join(run.folder.parts[-4:])} in {result:.0f} s: {found}", flush=True)
    if failed:
        raise RuntimeError(f"{failed} of {len(wanted)} runs failed; run the benchmark again to make these alone.")


def base_values(rows: int, folder: Path) -> dict:
    """The metrics of the model that every run starts from."""
    from lifecycle_hf import toyworld

    path = folder / f"sft_{world()}_{rows}.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        found = measure(toyworld.stage_checkpoint("sft"), rows)
        path.write_text(json.dumps({name: value.columns.tolist() for name, value in found.items()}))
    return read(path)


def spread(values: list) -> str:
    """Mean (smallest to largest)."""
    numbers = [float(value) for value in values]
    return f"{np.mean(numbers):.3f} ({min(numbers):.3f} to {max(numbers):.3f})"
