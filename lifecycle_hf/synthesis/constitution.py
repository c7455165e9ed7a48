"""Constitutional AI: a model criticises and revises its answers by principles, and its preferences label pairs."""

import copy
import hashlib
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset
from tqdm.auto import tqdm

from lifecycle_hf.completions.judges import BothOrders, Judge, Prompt, judged
from lifecycle_hf.data.json_lines import append_samples, check_settings, read_samples, write_samples
from lifecycle_hf.data.schemas import to_prompts
from lifecycle_hf.synthesis.writers import Cut, Recorded, Writer

DEFAULT = Path(__file__).with_name("constitution.yaml")
FIELDS = ("name", "critique", "revision", "quality")
QUESTION = """Which of two answers to a request is more {quality}?

Request: {{prompt}}

Answer A: {{first}}

Answer B: {{second}}

Reply with the letter of the better answer, A or B."""
ONLY = "Reply with the new answer alone."


@dataclass(frozen=True)
class Principle:
    """Hold a principle.

    Attributes:
        name: name in the data and the report.
        critique, revision: requests that the writer gets.
        quality: completes "Which of two answers is more ...?".
    """

    name: str
    critique: str
    revision: str
    quality: str


def load_constitution(path: str | Path | None = None) -> list[Principle]:
    """Return the principles of a YAML file; the default ones without a path.

    Raises:
        ValueError: the file holds no list of principles, or one lacks a field; names it.
    """
    path = Path(path or DEFAULT)
    entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} holds no list of principles: give one with the fields {', '.join(FIELDS)}.")
    for i, entry in enumerate(entries):
        given = set(entry) if isinstance(entry, dict) else set()
        if given != set(FIELDS) or not all(isinstance(text, str) and text.strip() for text in entry.values()):
            raise ValueError(
                f"{path}: principle {i} has the fields {sorted(given)}: give a text for each of {FIELDS}."
            )
    return [Principle(**entry) for entry in entries]


@dataclass
class Revised:
    """Hold what [`revise`] wrote.

    Attributes:
        rows: of each prompt {"index", "prompt", "answers" (first answer and each revision), "critiques",
            "principles" (names)}.
        dropped: {reason: prompts that gave no revision}.
    """

    rows: list[dict[str, Any]]
    dropped: Counter = field(default_factory=Counter)

    def sft_rows(self) -> Dataset:
        """Return prompts with their last revision, as prompt-completion rows."""
        prompts = [row["prompt"] for row in self.rows]
        completions = [_answer_of(row["prompt"], row["answers"][-1]) for row in self.rows]
        return Dataset.from_dict({"prompt": prompts, "completion": completions})


def revise(
    writer: Writer, dataset: Dataset, principles: Sequence[Principle], *, output_dir: str | Path, rounds: int = 1,
    max_tokens: int = 256, temperature: float = 0.7, seed: int = 0,
) -> Revised:  # fmt: skip
    """Answer each prompt, then `rounds` times criticise the answer by a principle and revise it.

    The principle of each round is drawn by (seed, prompt), each once before any comes again. A prompt with an empty
    answer, critique or revision is dropped and counted, and so is one whose revision was cut off. All texts are kept
    in `output_dir/written.jsonl` as they come, so a run that was killed goes on; `revised.jsonl` comes at the end.

    Args:
        writer: the model that answers, criticises and revises.
        dataset: prompts, chat or plain.

    Raises:
        ValueError: the writer fails; and as [`to_prompts`][lifecycle_hf.data.schemas.to_prompts].

    Reference: https://arxiv.org/abs/2212.08073, Section 3.
    """
    write = Recorded(writer, Path(output_dir) / "written.jsonl")
    options, seeds = {"max_tokens": max_tokens, "temperature": temperature}, count(seed * 1_000_003, 7919 * 4096)
    rows, found = [], Revised([])
    for index, prompt in enumerate(to_prompts(dataset, "dataset")["prompt"]):
        drawn = draw_principles(principles, rounds, seed, index)
        rows.append({"index": index, "prompt": prompt, "answers": [], "critiques": [], "drawn": drawn})

    def ask(kind: str, number: int) -> None:
        asked = [_asked(row, kind, number) for row in rows]
        for row, text in zip(rows, write(asked, seed=next(seeds), **options), strict=True):
            row["critiques" if kind == "critique" else "answers"].append(text)
            if not text.strip() or (isinstance(text, Cut) and kind != "critique"):
                found.dropped[f"{kind} {'cut off' if text.strip() else 'empty'}"] += 1
                row["drawn"] = None
        rows[:] = [row for row in rows if row["drawn"]]

    ask("answer", 0)
    for number in range(rounds):
        ask("critique", number)
        ask("revision", number)
    for row in rows:
        names = [principle.name for principle in row.pop("drawn")]
        found.rows.append(row | {"principles": names})
    write_samples(Path(output_dir) / "revised.jsonl", found.rows)
    return found


def label(
    judge: Judge, dataset: Dataset, pairs: Sequence[tuple[str, str]], principles: Sequence[Principle], *,
    output_dir: str | Path, batch_size: int = 32, seed: int = 0,
) -> tuple[Dataset, Counter]:  # fmt: skip
    """Label pairs of answers as preference data, by a judge that is asked by a principle drawn for each pair.

    A judge that is asked for letters is asked in both orders, and its probabilities are averaged
    ([`BothOrders`][lifecycle_hf.completions.judges.BothOrders]). An answer that was cut off ([`Cut`][lifecycle_hf.
    synthesis.Cut]), two equal answers and a probability of exactly 1/2 make no pair and are counted. Labels are kept
    in `output_dir/labelled.jsonl` as they come.

    Args:
        dataset: prompts, chat or plain.
        pairs: two answers to each, as text.

    Returns:
        rows "prompt", "chosen", "rejected" and "probability" (that the chosen one is better); and {reason: pairs that
        are left out}.

    Raises:
        ValueError: the judge returns anything but a probability; names the pair. The folder has other labels.

    Reference: https://arxiv.org/abs/2212.08073, Section 4.1.
    """
    prompts, folder = list(to_prompts(dataset, "dataset")["prompt"]), Path(output_dir)
    settings = {"seed": seed, "batch_size": batch_size, "principles": [vars(principle) for principle in principles]}
    settings["pairs"] = hashlib.sha256(json.dumps([prompts, list(map(list, pairs))]).encode()).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    check_settings(folder / "labelled_settings.json", settings)
    rows = read_samples(folder / "labelled.jsonl")
    for start in tqdm(range(len(rows), len(pairs), batch_size), desc="Label pairs", unit="batch"):
        part = range(start, min(start + batch_size, len(pairs)))
        drawn = {i: draw_principles(principles, 1, seed, i)[0] for i in part if _fault(pairs[i]) is None}
        known = dict.fromkeys(part, 0.5)
        for principle in principles:
            own = [i for i, mine in drawn.items() if mine is principle]
            if own:
                given = [prompts[i] for i in own], [tuple(pairs[i]) for i in own]
                known |= zip(own, judged(by_principle(judge, principle), *given), strict=True)
        made = [{"start": start, "of": len(part), "index": i, "probability": known[i]} for i in part]
        rows += append_samples(folder / "labelled.jsonl", made)
    dropped, found = Counter(), []
    for row in rows:
        i, p = row["index"], row["probability"]
        if p == 0.5:
            dropped[_fault(pairs[i]) or "tie"] += 1
            continue
        chosen, rejected = (_answer_of(prompts[i], text) for text in (pairs[i] if p > 0.5 else pairs[i][::-1]))
        found.append({"prompt": prompts[i], "chosen": chosen, "rejected": rejected, "probability": max(p, 1 - p)})
    return Dataset.from_list(found), dropped


def _fault(pair: tuple[str, str]) -> str | None:
    """Return why two answers are no pair whatever the judge says, or None."""
    if any(isinstance(text, Cut) for text in pair):
        return "answer cut off"
    return "equal answers" if pair[0] == pair[1] else None


def by_principle(judge: Judge, principle: Principle) -> Judge:
    """Return the judge with the principle in its question; a judge that asks no question, as it is."""
    if not isinstance(judge, BothOrders):
        return judge
    asked = copy.copy(judge)
    asked.question = QUESTION.format(quality=principle.quality)
    return asked


def draw_principles(principles: Sequence[Principle], rounds: int, seed: int, index: int) -> list[Principle]:
    """Return the principles of the rounds of prompt `index`: each once before any comes again."""
    rng, found = random.Random(f"{seed} {index}"), []
    while len(found) < rounds:
        found += rng.sample(list(principles), len(principles))
    return found[:rounds]


def _answer_of(prompt: Prompt, text: str):
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _asked(row: dict[str, Any], kind: str, number: int) -> list[dict]:
    """Return the chat that asks for the first answer, for the critique of the answer `number`, or for its revision."""
    prompt = row["prompt"]
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if kind == "answer":
        return chat
    principle, turns = row["drawn"][number], [row["answers"][number]]
    turns.append(principle.critique)
    if kind == "revision":
        turns += [row["critiques"][number], f"{principle.revision} {ONLY}"]
    return chat + [{"role": ("assistant", "user")[i % 2], "content": text} for i, text in enumerate(turns)]
