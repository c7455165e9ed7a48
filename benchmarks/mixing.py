"""Drawing from a mixture of 100 tasks with 10^6 rows against a training step, and memory against the largest task.

    export OMP_NUM_THREADS=1
    python benchmarks/mixing.py             # about five minutes on one core
    python benchmarks/mixing.py --smoke     # in small

The rows are sentences of random words with `instruction`, `input` and `output`, half of them with a chain of thought,
as Arrow files in a temporary folder; the largest of the 100 tasks has 19 % of them. A step is forward, backward and
AdamW of a lifecycle model of 10M parameters on 8 rows of 256 tokens. Times are CPU seconds of the process, medians
over rounds in which the sides take turns:

- draw: which task and row, as numbers. render: the stream of chats, with it. tokenise: the chats in a chat template as
  token ids, with both. SFTTrainer: what its loader yields, with the check of every row before it is tokenised.

A training row is one draw. With packing, a row of 256 tokens holds several draws, so the last column tells the share
of a step of 2,048 drawn tokens. Memory is that of a new process: anonymous memory, which the mixture itself takes, and
all memory with the pages of the Arrow files, which the kernel can drop. Both are peaks over building the mixture and
1,000 draws of a mixture of a task of 1,000 rows and of one of N, without max_rows.
"""

import argparse
import json
import tempfile
import threading
import time
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import numpy as np
import torch
from datasets import Dataset
from measuring import memory, prepare, show

from lifecycle_hf import (
    InstructionMixture,
    InstructionTask,
    LifecycleConfig,
    LifecycleForCausalLM,
    SFTConfig,
    SFTTrainer,
)
from lifecycle_hf.data.corpora import python_documentation, train_tokenizer
from lifecycle_hf.data.tokenize import conversation_texts, encode_texts

FAMILIES = ("classification", "qa", "summarization", "generation", "maths", "extraction")
SIZES = {"vocab_size": 8192, "hidden_size": 320, "intermediate_size": 864, "num_hidden_layers": 6,
         "num_attention_heads": 5, "num_key_value_heads": 5, "max_position_embeddings": 256,
         "tie_word_embeddings": True}  # fmt: skip
BATCH, LENGTH = 8, 256
CHAT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def write_task(folder: Path, rows: int, rng: np.random.Generator) -> Path:
    """A task of random words: 10 of instruction, 30 of input, 5 of output and 15 of chain."""
    words = np.array([f"word{n}" for n in range(1000)])
    pieces = [" ".join(rng.choice(words, 15)) for _ in range(2000)]

    def texts(longest):
        return [" ".join(pieces[i].split(" ", longest)[:longest]) for i in rng.integers(len(pieces), size=rows)]

    chains = [chain if number % 2 else None for number, chain in enumerate(texts(15))]
    inputs = [f"{first} {second}" for first, second in zip(texts(15), texts(15))]
    made = {"instruction": texts(10), "input": inputs, "output": texts(5), "chain": chains}
    Dataset.from_dict(made).save_to_disk(folder)
    return folder


def write_tasks(folder: Path, tasks: int, rows: int) -> list[InstructionTask]:
    """Tasks whose sizes fall as 1 / rank."""
    shares = 1 / np.arange(1, tasks + 1)
    sizes = np.maximum(np.round(rows * shares / shares.sum()), 1).astype(int)
    sizes[0] += rows - sizes.sum()
    paths = [write_task(folder / f"task{n}", int(size), np.random.default_rng(n)) for n, size in enumerate(sizes)]
    return [InstructionTask(path.name, path, FAMILIES[n % len(FAMILIES)]) for n, path in enumerate(paths)]


def clock(function, *given) -> float:
    start = time.process_time()
    function(*given)
    return time.process_time() - start


def step_time(model, optimizer) -> float:
    ids = torch.randint(SIZES["vocab_size"], (BATCH, LENGTH))

    def step():
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return clock(step)


def time_draws(mixture: InstructionMixture, tokenizer, folder: Path, args) -> dict:
    """Median CPU seconds of a step and, for each side, of a draw; and the mean tokens of a draw."""
    model = LifecycleForCausalLM(LifecycleConfig(**SIZES)).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    quiet = {"max_steps": 1, "use_cpu": True, "report_to": "none", "gradient_checkpointing": False}
    options = SFTConfig(str(folder / "run"), max_length=LENGTH, per_device_train_batch_size=BATCH, **quiet)
    trainer = SFTTrainer(model, options, mixture.stream(), processing_class=tokenizer)
    stream = iter(mixture.stream())
    loader = iter(trainer.get_train_dataloader())
    next(stream), next(loader)

    def tokenise(count):
        for example in islice(stream, count):
            encode_texts(tokenizer, conversation_texts(tokenizer, example))

    sides = {
        "draw": lambda count: mixture.drawn(count, start=args.draws),
        "render": lambda count: list(islice(stream, count)),
        "tokenise": tokenise,
        "SFTTrainer": lambda count: list(islice(loader, count // BATCH)),
    }
    step_time(model, optimizer)
    found = {"step": [], **{side: [] for side in sides}}
    for _ in range(args.rounds):
        found["step"].append(step_time(model, optimizer))
        for side, function in sides.items():
            found[side].append(clock(function, args.draws) / args.draws)
    parameters = sum(p.numel() for p in model.parameters())
    tokens = sum(row["share"] * row["tokens"] for row in mixture.report(1, tokenizer))
    return {side: median(seconds) for side, seconds in found.items()} | {"parameters": parameters, "tokens": tokens}


def anonymous() -> float:
    """Anonymous memory of the process now, MiB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) / 1024


def measure_memory(paths: list[str], connection) -> None:
    """Send by how much the peaks of anonymous memory and of all memory rose, MiB, and the seconds of building."""
    prepare()
    tasks = [InstructionTask(Path(path).name, path, "qa") for path in paths]
    list(InstructionMixture(tasks[:1]).stream(10))  # what the first draws import
    before, peak, done = (anonymous(), memory(cuda=False)[0]), [anonymous()], threading.Event()

    def watch():
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.process_time()
    mixture = InstructionMixture(tasks, max_rows=None)
    seconds = time.process_time() - start
    for _ in mixture.stream(1000):
        pass
    done.set()
    watcher.join()
    connection.send((peak[0] - before[0], memory(cuda=False)[1] - before[1], seconds))


def memory_of(folder: Path, rows: int) -> tuple[float, float, float]:
    context = get_context("spawn")
    here, there = context.Pipe()
    paths = [write_task(folder / f"{name}_{size}", size, np.random.default_rng(size)) for name, size in
             (("small", 1000), ("large", rows))]  # fmt: skip
    process = context.Process(target=measure_memory, args=([str(path) for path in paths], there))
    process.start()
    found = here.recv()
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--smoke", action="store_true", help="a hundredth of the rows")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--draws", type=int, default=800, help="draws of each side in a round")
    parser.add_argument("--output", default="output/bench_mixing.json")
    args = parser.parse_args()
    prepare()
    scale = 100 if args.smoke else 1
    tokenizer = train_tokenizer(python_documentation()["text"], SIZES["vocab_size"])
    tokenizer.chat_template = CHAT
    with tempfile.TemporaryDirectory() as folder:
        tasks = write_tasks(Path(folder), 100, 1_000_000 // scale)
        build = time.process_time()
        mixture = InstructionMixture(tasks)
        build = time.process_time() - build
        found = time_draws(mixture, tokenizer, Path(folder), args) | {"build": build}
    rows = []
    for side in ("draw", "render", "tokenise", "SFTTrainer"):
        batch, packed = (found[side] * draws / found["step"] for draws in (BATCH, BATCH * LENGTH / found["tokens"]))
        rows.append([side, 1e6 * found[side], 100 * batch, 100 * packed])
    title = (
        f"{len(tasks)} tasks, {1_000_000 // scale:,} rows (built in {build:.1f} s); a step takes {found['step']:.2f} s"
    )
    header = f"side | µs a draw | share of a step of {BATCH} draws (%) | share of a step of 2,048 tokens (%)"
    show(title, header, "{} | {:.0f} | {:.2f} | {:.2f}", rows)
    with tempfile.TemporaryDirectory() as folder:
        sizes = [10_000 // scale, 100_000 // scale, 1_000_000 // scale]
        found["memory"] = {size: memory_of(Path(folder), size) for size in sizes}
    header = "rows of the largest task | anonymous, MiB | with mapped files, MiB | building, s"
    show(
        "Memory of a mixture", header, "{:,} | {:.1f} | {:.1f} | {:.1f}", [[n, *m] for n, m in found["memory"].items()]
    )
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
