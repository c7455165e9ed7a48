"""Mix instruction tasks: draw a task, one of its rows, a template and whether to show the steps to the answer."""

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import count
from pathlib import Path

import numpy as np
import yaml
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from lifecycle_hf.data.chat import require_chat_template
from lifecycle_hf.data.domains import shares_of
from lifecycle_hf.data.instruction_tasks import InstructionTask
from lifecycle_hf.data.permutation import permuted, random_integers, uniform
from lifecycle_hf.data.templates import build
from lifecycle_hf.data.tokenize import conversation_texts, encode_texts
from lifecycle_hf.data.usable import tell_rows

FLAN_CHAINS = 0.05
"""The share of examples with a chain of thought in FLAN's mixture."""
_MESSAGES = List({"role": Value("string"), "content": Value("string")})
FEATURES = Features(prompt=_MESSAGES, completion=_MESSAGES)
_TASK, _ROW, _SUBSET, _TEMPLATE, _CHAIN = range(5)  # what a random number is for
_BLOCK = 1024


def mixing_rates(sizes: Sequence[int], *, temperature: float = 1.0, cap: int | None = None) -> np.ndarray:
    """Return the share p_k with which each task is drawn: N̂_k = min(N_k, cap), then p_k ∝ N̂_k^(1/temperature).

    A temperature of 1 is proportional mixing, an infinite one is uniform. A task without rows has p = 0.

    Raises:
        ValueError: the temperature or the cap is not positive, or no task has a row.

    Reference: Raffel et al., T5, https://arxiv.org/abs/1910.10683, section 3.5.2; Wei et al., FLAN,
    https://arxiv.org/abs/2109.01652, section 2.1.
    """
    if not temperature > 0 or (cap is not None and cap <= 0):
        raise ValueError(f"temperature={temperature} and cap={cap} must be positive.")
    capped = np.minimum(np.asarray(sizes, dtype=float), cap or np.inf)
    if not capped.any():
        raise ValueError("no task has a usable row.")
    rates = np.where(capped > 0, (capped / capped.max()) ** (1 / temperature), 0.0)
    return rates / rates.sum()


@dataclass(eq=False)
class InstructionMixture:
    """Draw examples from instruction tasks, with rates that depend on their sizes.

    Draw i is a pure function of (seed, i), so a resumed run and all ranks see the same stream. Its task is drawn with
    the share p_k of `mixing_rates`, where N_k is the number of usable rows. Its row is the next one of a permutation
    of the task's rows, and each pass over the task has another permutation. Its template is drawn evenly among those
    that fit the row. Where the row has a chain of thought, it comes before the answer with probability `cot_ratio`. No
    rows are copied, and no order of rows is held, so memory does not grow with the size of a task.

    Rows that can't be used (such as rows with an empty answer) are dropped with a warning. A task of which no row is
    left is not drawn. The defaults are those of FLAN.

    Args:
        tasks: the tasks; see [`InstructionTask`].
        temperature: τ of `mixing_rates`.
        cap: M of `mixing_rates`, the most rows of a task that count for its share; None for no cap.
        max_rows: the most rows of a task that are used, a random choice that is the same in each pass; None for all.
        weights: {name of a task: weight}, for shares in proportion to weights instead of by size; or a YAML file with
            this mapping as `weights`, as [`DoReMiTrainer`] writes it.
        cot_ratio: the probability of a chain of thought where a row has one. None chooses it so that 5 % of all
            examples have a chain, or all that can if these are fewer.
        cot_cue: line after the prompt where a chain of thought is shown, so that the model can tell when to write one.
        system_prompt: the system message of all chats that have none.
        templates: False takes for each task the template that adds no text (`InstructionTask.without_templates`).
        held_out: families that are never drawn. The attribute `held_out` lists their tasks, `tasks` the others.
        seed: of all draws.
        strict_data: raise on a row that can't be used.

    Raises:
        ValueError: an option is not valid, no task is left, or two tasks have the same name.

    Reference: Longpre et al., The Flan Collection, https://arxiv.org/abs/2301.13688.
    """

    tasks: Sequence[InstructionTask]
    _: KW_ONLY
    temperature: float = 1.0
    cap: int | None = 3_000
    max_rows: int | None = 30_000
    weights: Mapping[str, float] | str | Path | None = None
    cot_ratio: float | None = None
    cot_cue: str = "Let's think step by step."
    system_prompt: str | None = None
    templates: bool = True
    held_out: Sequence[str] = ()
    seed: int = 0
    strict_data: bool = False

    def __post_init__(self):
        _check_names(self.tasks, self.held_out)
        if self.max_rows is not None and self.max_rows < 1:
            raise ValueError(f"max_rows={self.max_rows} must be positive; None takes all rows.")
        tasks = [task if self.templates else task.without_templates() for task in self.tasks]
        self.tasks = [task for task in tasks if task.family not in self.held_out]
        self.held_out = [task for task in tasks if task.family in self.held_out]
        for task in tasks:
            _report_dropped(task, self.strict_data)
        self._usable = np.array([len(task) for task in self.tasks])
        self.sizes = np.minimum(self._usable, np.inf if self.max_rows is None else self.max_rows).astype(np.int64)
        self.rates = mixing_rates(self.sizes, temperature=float(self.temperature), cap=self.cap)
        if self.weights is not None:
            self.rates = _rates_of(self.weights, self.tasks)
        self._chains = np.array([task.checked[2] for task in self.tasks]) / np.maximum(self._usable, 1)
        possible = float(self.rates @ self._chains)
        if self.cot_ratio is None:
            self.cot_ratio = FLAN_CHAINS / max(FLAN_CHAINS, possible)
        elif not 0 <= self.cot_ratio <= 1 or (self.cot_ratio and not possible):
            told = f"cot_ratio={self.cot_ratio} must lie between 0 and 1, and some rows must have a chain of thought"
            raise ValueError(f"{told}; {possible:.0%} of the draws can have one (in the column that `chain` names).")
        self._ends = np.cumsum(self.rates)
        self._ends[np.flatnonzero(self.rates)[-1] :] = 1

    @classmethod
    def from_yaml(cls, path: str | Path, **options) -> "InstructionMixture":
        """Return the mixture of a YAML file: `tasks`, a list of the options of each task, and the mixture's options.

        Paths are relative to the folder of the file. A task without a name has that of its file.

        Args:
            options: the mixture's options that replace those of the file.

        Raises:
            ValueError: an option is unknown, missing or not valid; the message names the file and the task.
        """
        path = Path(path)
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(read, dict) or not all(isinstance(entry, dict) for entry in read.get("tasks") or [None]):
            raise ValueError(f"{path}: a mixture is a mapping of options, of which 'tasks' is a list of mappings.")
        for entry in read["tasks"]:
            given = {name: entry[name] for name in ("rows", "templates") if isinstance(entry.get(name), str)}
            entry |= {name: str(path.parent / file) for name, file in given.items() if (path.parent / file).exists()}
            entry.setdefault("name", Path(given.get("rows", "")).name.partition(".")[0])
        if isinstance(read.get("weights"), str):
            read["weights"] = path.parent / read["weights"]
        tasks = [build(InstructionTask, entry, f"{path}: task {entry['name']!r}") for entry in read["tasks"]]
        return build(cls, read | {"tasks": tasks} | options, str(path))

    def stream(self, draws: int | None = None, start: int = 0) -> IterableDataset:
        """Return the examples of draws `start`, `start` + 1, … as a stream of `prompt` and `completion` messages.

        Args:
            draws: number of draws; None for a stream without an end.
        """
        given = {"start": start, "stop": None if draws is None else start + draws}
        return IterableDataset.from_generator(self._examples, features=FEATURES, gen_kwargs=given)

    def dataset(self, draws: int, start: int = 0) -> Dataset:
        """Return the examples of `stream` in memory."""
        return Dataset.from_list(list(self._examples(start, start + draws)), features=FEATURES)

    def drawn(self, draws: int, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Return the task [draws] and the number of the row among its usable rows [draws] of each draw."""
        tasks, rows, *_ = zip(*self._blocks(start, start + draws))
        return np.concatenate(tasks), np.concatenate(rows)

    def _blocks(self, start: int, stop: int | None) -> Iterator[tuple[np.ndarray, ...]]:
        """Yield, for many draws at a time, the task, the row and two uniform numbers, for template and chain."""
        counts = np.zeros(len(self.tasks), dtype=np.int64)
        for first in count(0, _BLOCK) if stop is None else range(0, stop, _BLOCK):
            draw = np.arange(first, first + _BLOCK)
            tasks = np.searchsorted(self._ends, uniform(self.seed, _TASK, draw), side="right")
            if first + _BLOCK > start:
                order = np.argsort(tasks, kind="stable")
                turns = counts[tasks]
                turns[order] += np.arange(_BLOCK) - np.searchsorted(tasks[order], tasks[order])
                cut = slice(max(start - first, 0), None if stop is None else stop - first)
                yield tuple(part[cut] for part in (tasks, self._rows(tasks, turns), *self._chances(draw)))
            counts += np.bincount(tasks, minlength=len(counts))

    def _rows(self, tasks: np.ndarray, turns: np.ndarray) -> np.ndarray:
        """Return the row that each task gives when it is drawn for the turn-th time (from 0)."""
        passes, places = np.divmod(turns, self.sizes[tasks])
        places = permuted(places, self.sizes[tasks], random_integers(self.seed, _ROW, tasks, passes))
        return permuted(places, self._usable[tasks], random_integers(self.seed, _SUBSET, tasks))

    def _chances(self, *key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return uniform(self.seed, _TEMPLATE, *key), uniform(self.seed, _CHAIN, *key)

    def _examples(self, start: int, stop: int | None) -> Iterator[dict[str, list[dict]]]:
        for block in self._blocks(start, stop):
            for task, row, choice, chance in zip(*block):
                yield self.example(self.tasks[task], row, choice, chain=chance < self.cot_ratio)

    def example(
        self, task: InstructionTask, number: int, choice: float = 0.0, *, chain: bool = False
    ) -> dict[str, list[dict]]:
        """Return a usable row of a task, also of a held-out one, as the mixture shows it: with the system prompt.

        Args:
            number, choice: see `InstructionTask.example`.
            chain: show the row's chain of thought if it has one.
        """
        example = task.example(number, choice, cue=(self.cot_cue or "") if chain else None)
        if self.system_prompt and example["prompt"][0]["role"] != "system":
            example["prompt"].insert(0, {"role": "system", "content": self.system_prompt})
        return example

    def report(self, draws: int, tokenizer: PreTrainedTokenizerBase | None = None, *, sample: int = 32) -> list[dict]:
        """Return what a run of `draws` draws takes of each task, to be read before training.

        Args:
            tokenizer: counts the tokens; it needs a chat template.
            sample: examples of a task whose tokens are counted, at most.

        Returns:
            for each task: task, family, rows, usable (rows that are not dropped), used (of these at most `max_rows`),
            share of the draws, chains (share of its examples with a chain of thought), epochs (expected passes over
            the used rows), and with a tokenizer tokens (mean of an example) and token_share.
        """
        table = {
            "task": [task.name for task in self.tasks],
            "family": [task.family for task in self.tasks],
            "rows": [len(task.rows) for task in self.tasks],
            "usable": self._usable.tolist(),
            "used": self.sizes.tolist(),
            "share": self.rates.tolist(),
            "chains": (self.cot_ratio * self._chains).tolist(),
            "epochs": (draws * self.rates / np.maximum(self.sizes, 1)).tolist(),
        }
        if tokenizer is not None:
            require_chat_template(tokenizer, "the mixture")
            tokens = np.array([self._mean_tokens(number, tokenizer, sample) for number in range(len(self.tasks))])
            table |= {"tokens": tokens.tolist(), "token_share": (self.rates * tokens / (self.rates @ tokens)).tolist()}
        return [dict(zip(table, values)) for values in zip(*table.values())]

    def _mean_tokens(self, number: int, tokenizer: PreTrainedTokenizerBase, sample: int) -> float:
        """Return the mean number of tokens of examples of a task, 0 for a task without usable rows."""
        turns = np.arange(min(sample, self.sizes[number]))
        tasks = np.full(len(turns), number)
        texts = []
        for row, choice, chance in zip(self._rows(tasks, turns), *self._chances(tasks, turns)):
            example = self.example(self.tasks[number], row, choice, chain=chance < self.cot_ratio)
            texts.append(conversation_texts(tokenizer, example)[-1])
        return sum(map(len, encode_texts(tokenizer, texts))) / max(len(texts), 1)


def _check_names(tasks: Sequence[InstructionTask], held_out: Sequence[str]) -> None:
    """Check that the names of tasks differ, that the held-out families exist, and that a task is left.

    Raises:
        ValueError: one of these is wrong.
    """
    names, families = Counter(task.name for task in tasks), {task.family for task in tasks if task.family}
    if twice := [name for name, times in names.items() if times > 1]:
        raise ValueError(f"tasks: several have the name {twice[0]!r}. Give each its own.")
    if isinstance(held_out, str) or not families.issuperset(held_out):
        raise ValueError(f"held_out={held_out!r} must be a list of families; the tasks have {sorted(families)}.")
    if all(task.family in held_out for task in tasks):
        raise ValueError(f"tasks: of {len(tasks)} none is left to train on.")


def _report_dropped(task: InstructionTask, strict: bool) -> None:
    """Warn of the rows of a task that can't be used.

    Raises:
        ValueError: there is one, under `strict`.
    """
    bad, problems, _ = task.checked
    if len(bad):
        told, mends = tell_rows(problems, len(task.rows), int(bad[0]), f"task {task.name!r}")
        if strict:
            raise ValueError(f"{told}. strict_data is on: mend or remove these rows, or turn it off.{mends}")
        left = "They are dropped." if len(task) else "No row is left, so the task is not drawn."
        warnings.warn(f"{told}. {left}{mends}", UserWarning, stacklevel=4)


def _rates_of(weights: Mapping[str, float] | str | Path, tasks: Sequence[InstructionTask]) -> np.ndarray:
    """Return the shares of tasks in proportion to their weights.

    Raises:
        ValueError: the weights do not name the tasks, one is negative, all are 0, or one is of a task without rows.
    """
    rates = shares_of(weights, [task.name for task in tasks], "weights: each task")
    if useless := [task.name for task, rate in zip(tasks, rates) if rate and not len(task)]:
        raise ValueError(f"weights: {', '.join(useless)} has no usable row. Set its weight to 0.")
    return rates
