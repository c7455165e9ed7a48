"""Run blocks over a corpus that may be larger than memory, on datatrove's executors; a killed run goes on."""

import json
import os
import re
import shutil
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.utils.logging import logger
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from lifecycle_hf.curation import steps
from lifecycle_hf.curation.decisions import Block, CorpusBlock, Pass
from lifecycle_hf.curation.reading import COLUMNS, input_files
from lifecycle_hf.data.json_lines import check_settings, write_whole
from lifecycle_hf.evaluation.pictures import plot_funnel
from lifecycle_hf.evaluation.report import json_ready
from lifecycle_hf.scaling.tables import terminal_table

POLL = 0.5
"""Seconds between looks at the completed tasks."""


def curate(
    source: str | Path, output_dir: str | Path, blocks: Sequence[Block | CorpusBlock], *, workers: int = 1,
    tasks: int = 8, columns: Mapping[str, str] | None = None, output_format: str = "parquet",
    tokenizer: str | None = None, strict_data: bool = False, executor: Callable | None = None,
) -> dict:  # fmt: skip
    """Apply blocks to the documents of files in their order, write the clean corpus, and return the report.

    A run that was killed goes on where it stopped, and ends with the same files. The files of a run do not depend on
    `workers`. The folder:

    - `data`: the clean corpus, as `train-RANK-of-TASKS.parquet` or `.jsonl`, with "id", "text", "url", "domain" and a
      column for each score. `load_dataset(output_dir)` and `recipes/pretrain.py` take it as it is.
    - `removed/STEP`: {"id", "reason", "text", "scores"} of each document that the step removed, and {"id", "reason",
      "start", "end"} of each span that it cut out or replaced, in the text that the step was given. `removed/read`:
      the place of each row that can't be used.
    - `report.json`: documents, bytes and tokens after each step, and counts of the reasons; `funnel.png` draws them.
    - `settings.json`, and while the run lasts `work`: shards, counts, and the logs of datatrove.

    Args:
        source: a file or folder of JSON lines, CSV, Parquet, WARC, WET or text files, also as .gz or .zst.
        blocks: with different names; functions as `Block`s are.
        workers: local processes.
        tasks: parts that the corpus is cut into. A task holds at most 1,000 documents at a time.
        columns: names of the columns "text", "id", "url" and "domain" where they differ. A document without id gets
            "FILE:ROW".
        output_format: "parquet" or "jsonl".
        tokenizer: name or path of the tokenizer that counts tokens; words and signs are counted without one.
        strict_data: raise on the first row that can't be used instead of counting it.
        executor: makes datatrove's executor of a pass from `pipeline`, `tasks` and `logging_dir`, such as
            `partial(SlurmPipelineExecutor, time="4:00:00", partition="cpu")`; local processes by default.

    Raises:
        ValueError: an option is wrong, the folder was made with other settings or is in use, there is no document, or
            with `strict_data` a row can't be used.
        OSError: the disk is full. Nothing in `data` is half written, and a second start goes on.
    """
    source, output, work = Path(source).resolve(), Path(output_dir).resolve(), Path(output_dir).resolve() / "work"
    columns = {name: name for name in COLUMNS} | dict(columns or {})
    _check(source, output, blocks, workers, tasks, columns, output_format)
    files, left_out = input_files(source)
    settings = {"source": str(source), "files": len(files), "bytes": sum(file.stat().st_size for file in files)}
    settings |= {"tasks": tasks, "columns": columns, "output_format": output_format, "tokenizer": tokenizer}
    settings |= {"strict_data": strict_data, "steps": [block.name for block in blocks]} | _settings(blocks)
    check_settings(output / "settings.json", settings)
    if not (output / "report.json").exists():
        with ExitStack() as stack:
            stack.enter_context(_alone(work))
            passes, shards = _passes(source, work, blocks, tasks, columns, tokenizer, strict_data)
            stack.enter_context(_progress(work / "logs", sum(part.tasks for part in passes.values()) + tasks))
            _run(passes, work, workers, executor)
            counts = {name: steps.read_counts(work, name) for name in ("read", *settings["steps"])}
            if not counts["read"]["documents"]:
                raise ValueError(f"{source} has no document with text: {counts['read']['removed'] or 'no rows'}.")
            scores = sorted({name for count in counts.values() for name in count.pop("scores")})
            write = [steps.ReadShard(shards), steps.WriteData(work / "data", output_format, scores)]
            _run({"data": Pass(tasks, write)}, work, workers, executor)
            told = {"source": str(source), "files": len(files), "left_out": left_out, "tokenizer": tokenizer}
            _publish(told | {"steps": [{"step": name} | count for name, count in counts.items()]}, output)
    shutil.rmtree(work, ignore_errors=True)
    return json.loads((output / "report.json").read_text())


def _check(source, output, blocks, workers, tasks, columns, output_format) -> None:
    names = [block.name for block in blocks]
    faults = {
        f"workers={workers} and tasks={tasks}: at least one of each is needed": min(workers, tasks) < 1,
        f"blocks: the names {names} must differ from each other and from 'read'": len({*names, "read"}) <= len(names),
        f"columns: {sorted(columns)}, known are {', '.join(COLUMNS)}": len(columns) > len(COLUMNS),
        f"output_format={output_format!r} is neither 'parquet' nor 'jsonl'": output_format not in ("parquet", "jsonl"),
        f"output_dir {output} is inside the input {source}: give another one": output.is_relative_to(source),
        f"output_dir {output} has other files already: give another one": not (output / "settings.json").exists()
        and any((output / name).exists() for name in ("data", "removed", "work")),
    }
    for message, found in faults.items():
        if found:
            raise ValueError(f"curate: {message}.")


def _settings(blocks) -> dict:
    """Return the public attributes of all blocks: plain values, long ones as a hash, and the type of others."""

    def plain(value):
        if isinstance(value, set | frozenset):
            return sorted(map(str, value))
        return value.pattern if isinstance(value, re.Pattern) else type(value).__qualname__

    found = {}
    for block in blocks:
        for name, value in sorted(getattr(block, "__dict__", {}).items()):
            if name.startswith("_") or name == "name":
                continue
            text = json.dumps(value, default=plain, sort_keys=True)
            found[f"{block.name}.{name}"] = json.loads(text) if len(text) < 200 else sha256(text.encode()).hexdigest()
    return found


def _passes(source, work: Path, blocks, tasks: int, columns, tokenizer, strict) -> tuple[dict[str, Pass], Path]:
    """Return the passes by name, and the folder of the shards after the last one.

    A pass reads the input or shards, applies the decisions of a block of the corpus and then all blocks up to the next
    one of the corpus, and writes shards.
    """
    passes, number, shards = {}, 0, None
    read = steps.ReadInput(source, work, columns, tokenizer, strict)
    blocks = list(blocks)
    while blocks or shards is None:
        decided = None
        if shards is not None:
            corpus, own = blocks.pop(0), work / "corpus" / str(number)
            own.mkdir(parents=True, exist_ok=True)
            made = enumerate(corpus.passes(shards, own, tasks))
            passes |= {f"{number}_{corpus.name}_{i}": part for i, part in made}
            decided, read = (corpus, own), steps.ReadShard(shards)
        streaming = []
        while blocks and not hasattr(blocks[0], "passes"):
            streaming.append(blocks.pop(0))
        shards = work / "shards" / str(number)
        several = [steps.ApplyBlocks(streaming, work, tokenizer, decided)] if streaming or decided else []
        passes[f"{number}_documents"] = Pass(tasks, [read, *several, steps.WriteShard(shards)])
        number += 1
    return passes, shards


def _run(passes: Mapping[str, Pass], work: Path, workers: int, executor: Callable | None) -> None:
    """Run passes in their order; tasks that an earlier start completed are not run again."""
    for name, (tasks, parts) in passes.items():
        local = {} if executor else {"workers": min(workers, tasks)}
        make = executor or LocalExecutor
        run = make(pipeline=parts, tasks=tasks, logging_dir=str(work / "logs" / name), **local)
        run.run()
        while run.get_incomplete_ranks(skip_completed=True):  # Slurm's jobs are only queued by now
            time.sleep(POLL)


class LocalExecutor(LocalPipelineExecutor):
    """Run tasks in local processes that end with a killed run, and that print nothing.

    A worker that is killed, as by lack of memory, ends the run; datatrove's own executor would wait for it, and leave
    a process behind when it is killed itself.
    """

    def run(self):
        """Run the tasks that are not completed."""
        ranks = self.get_incomplete_ranks()
        if self.workers == 1:
            for rank in ranks:
                self._run_for_rank(rank)
        elif ranks:
            context = get_context("forkserver")
            context.set_forkserver_preload(["__main__", __name__])
            with ProcessPoolExecutor(min(self.workers, len(ranks)), context, _join, (self, os.getpid())) as pool:
                deque(pool.map(_run_task, ranks), maxlen=0)

    def _run_for_rank(self, rank, local_rank=1, node_rank=-1):
        logger.disable("datatrove.executor")  # an error is raised, and need not be printed too
        try:
            super()._run_for_rank(rank, local_rank, node_rank)
        finally:
            logger.enable("datatrove.executor")


_joined: list[LocalExecutor] = []
"""The executor whose tasks this process runs, as its worker; so blocks load their lists and models once."""


def _join(executor: LocalExecutor, owner: int) -> None:
    """Make this process a worker of an executor, which ends soon after the process `owner`."""

    def watch():
        with suppress(ProcessLookupError):
            while True:
                os.kill(owner, 0)  # only asks whether it is there
                time.sleep(0.1)
        os._exit(1)

    _joined.append(executor)
    threading.Thread(target=watch, daemon=True).start()


def _run_task(rank: int) -> None:
    _joined[0]._run_for_rank(rank)


@contextmanager
def _progress(logs: Path, total: int) -> Iterator[None]:
    """Show a bar of the completed tasks of all passes."""
    done = threading.Event()
    with tqdm(total=total, desc="Curation", unit=" tasks") as bar:

        def look():
            if found := len(list(logs.glob("*/completions/*"))) - bar.n:
                bar.update(found)

        def watch():
            while not done.wait(POLL):
                look()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            look()


@contextmanager
def _alone(work: Path) -> Iterator[None]:
    work.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(work / "lock", timeout=0):
            yield
    except Timeout:
        raise ValueError(f"{work.parent} is in use by another run. Wait for it, or stop it.") from None


def _publish(report: dict, output: Path) -> None:
    """Move the data and what was removed to their place, draw the funnel, and write the report last."""
    before = None
    for row in report["steps"]:
        if before and not row["documents"]:
            told = f"The step {row['step']!r} removed all {before:,} documents that were left: see {output}/removed."
            warnings.warn(f"{told} Change its options, and start with another output_dir.", stacklevel=3)
        before = row["documents"]
    for name in ("removed", "data"):
        made = output / "work" / name
        for part in made.rglob(".*.part") if made.exists() else ():  # of a killed run
            part.unlink()
        if made.exists():  # else an earlier start moved it
            made.replace(output / name)
    plot_funnel(report["steps"], output / "funnel.png")
    write_whole(output / "report.json", json.dumps(json_ready(report), indent=2, ensure_ascii=False).encode())


def funnel_table(report: dict) -> str:
    """Return the table of a report: what is left after each step, and the reasons with their counts."""
    headings, cells = ["step", "documents", "bytes", "tokens", "removed documents and spans"], []
    for row in report["steps"]:
        reasons = [f"{name} {count:,}" for kind in ("removed", "spans") for name, count in row[kind].items()]
        cells.append([row["step"], *(f"{row[name]:,}" for name in headings[1:4]), ", ".join(reasons)])
    return terminal_table(headings, cells, left=headings[4:], title="What is left after each step")
