"""Reward functions: models and callables behind one interface, checked where they can go wrong."""

import importlib
import inspect
import json
import math
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from trl.trainer.utils import get_callable_name

from lifecycle_hf.data.tokenize import encode_complete


@dataclass
class Samples:
    """Prompts with their sampled completions, as reward functions get them.

    Attributes:
        prompts: text or messages.
        texts: completions as text, without special tokens.
        columns: the dataset's other columns, one list each.
    """

    prompts: list[str] | list[list[dict]]
    texts: list[str]
    columns: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def completions(self) -> list:
        """Completions in the prompts' format: text, or a list with one assistant message."""
        return [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(self.prompts, self.texts, strict=True)
        ]

    def encode(self, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """Finished conversations as a reward model reads them."""
        return [
            encode_complete(tokenizer, _continued(prompt, completion))
            for prompt, completion in zip(self.prompts, self.completions, strict=True)
        ]


def _continued(prompt, completion):
    if isinstance(prompt, str) or prompt[-1]["role"] != "assistant":
        return prompt + completion
    opened = prompt[-1] | {"content": prompt[-1]["content"] + completion[0]["content"]}
    return [*prompt[:-1], opened]


class CallableReward:
    """A function `f(prompts, completions, **columns) -> list[float]`, as TRL's GRPOTrainer takes them.

    It gets the columns that its signature names, or all of them if it takes `**kwargs`.

    Args:
        timeout: seconds that a call may take; None for any. A call that takes longer is left behind in its thread and
            may still run when the function is called again: the function must bear calls that overlap.
        retries: how often it is called again after it raised, timed out or returned what is no reward.
    """

    def __init__(self, function: Callable[..., list[float]], timeout: float | None = None, retries: int = 0):
        self.function, self.timeout, self.retries = function, timeout, retries
        self.name = get_callable_name(function)
        parameters = inspect.signature(function).parameters
        named = {name for name, p in parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD}
        self.required = {n for n in named if parameters[n].default is inspect.Parameter.empty} - {
            "prompts",
            "completions",
        }
        self._takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        self._names = set(parameters)

    def __call__(self, samples: Samples) -> list[float]:
        """One float per completion.

        Raises:
            ValueError: if the function raises, takes too long, or returns another count than it got, or None, NaN or
                infinity, naming the row or the prompts.
        """
        for left in reversed(range(self.retries + 1)):
            try:
                return self._checked(self._call(samples), samples)
            except Exception as error:
                if left == 0:
                    raise
                warnings.warn(f"{str(error)[:300]} Trying again, {left} times at most.", stacklevel=2)

    def _call(self, samples: Samples):
        columns = {k: v for k, v in samples.columns.items() if self._takes_all or k in self._names}
        ask = partial(self.function, prompts=samples.prompts, completions=samples.completions, **columns)
        outcome: dict[str, Any] = {}

        def run(ask, caught):
            try:
                outcome["scores"] = ask()
            except caught as error:
                outcome["error"] = error

        if self.timeout is None:
            run(ask, Exception)
        else:  # what ends a thread ends nothing else: SystemExit is an error there as any other
            arguments = (_as_in_this_thread(ask), BaseException)
            # A daemon ends with the process, however long it hangs.
            thread = threading.Thread(target=run, args=arguments, daemon=True)
            thread.start()
            thread.join(self.timeout)
        if "error" in outcome:
            error = outcome["error"]
            raise ValueError(
                f"The reward function {self.name!r} raised {type(error).__name__}: {error}. {_named(samples)}"
            ) from error
        if "scores" not in outcome:
            raise ValueError(
                f"The reward function {self.name!r} took longer than {self.timeout} s (reward_timeout). "
                f"{_named(samples)}"
            )
        return outcome["scores"]

    def _checked(self, scores, samples: Samples) -> list[float]:
        scores = scores.tolist() if isinstance(scores, torch.Tensor) else scores
        if not hasattr(scores, "__len__") or len(scores) != len(samples.texts):
            got = f"{len(scores)} values" if hasattr(scores, "__len__") else repr(scores)
            raise ValueError(
                f"The reward function {self.name!r} returned {got} for {len(samples.texts)} completions: it must "
                "return a list with one float per completion."
            )
        for i, score in enumerate(scores):
            if not _is_finite(score):
                raise ValueError(
                    f"The reward function {self.name!r} returned {score} for row {i}, prompt "
                    f"{str(samples.prompts[i])[-200:]!r}, completion {samples.texts[i][:200]!r}: every reward must be "
                    "a finite number. Return a fallback value there, or drop such prompts."
                )
        return [float(score) for score in scores]


def _as_in_this_thread(call: Callable[[], Any]) -> Callable[[], Any]:
    """`call` under the grad mode and on the CUDA device of the thread that asks for it, as each thread has its own."""
    grad, device = torch.is_grad_enabled(), torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def carried():
        if device is not None:
            torch.cuda.set_device(device)
        with torch.set_grad_enabled(grad):
            return call()

    return carried


def _is_finite(score) -> bool:
    try:
        return math.isfinite(float(score))
    except (TypeError, ValueError, OverflowError):
        return False


def _named(samples: Samples) -> str:
    """The prompts of a batch, cut to what a message holds."""
    shown = [str(prompt)[-60:] for prompt in samples.prompts[:8]]
    return f"Its batch has {len(samples.prompts)} prompts: {shown}{' ...' if len(samples.prompts) > 8 else ''}."


def find_reward(name: str) -> Callable[..., list[float]] | str:
    """Return the function of MODULE:FUNCTION, modules in the current folder included; any other name as it is.

    Raises:
        ValueError: there is no such module or function.
    """
    module, _, function = name.partition(":")
    if not function or "/" in name:
        return name
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward_funcs: {name!r} can't be imported ({error}); looked in {Path.cwd()} too.") from error


class KeptScores:
    """Scores of a rollout whose scoring failed, in a file, so that the resumed run need not ask for them again.

    Args:
        path: JSON lines, one per completion: prompt, completion, and the scores that were known by then.
    """

    def __init__(self, path: Path):
        self.path = path

    def write(self, samples: Samples, scores: dict[str, torch.Tensor]) -> None:
        columns = {name: values.tolist() for name, values in scores.items()}
        rows = [
            {"prompt": prompt, "completion": text, "scores": {name: column[i] for name, column in columns.items()}}
            for i, (prompt, text) in enumerate(zip(samples.prompts, samples.texts, strict=True))
        ]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(f"{self.path.name}.part")
        part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        part.replace(self.path)

    def read(self, samples: Samples) -> dict[str, torch.Tensor]:
        """The scores of these very completions by the name of their reward; nothing of others, or of a broken file."""
        try:
            # Not splitlines, which cuts at line breaks that JSON leaves as they are.
            rows = [json.loads(line) for line in self.path.read_text(encoding="utf-8").split("\n") if line]
            kept = [(row["prompt"], row["completion"]) for row in rows]
            scores = {name: torch.tensor([float(row["scores"][name]) for row in rows]) for name in rows[0]["scores"]}
        except (OSError, ValueError, LookupError, TypeError):
            return {}
        return scores if kept == list(zip(samples.prompts, samples.texts, strict=True)) else {}

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)


class RunningMoments:
    """Mean and variance of everything seen, by Chan's parallel update (Chan, Golub and LeVeque 1979)."""

    def __init__(self):
        self.count, self.mean, self.squares = 0.0, 0.0, 0.0

    def update(self, values: torch.Tensor) -> None:
        """Takes in `values` [N], the same on all ranks."""
        values = values.double()
        count, mean = values.numel(), values.mean().item()
        squares, delta, total = (values - mean).square().sum().item(), mean - self.mean, self.count + count
        self.mean += delta * count / total
        self.squares += squares + delta**2 * self.count * count / total
        self.count = total

    @property
    def std(self) -> float:
        """Standard deviation of the population; 1 until two values differ."""
        variance = self.squares / self.count if self.count else 0.0
        return variance**0.5 if variance > 1e-12 else 1.0

    def state_dict(self) -> dict[str, float]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, float]) -> None:
        vars(self).update(state)
