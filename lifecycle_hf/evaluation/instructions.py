"""Evaluate tasks by instruction, zero-shot and few-shot: exact match, ROUGE-L, multiple choice, means by family."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean, median
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lifecycle_hf.completions.sampling import generate, stop_token_ids
from lifecycle_hf.completions.scoring import unwrapped
from lifecycle_hf.data.chat import message_text, text_problem
from lifecycle_hf.data.collators import shuffled
from lifecycle_hf.data.schemas import is_messages
from lifecycle_hf.data.tokenize import encode_prompt
from lifecycle_hf.data.usable import usable_rows
from lifecycle_hf.evaluation.bootstrap import Measurement, bootstrap_interval
from lifecycle_hf.evaluation.metrics import completion_nll, encode_choice
from lifecycle_hf.evaluation.text import normalized_answer, rouge_l
from lifecycle_hf.scaling.tables import markdown_table, terminal_table

END_OF_TEXT = "<|endoftext|>"
"""Removed where a completion ends with it, as those of many data sets do."""
MOST_CHOICES, MOST_WORDS, MOST_READ = 10, 4, 2000
METRICS = {"exact_match": "exact match", "rouge_l": "ROUGE-L", "multiple_choice": "choice"}


def answer_text(completion: str | list[dict]) -> str:
    """Return the text of a completion, of messages the last one's, without `END_OF_TEXT` and blanks at its ends."""
    text = completion if isinstance(completion, str) else message_text(completion[-1]) or ""
    return text.strip().removesuffix(END_OF_TEXT).strip()


@dataclass
class TaskRows:
    """Hold the usable rows of a task in an order drawn by a seed. The first `asked` of them are asked.

    Attributes:
        prompts: text or messages.
        answers: the right answers.
        choices: of each row; None if a row has none.
    """

    name: str
    family: str
    prompts: list[str] | list[list[dict]]
    answers: list[str]
    choices: list[Sequence[str]] | None
    asked: int

    @classmethod
    def read(cls, task: Mapping | Any, rows: int = 64, seed: int = 0, chat: bool = False) -> "TaskRows":
        """Read at most 2,000 rows of a task; see `evaluate_tasks`. Rows that can't be used are dropped with a warning.

        Raises:
            ValueError: the task has no name, no row, or none that can be used.
        """
        get = task.get if isinstance(task, Mapping) else lambda name: getattr(task, name, None)
        name, given, blank = get("name"), get("rows") or [], dict.fromkeys(("prompt", "completion", "choices"))
        if not name or not len(given):
            raise ValueError(f"evaluate_tasks: a task needs a name and rows; one has {name=} and {len(given)} rows.")
        order = shuffled(len(given), seed)[:MOST_READ]
        read = {i: {**blank, **given[i]} for i in sorted(order)}
        problems = {i: _problem(row, row["choices"] or get("choices")) for i, row in read.items()}
        usable_rows(list(problems.values()), where=f"task {name!r}", strict=False)
        read = [read[i] for i in order if not problems[i]]
        prompts, answers = [row["prompt"] for row in read], [answer_text(row["completion"]) for row in read]
        if chat or any(map(is_messages, prompts)):
            prompts = [[{"role": "user", "content": said}] if isinstance(said, str) else said for said in prompts]
        choices, found = [row["choices"] or get("choices") for row in read], sorted(set(answers))
        if not any(choices) and 2 <= len(found) <= min(MOST_CHOICES, len(answers) / 2):
            choices = [found] * len(answers)
        choices = choices if all(choices) else None
        return cls(name, get("family") or name, prompts, answers, choices, min(rows, len(answers)))

    def examples(self, row: int, count: int, seed: int) -> list[int]:
        """Return rows to show before a row: others by their prompt, and if there are enough, none that is asked.

        Raises:
            ValueError: there are too few.
        """
        others = [i for i, prompt in enumerate(self.prompts) if prompt != self.prompts[row]]
        free = [i for i in others if i >= self.asked]
        if len(others) < count:
            raise ValueError(
                f"task {self.name!r}: {count} examples are wanted before a row, and {len(others)} usable rows have "
                "another prompt. Give fewer shots, or leave the task out."
            )
        return random.Random(f"{seed} {self.name} {row}").sample(free if len(free) >= count else others, count)

    def prompt(self, row: int, examples: Sequence[int]) -> str | list[dict]:
        """Return the prompt of a row after examples: earlier turns of the chat, or texts with blank lines between."""
        asked, shown = self.prompts[row], [(self.prompts[i], self.answers[i]) for i in examples]
        if isinstance(asked, str):
            return "".join(f"{p}{'' if p[-1].isspace() else ' '}{answer}\n\n" for p, answer in shown) + asked
        system = int(asked[0]["role"] == "system")
        turns = [([m for m in p if m["role"] != "system"], {"role": "assistant", "content": a}) for p, a in shown]
        return asked[:system] + [message for said, answer in turns for message in (*said, answer)] + asked[system:]


def _problem(row: dict, choices: Sequence[str] | None) -> str:
    problem = text_problem(row["prompt"], "prompt") or text_problem(row["completion"], "completion")
    problem = problem or text_problem(answer_text(row["completion"]), "completion")
    strange = not problem and choices and answer_text(row["completion"]) not in choices
    return "completion that is none of its choices" if strange else problem


def main_score(task: TaskRows | Mapping | Any) -> str:
    """Return the name of the metric that counts for a task.

    "multiple_choice" where the task has choices; else "exact_match" where the median answer has at most 4 words; else
    "rouge_l".
    """
    task = task if isinstance(task, TaskRows) else TaskRows.read(task)
    short = median(len(text.split()) for text in task.answers) <= MOST_WORDS
    return "multiple_choice" if task.choices else "exact_match" if short else "rouge_l"


class TaskScore(NamedTuple):
    """Hold the results of a task at a number of shots.

    Attributes:
        shown: mean number of examples that the prompts had room for.
        scores: "exact_match", "rouge_l", and where there are choices "multiple_choice".
        main: the name of the score that counts.
        most_common: share of the rows with the most common answer.
        predictions, targets: what the model said, and what is right.
    """

    task: str
    family: str
    shots: int
    shown: float
    scores: dict[str, Measurement]
    main: str
    most_common: float
    predictions: list[str]
    targets: list[str]


@dataclass
class TaskScores:
    """Hold the scores of tasks, one `TaskScore` for each task and number of shots."""

    tasks: list[TaskScore]

    def values(self) -> dict[str, Measurement]:
        """Return the main scores by name, for each number of shots k.

        "task/NAME/k-shot"; "family/NAME/k-shot", the mean of its tasks; "mean/k-shot", the mean of the families. The
        interval of a mean is that of these tasks with other rows.
        """
        groups = {}
        for item in self.tasks:
            groups.setdefault(item.shots, {}).setdefault(item.family, []).append(item.scores[item.main])
        found = {f"task/{item.task}/{item.shots}-shot": item.scores[item.main] for item in self.tasks}
        for k, families in groups.items():
            found |= {f"family/{name}/{k}-shot": mean_of_tasks(parts) for name, parts in families.items()}
            weights = [1 / len(parts) for parts in families.values() for _ in parts]
            found[f"mean/{k}-shot"] = mean_of_tasks([part for parts in families.values() for part in parts], weights)
        return found

    def to_markdown(self) -> str:
        """Return a table of the scores in Markdown."""
        return markdown_table(*self._table())

    def to_terminal(self, title: str = "Tasks") -> str:
        """Return a table of the scores drawn by rich."""
        caption = "most common: share of the most common answer; main: the score that counts, with its 95 % interval"
        return terminal_table(*self._table(), left=("family",), title=title, caption=caption, width=150)

    def _table(self) -> tuple[list[str], list[list[str]]]:
        def cells(value):
            ends = bootstrap_interval(value) if len(value.columns) > 1 else ()
            return [f"{value:.3f}", " to ".join(f"{end:.3f}" for end in ends)]

        rows = []
        for item in self.tasks:
            shots = f"{item.shots}" if item.shown == item.shots else f"{item.shots} ({item.shown:.1f} fit)"
            numbers = [f"{item.scores[name]:.3f}" if name in item.scores else "" for name in METRICS]
            rows.append([item.task, item.family, shots, f"{len(item.targets)}", *numbers, f"{item.most_common:.3f}"])
            rows[-1] += [METRICS[item.main], *cells(item.scores[item.main])]
        families, tasks = {item.family for item in self.tasks}, {item.task for item in self.tasks}
        means = ("mean/", "family/") if len(families) < len(tasks) else ("mean/",)
        rows += [[k, *[""] * (len(METRICS) + 5), *cells(v)] for k, v in self.values().items() if k.startswith(means)]
        return ["task", "family", "shots", "rows", *METRICS.values(), "most common", "main", "score", "interval"], rows


def mean_of_tasks(parts: Sequence[Measurement], weights: Sequence[float] | None = None) -> Measurement:
    """Return Σ_k w_k·m_k / Σ_k w_k of the mean scores m_k of tasks; its items are the rows of all tasks.

    Args:
        weights: w_k; 1 each by default.
    """
    of_task = np.repeat(np.eye(len(parts)), [len(part.columns) for part in parts], axis=0)
    scores = of_task * np.concatenate([part.columns[:, :1] for part in parts])
    return Measurement(np.hstack([scores, of_task]), partial(_weighted, weights=weights or [1.0] * len(parts)))


def _weighted(means: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """Return the mean of tasks from the means of 2K columns; a task that was not drawn into a resample is left out."""
    sums, shares = np.split(means, 2, axis=-1)
    weights = np.where(shares > 0, weights, 0.0)
    return (weights * sums / np.where(shares > 0, shares, 1.0)).sum(-1) / weights.sum(-1)


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Mapping | Any],
    *,
    shots: Sequence[int] = (0, 4),
    rows: int = 64,
    max_new_tokens: int = 64,
    seed: int = 0,
    batch_size: int = 8,
    max_length: int | None = None,
    chat: bool | None = None,
) -> TaskScores:
    """Ask a model rows of tasks, after no or some examples of the same task, and score its answers.

    Answers are decoded greedily up to a stop token; after examples that are text also up to a blank line, as stands
    between examples. Exact match compares as SQuAD does (`normalized_answer`); ROUGE-L is `rouge_l`. A task has
    choices if it or its rows have `choices`, or if it has 2 to 10 different completions and at least twice as many
    rows: then these are the choices. The choice of the highest log-prob per character is taken. `main_score` tells
    which score counts. The examples before a row are drawn by the seed from rows with another prompt; those of fewer
    shots are the first of them.

    Args:
        tasks: mappings or objects with `name`, `family` (by default the name), `rows` of {"prompt", "completion"},
            each text or messages, and maybe `choices`, the possible completions of all rows.
        shots: numbers of examples.
        rows: most rows that are asked of each task.
        max_length: tokens of prompt and answer; by default the model's positions. The first examples for which a
            prompt has no room are left out (the table tells it), then the start of the prompt.
        chat: make a text prompt the message of a user; by default where the tokenizer has a chat template.

    Raises:
        ValueError: a task without a name, without usable rows, or with too few for the examples; a name that comes
            twice; no room for prompts; a prompt-learning adapter, which sampling and scoring leave out.
    """
    unwrapped(model)
    chat = bool(tokenizer.chat_template) if chat is None else chat
    read = [TaskRows.read(task, rows, seed, chat) for task in tasks]
    longest = max_length or getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = longest - max_new_tokens if longest else 0
    if len({task.name for task in read}) < len(read) or not (read and shots) or (longest and room < 1):
        raise ValueError(
            f"evaluate_tasks: tasks must be there and have different names ({[task.name for task in read]}), {shots=} "
            f"must not be empty, and {max_new_tokens=} must be below max_length, {longest}."
        )
    options = {"max_new_tokens": max_new_tokens, "temperature": 0.0, "pad_token_id": tokenizer.pad_token_id or 0}
    options |= {"stop_token_ids": stop_token_ids(model, tokenizer), "batch_size": batch_size}
    asked = [(task, k, _prompts(tokenizer, task, k, max(shots), seed, room)) for task in read for k in shots]
    bar = tqdm(asked, desc="Asking tasks", unit="task", disable=None)
    return TaskScores([_ask(model, tokenizer, *each, room, options) for each in bar])


def _prompts(tokenizer, task: TaskRows, k: int, most: int, seed: int, room: int) -> list[tuple]:
    """Return the prompt of each row after `k` of `most` examples, its ids, at most `room` (0: any), and how many."""
    made = []
    for row in range(task.asked):
        examples = task.examples(row, most, seed)[:k]
        ids = encode_prompt(tokenizer, task.prompt(row, examples))
        while room and len(ids) > room and examples:
            examples = examples[1:]
            ids = encode_prompt(tokenizer, task.prompt(row, examples))
        made.append((task.prompt(row, examples), ids[-room:], len(examples)))
    return made


def _ask(model, tokenizer, task: TaskRows, k: int, prompts: list[tuple], room: int, options: dict) -> TaskScore:
    """Return the scores of a task; its shortest prompts are answered first."""
    questions, ids, shown = zip(*prompts)
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    answers = tokenizer.batch_decode(generate(model, [ids[row] for row in order], **options), skip_special_tokens=True)
    said = [text.strip() for _, text in sorted(zip(order, answers))]
    if isinstance(questions[0], str):
        said = [text.split("\n\n")[0].strip() if count else text for text, count in zip(said, shown)]
    targets = task.answers[: task.asked]
    same = list(map(normalized_answer, targets))
    scores = {"exact_match": Measurement([normalized_answer(one) == other for one, other in zip(said, same)])}
    scores["rouge_l"] = Measurement([rouge_l(*pair) for pair in zip(said, targets)])
    if task.choices:
        choices = task.choices[: task.asked]
        pairs = [(*asked, choice) for *asked, own in zip(questions, ids, choices) for choice in own]
        contexts, completions = zip(*(_encode_choice(tokenizer, *pair, room) for pair in pairs))
        nll = completion_nll(model, contexts, completions, batch_size=options["batch_size"])
        nll = np.split(nll / [len(choice) for *_, choice in pairs], np.cumsum(list(map(len, choices)))[:-1])
        best = [own[int(values.argmin())] for own, values in zip(choices, nll)]
        scores["multiple_choice"] = Measurement([one == other for one, other in zip(best, targets)])
    common = Counter(same).most_common(1)[0][1] / len(same)
    return TaskScore(task.name, task.family, k, mean(shown), scores, main_score(task), common, said, targets)


def _encode_choice(tokenizer, prompt: str | list[dict], ids: list[int], choice: str, room: int):
    """Return the ids of a prompt and of a choice after it. A line break at the end of the prompt belongs to it.

    As a part of each choice it would count more, per character, for the short ones.
    """
    if isinstance(prompt, str) and not prompt.endswith("\n"):
        context, answer = encode_choice(tokenizer, prompt, choice)
        return context[-room:], answer
    return ids, tokenizer(choice, add_special_tokens=False)["input_ids"]
