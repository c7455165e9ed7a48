"""Prompts of the methods, which stand in YAML files beside them, and the tasks that a method starts from."""

from collections.abc import Iterable
from pathlib import Path

import yaml

from lifecycle_hf.data.usable import usable_rows


def load_prompts(module: str) -> dict:
    """Return the YAML file that stands beside a module and has its name."""
    return yaml.safe_load(Path(module).with_suffix(".yaml").read_text(encoding="utf-8"))


def ask(prompt: str, **fields) -> list[dict]:
    """Return the chat of a prompt with its {fields} filled in, whose last line is the start of the answer."""
    request, _, start = prompt.format(**fields).rpartition("\n")
    return [{"role": "user", "content": request.strip()}, {"role": "assistant", "content": start}]


def first_fault(faults: dict[str, bool]) -> str:
    """Return the name of the first filter that is true, or an empty string."""
    return next((name for name, found in faults.items() if found), "")


def seed_tasks(rows: Iterable[dict], strict: bool = False) -> list[dict]:
    """Return tasks with "index", "instruction", "instances" (a list of "input" and "output") and "is_classification".

    Args:
        rows: the same, or one instance as "input" and "output"; all but the instruction may be absent.

    Raises:
        ValueError: no row has an instruction, or `strict` is set and one has none.
    """
    tasks = []
    for i, row in enumerate(rows):
        instances = [
            {name: _text(item, name) for name in ("input", "output")} for item in row.get("instances") or [row]
        ]
        kind = bool(row.get("is_classification"))
        task = {"instruction": _text(row, "instruction"), "instances": instances, "is_classification": kind}
        tasks.append({"index": i} | task)
    problems = ["" if task["instruction"] else "without an instruction" for task in tasks]
    return [tasks[i] for i in usable_rows(problems, where="seed tasks", strict=strict)]


def _text(row: dict, name: str) -> str:
    return str(row.get(name) or "").strip()
