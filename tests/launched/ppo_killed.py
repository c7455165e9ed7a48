"""Kills runs of recipes/ppo.py by SIGKILL, resumes them, and compares what they leave with a run that was left alone.

Arguments: folder for the runs, how many kills, seed, what to kill at by commas (see `Kill`), the recipe's options.
Every run is a process of its own, forked after the imports. Prints what was hit and what was wrong.
"""

import io
import json
import os
import random
import runpy
import select
import signal
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice, pairwise
from pathlib import Path

import bitsandbytes  # noqa: F401  (here and below: what a forked run need not import again)
import numpy as np
import torch
from safetensors.torch import load_file
from transformers.trainer_utils import get_last_checkpoint

from lifecycle_hf import PPOTrainer, cli
from lifecycle_hf.cli import running
from lifecycle_hf.trainers.base.callbacks import TaxMonitor
from lifecycle_hf.trainers.policy.rollout import RolloutMaker

RECIPE = Path(__file__).parents[2] / "recipes" / "ppo.py"
WATCHED = (
    ("measuring", TaxMonitor, "_measure"),
    ("rollout", RolloutMaker, "make"),
    ("update", PPOTrainer, "training_step"),
    ("update", torch.optim.AdamW, "step"),
    ("saving", PPOTrainer, "_save_checkpoint"),
    ("finishing", cli, "finish"),
)
FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
OF_THIS_CALL = ("per_second", "_runtime", "_time", "train_loss")
NOT_COMPARED = (".bin", ".md", ".png")
"""Files that name the folder they are in, or show times."""


@dataclass
class Kill:
    """When a run is killed.

    Args:
        at: "time", `delay` after the start; "rollout", "update", "saving" or "finishing", `delay` into it; "file", as
            a checkpoint being saved opens, makes, renames or removes a file or folder.
        count: which one it is of those that come after the start, from 1 on.
        delay: seconds.
    """

    at: str
    count: int = 1
    delay: float = 0.0


class Reporter:
    """Tells the parent of a run what the run is doing, one word a line."""

    def __init__(self, pipe, die_at_file):
        self.pipe, self.doing, self.files, self.die_at_file = pipe, ["elsewhere"], 0, die_at_file
        for word, owner, name in WATCHED:
            setattr(owner, name, self.watched(word, getattr(owner, name)))
        sys.addaudithook(self.on_event)

    def tell(self, word):
        os.write(self.pipe, f"{word}\n".encode())

    def watched(self, word, function):
        def call(*args, **kwargs):
            self.doing.append("measuring" if self.doing[-1] == "measuring" else word)
            self.tell(self.doing[-1])
            try:
                return function(*args, **kwargs)
            finally:
                self.doing.pop()
                self.tell(self.doing[-1])

        return call

    def on_event(self, event, arguments):
        if self.doing[-1] != "saving" or event not in FILE_EVENTS:
            return
        self.files += 1
        if self.files == self.die_at_file:
            os.kill(os.getpid(), signal.SIGKILL)
        self.tell("file")


def run_recipe(options, pipe, log, die_at_file):
    """What the forked process does; it does not return."""
    status = 1
    try:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log, stream.fileno())
        Reporter(pipe, die_at_file)
        keep_final_state()
        sys.argv = [str(RECIPE), *options]
        runpy.run_path(str(RECIPE), run_name="__main__")
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def keep_final_state():
    train_and_report = running.train_and_report

    def keep(trainer, *args):
        train_and_report(trainer, *args)
        state = {"log_history": trainer.state.log_history, "step": trainer.state.global_step}
        for name in ("kl_control", "reward_moments"):
            state[name] = trainer.stateful[name].state_dict()
        (Path(trainer.args.output_dir) / "final.json").write_text(json.dumps(state))

    running.train_and_report = keep


def run(folder, options, kill=None):
    """Runs the recipe, from the last checkpoint where there is one: the same command at every start.

    Returns [(time, what it did from then on)] of the run, and its status as `os.waitpid` gives it.
    """
    options = [*options, "--output_dir", str(folder), "--resume_from_checkpoint", "true"]
    read, write = os.pipe()
    log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    pid = os.fork()
    if pid == 0:
        os.close(read)
        run_recipe(options, write, log, kill.count if kill and kill.at == "file" else None)
    os.close(write), os.close(log)
    with open(read, "rb", buffering=0) as pipe:
        words = follow(pid, pipe, kill)
    return words, os.waitpid(pid, 0)[1]


def follow(pid, pipe, kill):
    """What a run says until it ends, by itself or by `kill`."""
    words, rest, met = [(time.monotonic(), "elsewhere")], b"", 0
    deadline = time.monotonic() + kill.delay if kill and kill.at == "time" else float("inf")
    while True:
        waiting = min(max(deadline - time.monotonic(), 0), 3600)
        if not select.select([pipe], [], [], waiting)[0]:
            os.kill(pid, signal.SIGKILL)
            deadline = float("inf")
            continue
        data = pipe.read(io.DEFAULT_BUFFER_SIZE)
        if not data:
            return words
        now = time.monotonic()
        *lines, rest = (rest + data).split(b"\n")
        for word in (line.decode() for line in lines):
            words.append((now, word))
            met += kill is not None and word == kill.at != "file"
            if kill and word == kill.at and met == kill.count:
                deadline = now + kill.delay


def last_step(folder):
    """The optimizer step of the last checkpoint, 0 where there is none."""
    last = get_last_checkpoint(folder) if folder.is_dir() else None
    return int(last.rpartition("-")[2]) if last else 0


def draw_kill(generator, whole, steps, at, output):
    """A random moment of the kind `at` in what is left of a run.

    Args:
        whole: what the run that was left alone did, and when; it made so many `steps`.
        output: folder of the run.
    """
    if at == "time":
        return Kill(at, delay=generator.uniform(0, whole[-1][0] - whole[0][0]))
    done = last_step(output) / steps
    durations = [later - now for (now, word), (later, _) in pairwise(whole) if word == at]
    ahead = durations[min(round(len(durations) * done), len(durations) - 1) :]
    index = generator.randrange(len(ahead))
    return Kill(at, count=index + 1, delay=generator.random() ** 2 * ahead[index])


def contents(folder):
    """{file below the folder: what it holds}, without times.

    safetensors writes to a file named .tmp and something before it renames it: a kill may leave that.
    """
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".tmp"))
    return {str(path.relative_to(folder)): read_file(path) for path in files if path.suffix not in NOT_COMPARED}


def read_file(path):
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix in (".pt", ".pth"):
        return torch.load(path, weights_only=False)
    return without_times(json.loads(path.read_text())) if path.suffix == ".json" else path.read_text()


def without_times(value):
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if not k.endswith(OF_THIS_CALL)}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def differences(a, b, name=""):
    """Where two values of the same kind differ: their paths, with the values where these are short."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = list(a) + [key for key in b if key not in a]
        return [d for key in keys for d in differences(a.get(key), b.get(key), f"{name}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{name}/{i}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        equal = a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        equal = np.array_equal(a, b)
    else:
        equal = a is b or (type(a) is type(b) and (a == b or (a != a and b != b)))
    return [] if equal else [f"{name}: {str(a)[:40]!r} became {str(b)[:40]!r}"]


def half_written(folder, required):
    """What is wrong with the checkpoints of a run that was killed: each must be complete."""
    wrong = []
    for checkpoint in folder.glob("checkpoint-*"):
        try:
            missing = sorted(required - contents(checkpoint).keys())
            wrong += [f"{checkpoint.name} lacks {missing}"] if missing else []
        except Exception as error:
            wrong.append(f"{checkpoint.name} can't be read: {error!r}")
    return wrong


def changed(expected, output):
    """Where a run ended otherwise than it should have.

    A kill after the last checkpoint was written and before older ones were removed may leave one of these.
    """
    found, wrong = contents(output), []
    folders = {name.partition("/")[0] for name in expected}
    kept = {name: x for name, x in found.items() if name[:11] != "checkpoint-" or name.partition("/")[0] in folders}
    for what, names in (("missing", expected.keys() - kept.keys()), ("unexpected", kept.keys() - expected.keys())):
        wrong += [f"{what}: {', '.join(sorted(names))}"] if names else []
    return wrong + [d for name in expected.keys() & kept.keys() for d in differences(expected[name], kept[name], name)]


def kill_and_resume(output, options, kinds, draw, required):
    """Starts a run again and again, until it ends by itself.

    Args:
        kinds: what to kill at, one after the other; once through them the run is left alone.
        draw: from a kind and the run's folder to a kill.
        required: the files that every checkpoint must have.

    Returns what it was killed at, [(`Kill.at`, what it did then, step to resume at)], and what was wrong after that.
    """
    hit, wrong = [], []
    while True:
        kill = draw(kinds[len(hit)], output) if len(hit) < len(kinds) else None
        words, status = run(output, options, kill)
        if not os.WIFSIGNALED(status):
            break
        doing = next(word for _, word in reversed(words) if word != "file")
        hit.append((kill.at, doing, last_step(output)))
        wrong += [f"{output.name}, {kill}, when {doing}: {what}" for what in half_written(output, required)]
    if status:
        raise SystemExit(f"killed at {hit}: {wrong}\n{output.with_suffix('.log').read_text()[-5000:]}")
    return hit, wrong


def main(folder, kills, seed, kinds, *options):
    folder, kinds = Path(folder), list(islice(cycle(kinds.split(",")), int(kills)))
    whole, status = run(folder / "whole", options)
    if status:
        raise SystemExit((folder / "whole.log").read_text())
    expected = contents(folder / "whole")
    required = set.intersection(*(set(contents(path)) for path in (folder / "whole").glob("checkpoint-*")))
    draw = partial(draw_kill, random.Random(int(seed)), whole, expected["final.json"]["step"])
    hit, wrong, runs = [], [], 0
    while len(hit) < len(kinds):
        runs += 1
        output = folder / f"run-{runs}"
        new, half = kill_and_resume(output, options, kinds[len(hit) :], draw, required)
        hit, wrong = hit + new, wrong + half
        others = changed(expected, output)
        wrong += [f"{output.name}, killed at {new}: {len(others)} differences: {others[:20]}"] if others else []
    kinds_hit, doing, resumed = (Counter(column) for column in zip(*hit))
    found = {"kills": kinds_hit, "doing": doing, "resumed_at": resumed, "runs": runs, "wrong": wrong}
    print("RESULT killed " + json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
