"""Self-Instruct: a model writes tasks from a few tasks by people, and filters keep those that are new.

Reference: https://arxiv.org/abs/2212.10560.
"""

import random
import re
import string
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from lifecycle_hf.data.json_lines import check_settings
from lifecycle_hf.evaluation.text import lcs_lengths, rouge_words
from lifecycle_hf.synthesis.prompts import ask, first_fault, load_prompts, seed_tasks
from lifecycle_hf.synthesis.writers import Cut, Recorded, Writer

PROMPTS = load_prompts(__file__)
IN_CONTEXT, GENERATED, SHOTS = 8, 2, 4
"""Tasks in the prompt for new ones, how many of them are generated, and solved examples of each kind in the others."""
SHORTEST, LONGEST = 3, 150
"""Fewest and most words of an instruction; an example in a prompt has at most as many."""
_NUMBERED = re.compile(r"^\W*(?:task\s*)?(\d+)\s*[.:)][*_]*\s*(?:\d+[.)]\s+)?", re.IGNORECASE | re.MULTILINE)
_FIELD = re.compile(r"^[\W_]*(input|output)\s*:[*_]*", re.IGNORECASE | re.MULTILINE)
NO_INPUT = {("input", word) for word in ("none", "n/a", "no input", "noinput")}
_KEYWORDS = re.compile(rf"\b(?:{'|'.join(PROMPTS['keywords'])})\b", re.IGNORECASE)


def self_instruct(
    writer: Writer, seeds: Iterable[dict] | None = None, *, output_dir: str | Path, target: int = 100,
    threshold: float = 0.7, prompts_per_round: int = 8, max_tokens: int = 512, temperature: float = 0.7,
    instance_temperature: float = 0.0, seed: int = 0, patience: int = 5, strict_data: bool = False,
) -> tuple[list[dict], dict]:  # fmt: skip
    """Let a writer make up tasks until `target` instructions are kept, and return (rows, report).

    Each round asks for new instructions in the context of 8 known ones (6 of people and 2 generated; more of people
    while fewer than 2 are generated), whether each is a classification task, and for instances: the output first for
    classification, the input first otherwise. A run that was killed goes on where it stopped. The files:

    - `generated.jsonl`: the rows, with "instruction", "input", "output", "is_classification" and "round".
    - `report.json`: how many instructions and instances were kept, and how many each filter dropped; the tokens spent.
    - `written.jsonl`: all texts of the writer.

    Args:
        seeds: tasks by people with "instruction", "is_classification" (False by default) and "instances", a list of
            {"input", "output"}, or one instance as "input" and "output"; a small set of the package by default.
        target: instructions to keep. A higher one goes on in the same folder.
        threshold: an instruction whose ROUGE-L with a seed or an earlier one is at or above it is dropped.
        prompts_per_round: prompts for new instructions in each round.
        max_tokens: most tokens of a list of instructions, and of the instances of one.
        temperature, instance_temperature: of instructions and of instances.
        patience: stop after so many rounds in a row that keep nothing.
        strict_data: raise on a seed that can't be used instead of dropping it.

    Raises:
        ValueError: the folder has texts with other settings, no seed is usable, or the writer fails.
    """
    if prompts_per_round < 1:
        raise ValueError(f"prompts_per_round={prompts_per_round}: at least one prompt in each round is needed.")
    own = seed_tasks(PROMPTS["seeds"])
    tasks = own if seeds is None else seed_tasks(seeds, strict_data)
    record = Recorded(writer, Path(output_dir) / "written.jsonl")
    settings = {"temperature": temperature, "instance_temperature": instance_temperature, "max_tokens": max_tokens}
    settings |= {"threshold": threshold, "prompts_per_round": prompts_per_round, "seed": seed, "writer": record.name}
    check_settings(Path(output_dir) / "settings.json", settings | {"seeds": [task["instruction"] for task in tasks]})
    run, idle, number = _Run(record, tasks, own, settings), 0, 0
    try:
        while len(run.kept) < target and idle < patience:
            before, draw = len(run.kept), random.Random(f"{seed} {number}")
            run.instances(run.instructions(draw), draw, number)
            number, idle = number + 1, 0 if len(run.kept) > before else idle + 1
            record.bar.set_postfix(kept=len(run.kept), target=target)
    finally:  # also when the writer fails
        report = record.finish(run.rows, {"rounds": number} | run.tallies)
    if len(run.kept) < target:
        warnings.warn(
            f"{record.name}: nothing was kept in {patience} rounds in a row, so the run stopped at {len(run.kept)} of "
            f"{target} instructions. {output_dir}/report.json tells what the filters dropped.", stacklevel=2,
        )  # fmt: skip
    return run.rows, report


class _Run:
    """Hold the tasks of people, what is kept of the generated ones, and how many each filter dropped."""

    def __init__(self, record: Recorded, tasks: list[dict], own: list[dict], settings: dict):
        self.record, self.tasks, self.settings = record, tasks, settings
        self.rows, self.kept, self.pool = [], [], [rouge_words(task["instruction"]) for task in tasks]
        self.tallies = {"instructions": Counter(), "instances": Counter()}
        self.shots = {kind: _solved(tasks, kind) or _solved(own, kind) for kind in (True, False)}

    def instructions(self, draw: random.Random) -> list[str]:
        """Return new instructions that pass the filters."""
        chats, fresh = [], []
        for _ in range(self.settings["prompts_per_round"]):
            known = draw.sample(self.kept, min(GENERATED, len(self.kept)))
            people = draw.sample(self.tasks, min(IN_CONTEXT - len(known), len(self.tasks)))
            known += [task["instruction"] for task in people]
            draw.shuffle(known)
            listed = "\n".join(f"Task {i}: {_one_line(text)}" for i, text in enumerate(known, 1))
            chats.append(ask(PROMPTS["instructions"], tasks=listed, next=len(known) + 1))
        texts = self._written(chats, draw, self.settings["temperature"], stop=[f"\nTask {2 * IN_CONTEXT + 1}:"])
        for text in texts:
            for instruction in listed_tasks(text, len(known) + 1):
                words, fault = rouge_words(instruction), instruction_fault(instruction)
                fault = fault or ("similar" if is_similar(words, self.pool, self.settings["threshold"]) else "")
                if fault:
                    self.tallies["instructions"][fault] += 1
                else:
                    self.pool.append(words)
                    fresh.append(instruction)
        return fresh

    def instances(self, fresh: list[str], draw: random.Random, number: int) -> None:
        """Write the instances of new instructions, and keep those that pass the filters."""
        shots = {kind: draw.sample(found, min(SHOTS, len(found))) for kind, found in self.shots.items()}
        solved = [f"Task: {_one_line(task['instruction'])}\nClassification: {'yes' if kind else 'no'}"
                  for kind, found in shots.items() for task in found]  # fmt: skip
        draw.shuffle(solved)
        asked = [ask(PROMPTS["classification"], examples="\n\n".join(solved), instruction=text) for text in fresh]
        said = self.record(asked, max_tokens=8, temperature=0.0, seed=0)
        kinds = [re.findall(r"\b(?:yes|no)\b", text.lower())[:1] == ["yes"] for text in said]
        prompts = {True: PROMPTS["output_first"], False: PROMPTS["input_first"]}
        shown = {kind: "\n\n".join(_shown(task, kind) for task in found) for kind, found in shots.items()}
        asked = [ask(prompts[kind], examples=shown[kind], instruction=text) for text, kind in zip(fresh, kinds)]
        texts = self._written(asked, draw, self.settings["instance_temperature"], stop=["\nTask:"])
        for instruction, kind, text in zip(fresh, kinds, texts, strict=True):
            good, dropped = filter_instances(parse_instances(text, kind))
            more = {"is_classification": kind, "round": number}
            self.rows += [{"instruction": instruction} | row | more for row in good]
            self.kept += [instruction] if good else []
            self.tallies["instances"] += dropped + Counter(kept=len(good))
            self.tallies["instructions"]["kept" if good else "no instance"] += 1

    def _written(self, chats: list, draw: random.Random, temperature: float, stop: list[str]) -> list[str]:
        most, seed = self.settings["max_tokens"], draw.getrandbits(31)
        return self.record(chats, max_tokens=most, temperature=temperature, seed=seed, stop=stop)


def listed_tasks(text: str, number: int) -> list[str]:
    """Return the tasks of a text that continues a list from task `number`, each on one line.

    What stands before the first number is task `number` if that number is a higher one, and a preamble otherwise.
    The last task of a [`Cut`] is one.
    """
    pieces = _NUMBERED.split(text)
    first = pieces[:1] if len(pieces) == 1 or int(pieces[1]) > number else []
    found = [line for piece in [*first, *pieces[2::2]] if (line := _one_line(piece))]
    return [*found[:-1], *map(type(text), found[-1:])]


def instruction_fault(instruction: str) -> str:
    """Return the filter that an instruction fails, whatever the others are, or an empty string."""
    size, first = len(instruction.split()), instruction[0]
    return first_fault({
        "cut off": isinstance(instruction, Cut),
        "too short": size < SHORTEST,
        "too long": size > LONGEST,
        "start": first in string.punctuation or not first.isascii(),
        "keyword": bool(_KEYWORDS.search(instruction)),
    })  # fmt: skip


def is_similar(words: Sequence[str], pool: Sequence[Sequence[str]], threshold: float) -> bool:
    """Return whether ROUGE-L of a text with one of the pool, all as words, is at or above the threshold."""
    size = len(words)  # the LCS is at most the shorter length, which spares most comparisons
    near = [other for other in pool if 2 * min(size, len(other)) / max(size + len(other), 1) >= threshold]
    lengths = lcs_lengths(words, near)
    return any(2 * n / (size + len(other)) >= threshold for n, other in zip(lengths, near, strict=True))


def parse_instances(text: str, output_first: bool) -> list[dict]:
    """Return the instances ("input", "output") of a text that continues "Input:", or else "Output:".

    An input "none" becomes an empty one. A field without its partner is left out. The last of a [`Cut`] is one.
    """
    first, start = "output" if output_first else "input", _FIELD.match(text)
    pieces = _FIELD.split(text if start and start[1].lower() == first else f"{first}:{text}")
    fields = [(name.lower(), value.strip()) for name, value in zip(pieces[1::2], pieces[2::2], strict=True)]
    fields = [(a, "" if (a, b.lower().strip("<>.")) in NO_INPUT else b) for a, b in fields]
    fields[-1] = (fields[-1][0], type(text)(fields[-1][1]))
    return [dict((a, b)) for a, b in pairwise(fields) if a[0] == first != b[0]]


def filter_instances(rows: list[dict]) -> tuple[list[dict], Counter]:
    """Return the instances of one instruction that are kept, and how many each filter dropped."""
    outputs, good, dropped = {}, [], Counter()
    for row in rows:
        outputs.setdefault(row["input"], set()).add(row["output"])
    for row in rows:
        fault = first_fault({
            "cut off": any(isinstance(value, Cut) for value in row.values()),
            "empty output": not row["output"],
            "output is input": row["output"].lower().split() == row["input"].lower().split(),
            "input with other outputs": row["input"] and len(outputs[row["input"]]) > 1,
            "repeated": row in good,
        })  # fmt: skip
        dropped.update([fault] if fault else [])
        good += [] if fault else [row]
    return good, dropped


def _solved(tasks: list[dict], kind: bool) -> list[dict]:
    """Return the tasks of a kind that can be examples in prompts: short, and all outputs known."""
    found = [
        task for task in tasks if task["is_classification"] == kind and len(_shown(task, kind).split()) <= LONGEST
    ]
    return [task for task in found if all(item["output"] for item in task["instances"])]


def _shown(task: dict, output_first: bool) -> str:
    lines = [f"Task: {_one_line(task['instruction'])}"]
    for item in task["instances"] if output_first else task["instances"][:1]:
        fields = [f"Input: {item['input'] or 'none'}", f"Output: {item['output']}"]
        lines += reversed(fields) if output_first else fields
    return "\n".join(lines)


def _one_line(text: str) -> str:
    return " ".join(text.split())
