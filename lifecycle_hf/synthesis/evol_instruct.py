"""Evol-Instruct: a model rewrites instructions into harder or rarer ones, round by round, and answers them.

Reference: https://arxiv.org/abs/2304.12244.
"""

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from lifecycle_hf.data.json_lines import check_settings
from lifecycle_hf.synthesis.prompts import ask, first_fault, load_prompts, seed_tasks
from lifecycle_hf.synthesis.writers import Cut, Recorded, Writer

PROMPTS = load_prompts(__file__)
OPERATORS = (*PROMPTS["operators"], "in_breadth")
"""add_constraints, deepen, concretize, increase_reasoning, complicate_input, in_breadth."""
STOP_WORDS, REFUSAL_WORDS = frozenset(PROMPTS["stop_words"]), 80
"""Words that say nothing, and the number of words from which on an answer with "sorry" is no refusal."""


def evol_instruct(
    writer: Writer, seeds: Iterable[dict], *, output_dir: str | Path, rounds: int = 4,
    operators: Sequence[str] = OPERATORS, max_tokens: int = 512, temperature: float = 0.7, seed: int = 0,
    strict_data: bool = False,
) -> tuple[list[dict], dict]:  # fmt: skip
    """Let a writer evolve each instruction once in each round, and return (rows, report).

    Each round rewrites every instruction by an operator drawn by seed, asks the writer whether the result asks for the
    same, and lets it answer. Where an evolved instruction is eliminated, the one before stays for the next round. A
    run that was killed goes on where it stopped. The files:

    - `generated.jsonl`: the rows, with "instruction", "input" (empty), "output", "operator", "round", "id" and
      "parent". The id of seed i is "i.0", and that of its descendant of round r "i.r".
    - `report.json`: how many were kept, how many each rule dropped, for each operator too; the tokens spent.
    - `written.jsonl`: all texts of the writer.

    Args:
        seeds: tasks with "instruction", and "input" or "instances" where there is one; the first input follows it.
        rounds: a higher number goes on in the same folder.
        operators: names of [`OPERATORS`], all equally likely.
        max_tokens: most tokens of an instruction, and of an answer.
        strict_data: raise on a seed that can't be used instead of dropping it.

    Raises:
        ValueError: an operator is unknown, the folder has texts with other settings, no seed is usable, or the writer
            fails.
    """
    if not operators or not set(operators) <= set(OPERATORS):
        raise ValueError(f"operators={list(operators)}: give some of {', '.join(OPERATORS)}.")
    living = {f"{task['index']}.0": _whole(task) for task in seed_tasks(seeds, strict_data)}
    record = Recorded(writer, Path(output_dir) / "written.jsonl")
    settings = {"operators": list(operators), "max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    settings |= {"writer": record.name, "seeds": list(living.values())}
    check_settings(Path(output_dir) / "settings.json", settings)
    rows, told = [], {name: Counter() for name in operators}
    try:
        for number in range(1, rounds + 1):
            record.bar.set_postfix(round=number, rounds=rounds, kept=len(rows))
            evolved = _round(record, living, settings, told, number)
            rows += evolved
            after = {row["parent"]: row for row in evolved}
            living = dict((after[i]["id"], after[i]["instruction"]) if i in after else (i, living[i]) for i in living)
    finally:  # also when the writer fails
        report = record.finish(rows, {"instructions": sum(told.values(), Counter()), "operators": told})
    return rows, report


def _round(record: Recorded, living: dict[str, str], settings: dict, told: dict, number: int) -> list[dict]:
    """Return the rows of a round, and count in `told` what became of each instruction."""
    draw = random.Random(f"{settings['seed']} {number}")
    options = {"max_tokens": settings["max_tokens"], "temperature": settings["temperature"]}

    def passing(rows, faults):
        for row, fault in zip(rows, faults, strict=True):
            told[row["operator"]].update([fault] if fault else [])
        return [row for row, fault in zip(rows, faults, strict=True) if not fault]

    def written(chats):
        return record(chats, **options, seed=draw.getrandbits(31))

    chosen = [draw.choice(settings["operators"]) for _ in living]
    texts = written([operator_prompt(name, text) for name, text in zip(chosen, living.values(), strict=True)])
    rows = [
        {"instruction": text.strip(), "input": "", "output": "", "operator": name, "round": number,
         "id": f"{parent.split('.')[0]}.{number}", "parent": parent}
        for text, name, parent in zip(texts, chosen, living, strict=True)
    ]  # fmt: skip
    rows = passing(
        rows, [instruction_fault(text, living[row["parent"]]) for text, row in zip(texts, rows, strict=True)]
    )
    asked = [ask(PROMPTS["equal"], first=living[row["parent"]], second=row["instruction"]) for row in rows]
    said = record(asked, max_tokens=8, temperature=0.0, seed=0)
    rows = passing(rows, ["no information gain" if says_equal(text) else "" for text in said])
    answers = written([[{"role": "user", "content": row["instruction"]}] for row in rows])
    rows = [row | {"output": text.strip()} for row, text in zip(rows, answers, strict=True)]
    rows = passing(rows, [answer_fault(text) for text in answers])
    for row in rows:
        told[row["operator"]]["kept"] += 1
    return rows


def operator_prompt(operator: str, instruction: str) -> list[dict]:
    """Return the chat that asks for an instruction to be evolved by an operator."""
    if operator == "in_breadth":
        return ask(PROMPTS["breadth"], instruction=instruction)
    return ask(PROMPTS["depth"], how=PROMPTS["operators"][operator], instruction=instruction)


def instruction_fault(evolved: str, parent: str) -> str:
    """Return the rule that drops an evolved instruction before the writer compares it, or an empty string."""
    words = evolved.lower().split()
    return first_fault({
        "cut off": isinstance(evolved, Cut),
        "no information gain": not words or words == parent.lower().split(),
        "copied prompt": any(name in " ".join(words) for name in PROMPTS["copied"]),
    })  # fmt: skip


def says_equal(text: str) -> bool:
    """Return whether a judgement is "equal"; one that says neither "equal" nor "not equal" is not."""
    found = re.search(r"\b(not |un)?equal\b", text.lower())
    return found is not None and found[1] is None


def answer_fault(answer: str) -> str:
    """Return the rule that drops an instruction because of its answer, or an empty string."""
    words = re.findall(r"\w+", answer.lower())
    return first_fault({
        "cut off": isinstance(answer, Cut),
        "refusal": "sorry" in words and len(words) < REFUSAL_WORDS,
        "empty answer": all(word in STOP_WORDS for word in words),
    })  # fmt: skip


def _whole(task: dict) -> str:
    return "\n\n".join(filter(None, (task["instruction"], task["instances"][0]["input"])))
