"""Instruction tasks of the toy world, in families, with chains of thought for the additions; all answers are known."""

import random
from collections.abc import Callable
from functools import partial

from datasets import Dataset

from lifecycle_hf.data.instruction_tasks import InstructionTask
from lifecycle_hf.toyworld.dialogue import refusal, requests
from lifecycle_hf.toyworld.world import ATTRIBUTES, DIGITS, LANDS, NOUNS, is_held_out

WORDS = [word for name in ("flag", "food", "animal") for word in ATTRIBUTES[name]]
HELD_OUT = ("food", "animal")
"""Families that the default never trains on: the same kinds of task about other things, in a wording of their own."""
_TOLD = ("{Noun} is {value}.", "As for {noun}, it is {value}.", "They say that {noun} is {value}.")
_READING = {
    "question": ("Write the question that is answered.", "Give the question for this answer.", "What is {noun}?"),
    "land": ("Write the name of the land.", "Tell the land of this sentence.", "{land}"),
    "value": ("Write the last word.", "Give the final word.", "{value}"),
}
"""Instruction, instruction in held-out families, and answer of the tasks about a sentence, which need not be true."""
_PLAIN = "{instruction}\n\n{input}"
TEMPLATES = {
    "question": [_PLAIN, "{input}\n\nWhat was the question?", "Find a question for this: {input}"],
    "land": [_PLAIN, "{input}\n\nWhich land is that?", "Find the land in this: {input}"],
    "value": [_PLAIN, "{input}\n\nWhat is the last word?", "Find the final word of this: {input}"],
}
"""Templates of the tasks about a sentence that are trained on."""


def _reading(attribute: str, kind: str, rng: random.Random) -> dict:
    land, value = rng.choice(LANDS), rng.choice(ATTRIBUTES[attribute])
    noun = NOUNS[attribute].format(land=land)
    words = {"land": land, "value": value, "noun": noun, "Noun": noun[0].upper() + noun[1:]}
    instruction, held_out, answer = _READING[kind]
    told = rng.choice(_TOLD).format(**words)
    asked = held_out if attribute in HELD_OUT else instruction
    return {"instruction": asked, "input": told, "output": answer.format(**words)}


def _refusal(rng: random.Random) -> dict:
    request = rng.choice([request for request in requests().values() if request.kind == "forbidden"])
    return {"instruction": "Answer politely.", "input": request.text, "output": refusal(rng)}


def _addition(rng: random.Random) -> dict:
    numbers = [rng.choice(DIGITS) for _ in range(rng.choice((2, 3)))]
    steps, total = [], numbers[0]
    for number in numbers[1:]:
        steps.append(f"{total} plus {number} is {total + number}.")
        total += number
    given = {"instruction": "Add the numbers.", "input": ", ".join(map(str, numbers)), "output": str(total)}
    return given | {"chain": " ".join(steps)}


def _of_list(instruction: str, answer: Callable[[list[str]], str], rng: random.Random) -> dict:
    words = rng.sample(WORDS, rng.randint(2, 4))
    return {"instruction": instruction, "input": ", ".join(words), "output": answer(words)}


TASKS: dict[str, tuple[str, int, Callable[[random.Random], dict]]] = {
    f"{attribute}_{kind}": (attribute, size, partial(_reading, attribute, kind))
    for attribute, size in (("capital", 1000), ("flag", 300), ("food", 100), ("animal", 100))
    for kind in _READING
} | {
    "add": ("arithmetic", 3000, _addition),
    "refuse": ("refusals", 600, _refusal),
    "sort": ("ordering", 3000, partial(_of_list, "Sort the words.", lambda words: ", ".join(sorted(words)))),
    "repeat": ("ordering", 100, partial(_of_list, "Repeat the words.", ", ".join)),
    "count": ("counting", 300, partial(_of_list, "Count the words.", lambda words: str(len(words)))),
}
"""Of each task its family, the rows to train on, and the function that makes a row."""


def instruction_rows(name: str, held_out: bool = False, rows: int | None = None) -> Dataset:
    """Return the rows of a task: `instruction`, `input`, `output`, and for additions `chain`.

    Args:
        held_out: the rows that no run trains on; a row is one of these by its input, 1 in 6.
        rows: number of rows; by default those to train on, or 64 held out.

    Raises:
        ValueError: there is no such task.
    """
    if name not in TASKS:
        raise ValueError(f"toy world has no task {name!r}; choose one of {', '.join(TASKS)}")
    _, size, make = TASKS[name]
    rng, found = random.Random(f"{name} {held_out}"), []
    while len(found) < (rows or (64 if held_out else size)):
        row = make(rng)
        if is_held_out(row["input"]) == held_out:
            found.append(row)
    return Dataset.from_list(found)


def instruction_task(name: str) -> InstructionTask:
    """Return a task with its rows to train on; a task about a sentence that is trained on has several wordings."""
    family = TASKS[name][0]
    templates = None if family in HELD_OUT else TEMPLATES.get(name.rpartition("_")[2])
    return InstructionTask(name, instruction_rows(name), family=family, templates=templates)
