"""Tokenising preference pairs against TRL's own preparation: rows per second, and whether the ids are the same.

    export OMP_NUM_THREADS=1
    python benchmarks/tokenizing.py                # 1,500 pairs of chats on one core, about two minutes
    python benchmarks/tokenizing.py --num_proc 4   # both sides in four processes

The sides take turns in one process, and the order changes with every round. A round of ours is `tokenize_pairs`, one
of TRL's is what its DPOTrainer does with a dataset before it trains; both start from the same messages. CPU and wall
seconds; ratios are medians over rounds with the smallest and largest. The default tokenizer is that of the model that
docs/real_runs.md makes; the data are pairs of transcripts as in Anthropic's hh-rlhf.
"""

import argparse
import json
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import datasets
import trl
from datasets import Dataset
from measuring import clocks, prepare, read_rows, show
from transformers import AutoTokenizer

from lifecycle_hf.data.chat import text_problem
from lifecycle_hf.data.schemas import to_preference
from lifecycle_hf.data.tokenize import tokenize_pairs

IDS = ["prompt_ids", "chosen_ids", "rejected_ids"]


def measure(rows: Dataset, tokenizer, args) -> dict[str, list[tuple[float, float]]]:
    """(CPU seconds, wall seconds) of each side in every round; checks that both make the same ids."""
    config = SimpleNamespace(dataset_num_proc=args.num_proc, max_length=args.max_length, truncation_mode="keep_start")
    options = {"max_length": args.max_length, "where": "the pairs", "num_proc": args.num_proc}
    sides = {
        "trl": lambda: trl.DPOTrainer._prepare_dataset(
            SimpleNamespace(_tokenizer=tokenizer), rows, tokenizer, config, "train"
        ),
        "ours": lambda: tokenize_pairs(rows, tokenizer, **options),
    }
    found, made = {side: [] for side in sides}, {}
    for i in range(args.rounds + 1):
        for side in sides if i % 2 else reversed(sides):
            before = clocks(cuda=False)
            made[side] = sides[side]()
            if i:  # the first round is a warm-up
                found[side].append(tuple(b - a for a, b in zip(before, clocks(cuda=False), strict=True)))
    cut = [[row["prompt_ids"], *(cut_ids(row, name, args.max_length) for name in IDS[1:])] for row in made["trl"]]
    assert [[row[name] for name in IDS] for row in made["ours"]] == [row for row in cut if row[1] != row[2]]
    return found


def cut_ids(row: dict, name: str, max_length: int) -> list[int]:
    """The completion as TRL's collator cuts it."""
    return row[name][: max_length - len(row["prompt_ids"])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="smollm2", help="tokenizer with a chat template; see docs/real_runs.md")
    parser.add_argument("--data", default="../shared/data/hh_harmless_1500.jsonl.gz", help="pairs of transcripts")
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--num_proc", type=int)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--output", default="output/bench_tokenizing.json")
    args = parser.parse_args()
    prepare()
    datasets.disable_caching()  # a second round would read the first one's file
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = to_preference(Dataset.from_list(read_rows(args.data)), "--data")
    rows = rows.filter(lambda row: not any(text_problem(row[side], side) for side in ("chosen", "rejected")))
    found = measure(rows, tokenizer, args)
    table = []
    for clock, name in enumerate(("CPU", "wall")):
        theirs, ours = ([times[clock] for times in found[side]] for side in ("trl", "ours"))
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        speeds = [len(rows) / median(seconds) for seconds in (theirs, ours)]
        table.append([name, *speeds, median(ratios), min(ratios), max(ratios)])
    header = "clock | TRL, rows/s | ours, rows/s | ratio (min–max)"
    show(f"Tokenising {len(rows)} pairs", header, "{} | {:.0f} | {:.0f} | {:.2f} ({:.2f}–{:.2f})", table)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
