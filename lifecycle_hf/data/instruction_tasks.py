"""Tasks of instructions: rows, and the templates that make chats of them."""

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from datasets import Dataset
from datasets.exceptions import DatasetsError

from lifecycle_hf.data.chat import message_text, text_problem
from lifecycle_hf.data.loading import find_splits
from lifecycle_hf.data.schemas import first_value, is_messages, refuse_stream
from lifecycle_hf.data.templates import Template, find_templates
from lifecycle_hf.data.usable import Unusable, refuse

PLAIN = {
    ("messages",): None,
    ("prompt", "completion"): Template("{prompt}", "{completion}"),
    ("instruction", "output"): Template("{{ instruction }}{% if input %}\n\n{{ input }}{% endif %}"),
}
"""For the columns of each layout of rows the template that adds no text."""
END_OF_TEXT = "<|endoftext|>"


@dataclass(eq=False)
class InstructionTask:
    """Hold the rows of a task and the templates that make chats of them.

    The columns are `instruction`, `output` and possibly `input`; or `prompt` and `completion`; or `messages`; or any
    columns that `templates` name. Chats (messages, also as prompt and completion) are taken as they are, and their
    last message is the answer. All other rows become one message of the user and one answer. ``<|endoftext|>`` at the
    end of a text is removed, since the chat template marks the end itself.

    Args:
        name: name of the task.
        rows: a dataset, a list of dicts, or the name of a local file, a folder or a dataset of the Hub (split train).
        family: kind of the task; a mixture holds out whole families.
        templates: templates, mappings of their options or prompts; or a YAML file, of which the task takes the list
            under its name or its family. By default rows with `instruction` take the library's own templates, if it
            has some under one of these names, and other rows are taken as they are.
        chain: the column that holds a chain of thought, the steps to the answer; it need not be there.

    Raises:
        ValueError: there is no row, the columns fit no layout, or a template names a column that is not there.
    """

    name: str
    rows: Dataset | Sequence[dict] | str | Path
    family: str | None = None
    templates: Sequence[Template | dict | str] | str | Path | None = None
    chain: str = "chain"

    def __post_init__(self):
        where, given = f"task {self.name!r}", self.templates
        rows = _load(self.rows, where)
        layout = next((names for names in PLAIN if {*names} <= {*rows.column_names}), ())
        self._defaults = {"input": ""} if "instruction" in layout else {}
        self._chat = layout if layout and is_messages(first_value(rows, layout[0])) else ()
        found = find_templates(given, (self.name, self.family), where) if given is not None or self._defaults else []
        if self._chat and given is not None:
            raise ValueError(f"{where}: its rows are chats, which take no templates. Leave the templates out.")
        if not layout and not found:
            layouts = " or ".join(str(list(names)) for names in PLAIN)
            raise ValueError(
                f"{where}: it needs the columns {layouts}, or templates. Columns found: {rows.column_names}. "
                "Rename them with dataset.rename_column(old, new), or give templates that name them."
            )
        self._plain = PLAIN.get(layout) or next(iter(found), None)
        self.templates = [] if self._chat else found or [self._plain]
        columns = {*rows.column_names, *self._defaults}
        for template in self.templates:
            if missing := sorted(template.fields - columns):
                raise ValueError(
                    f"{where}: template {template.label!r} names {', '.join(missing)}, but the columns are "
                    f"{', '.join(sorted(columns))}. Correct the template, or rename a column."
                )
        read = {self.chain, *layout}.union(*(t.fields for t in [self._plain, *self.templates] if t))
        self.rows = rows.select_columns([name for name in rows.column_names if name in read])

    def without_templates(self) -> "InstructionTask":
        """Return the task with one template: the one that adds no text, or the first if the columns have no layout."""
        task = copy.copy(self)
        task.templates = [self._plain] if self.templates else []
        vars(task).pop("checked", None)
        return task

    def __len__(self):
        """Return the number of usable rows."""
        return len(self.rows) - len(self.checked[0])

    @cached_property
    def checked(self) -> tuple[np.ndarray, Counter, int]:
        """The indices of the rows that can't be used, the reasons with their counts, and how many others have a chain.

        Every row is rendered once. The templates take turns, so that each of them is tried before training.

        Raises:
            ValueError: Jinja can't render a row.
        """
        bad, problems, chains, first = [], Counter(), 0, 0
        for batch in self.rows.iter(1000):  # much faster than row by row
            for index, values in enumerate(zip(*batch.values()), first):
                choice = index % len(self.templates) / len(self.templates) if self.templates else 0.0
                try:
                    chains += self._render(dict(zip(batch, values)), index, choice, "")[1]
                except Unusable as problem:
                    bad.append(index)
                    problems[str(problem)] += 1
            first = index + 1
        return np.array(bad, dtype=np.int64), problems, chains

    def example(self, number: int, choice: float = 0.0, *, cue: str | None = None) -> dict[str, list[dict]]:
        """Return a usable row as a chat: {"prompt": messages, "completion": messages}.

        Args:
            number: of the row among the usable rows.
            choice: from 0 to below 1; chooses among the templates that fit the row. 0 is the first one.
            cue: put the row's chain of thought, if it has one, before the answer, and this line after the prompt.
        """
        bad = self.checked[0]
        index = int(number + np.searchsorted(bad - np.arange(len(bad)), number, side="right"))
        chat, _ = self._render(self.rows[index], index, choice, cue)
        return {"prompt": chat[:-1], "completion": chat[-1:]}

    def _render(self, row: dict, index: int, choice: float, cue: str | None) -> tuple[list[dict], bool]:
        """Return the messages of a row, and whether a chain of thought stands before the answer.

        Raises:
            Unusable: no template fits the row, its chat is not valid, or its answer is empty.
            ValueError: Jinja can't render the row.
        """
        row = self._defaults | {name: _without_end(value) for name, value in row.items()}
        chained = cue is not None and isinstance(row.get(self.chain), str) and bool(row[self.chain].strip())
        if self._chat:
            chat = _chat_of([row[name] for name in self._chat])
        else:
            empty = {name for name, value in row.items() if value in (None, []) or not str(value).strip()}
            fitting = [template for template in self.templates if template.needs.isdisjoint(empty)]
            refuse("" if fitting else f"empty {' and '.join(sorted(self.templates[0].needs & empty))}")
            direct = [template for template in fitting if not template.inverted]
            chained = chained and bool(direct)
            fitting = direct if chained else fitting
            try:
                said = fitting[int(choice * len(fitting))].render(row)
            except ValueError as error:
                raise ValueError(f"task {self.name!r}, row {index}: {error}") from error
            chat = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), said)]
        refuse(text_problem(chat, "answer"))
        if chained:
            chat[-2]["content"] += f"\n{cue}" if cue else ""
            chat[-1]["content"] = f"{row[self.chain]}\n{chat[-1]['content']}"
        return chat, chained


def _load(rows, where: str) -> Dataset:
    """Return the rows of a task, from a dataset, a list or a name.

    Raises:
        ValueError: nothing is found under the name, there is no split "train", or no row.
    """
    try:
        rows = find_splits(str(rows), "sft") if isinstance(rows, str | Path) else rows
    except (ValueError, StopIteration, DatasetsError) as error:
        problem = str(error.__cause__ or error) or "it is empty"
        raise ValueError(f"{where} has no rows: {rows} can't be read ({problem}).") from error
    if isinstance(rows, Mapping):
        if "train" not in rows:
            raise ValueError(f"{where}: there is no split 'train', but {', '.join(rows)}. Pass the rows of one split.")
        rows = rows["train"]
    refuse_stream(rows, where)
    rows = rows if isinstance(rows, Dataset) else Dataset.from_list(list(rows))
    if not len(rows):
        raise ValueError(f"{where} has no rows. Check its file, or leave the task out.")
    return rows


def _without_end(value):
    return value.removesuffix(END_OF_TEXT) if isinstance(value, str) else value


def _chat_of(parts: list) -> list[dict]:
    """Return the messages of a chat with their roles and texts alone.

    Raises:
        Unusable: a message has no text, or the last one is not an answer.
    """
    refuse("" if all(map(is_messages, parts)) else "chat without messages")
    messages = [message for part in parts for message in part]
    chat = [{"role": each["role"], "content": _without_end(message_text(each))} for each in messages]
    refuse("chat with a message without text" if any(each["content"] is None for each in chat) else "")
    answered = len(chat) > 1 and chat[-1]["role"] == "assistant"
    refuse("" if answered else "chat that does not end with an answer to a message")
    return chat
