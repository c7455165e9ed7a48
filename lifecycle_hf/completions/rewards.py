"""Reward functions: calls of user functions with checks of what they return, and statistics of the scores."""

import asyncio
import functools
import importlib
import inspect
import json
import math
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from trl.trainer.utils import get_callable_name, is_async_callable, start_event_loop_in_daemon

from lifecycle_hf.data.chat import template_options
from lifecycle_hf.data.tokenize import encode_complete


@dataclass
class Samples:
    """Hold prompts and their sampled completions for reward functions.

    Attributes:
        prompts: text or messages.
        texts: completions as text, without special tokens.
        columns: the other columns of the dataset, one list each.
    """

    prompts: list[str] | list[list[dict]]
    texts: list[str]
    columns: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def completions(self) -> list:
        """Completions in the format of their prompt: text, or a list with one assistant message."""
        return [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(self.prompts, self.texts, strict=True)
        ]

    def encode(self, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """Return the token ids of each prompt with its completion, as a reward model reads them."""
        given = [template_options({n: self.columns[n][i] for n in self.columns}) for i in range(len(self.texts))]
        return [
            encode_complete(tokenizer, _continued(prompt, completion), **options)
            for prompt, completion, options in zip(self.prompts, self.completions, given, strict=True)
        ]


def _continued(prompt, completion):
    if isinstance(prompt, str) or prompt[-1]["role"] != "assistant":
        return prompt + completion
    said, more = prompt[-1]["content"], completion[0]["content"]
    opened = prompt[-1] | {"content": said + ([{"type": "text", "text": more}] if isinstance(said, list) else more)}
    return [*prompt[:-1], opened]


class CallableReward:
    """Call a function `f(prompts, completions, **columns) -> list[float]`, as TRL's GRPOTrainer takes them.

    The function gets the columns that its signature names, or all of them if it takes `**kwargs`. It may be an
    `async def`; [`score_together`] runs several of these at the same time.

    Args:
        timeout: seconds that a call may take; None for no limit. A call that takes longer goes on in its thread and
            may still run when the function is called again: the function must allow calls that overlap. A call of an
            `async def` is cancelled at its next `await`.
        retries: number of further calls after a call that raised, timed out or returned an invalid reward.
    """

    def __init__(self, function: Callable[..., list[float]], timeout: float | None = None, retries: int = 0):
        self.function, self.timeout, self.retries = function, timeout, retries
        self.name, self.is_async = get_callable_name(function), is_async_callable(function)
        parameters = inspect.signature(function).parameters.values()
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._names = {p.name for p in parameters}
        needed = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.default is p.empty}
        self.required = needed - {"prompts", "completions"}

    def __call__(self, samples: Samples) -> list[float]:
        """Return one float per completion.

        Raises:
            ValueError: the function raises, takes too long, returns another number of values, or returns None, NaN or
                infinity; names the row or the prompts.
        """
        if self.is_async:
            (scores,) = score_together([self], samples)
            if isinstance(scores, Exception):
                raise scores
            return scores
        for left in reversed(range(self.retries + 1)):
            try:
                return self._checked(self._call(samples), samples)
            except Exception as error:
                _retry(error, left)

    async def awaited(self, samples: Samples) -> list[float]:
        """Return the same for an `async def`; it must run in the loop of [`event_loop`]."""

        async def run():
            try:
                return {"scores": await self.function(**self._inputs(samples))}
            except BaseException as error:  # SystemExit would end the loop, and all that waits for it
                return {"error": error}

        for left in reversed(range(self.retries + 1)):
            call = asyncio.create_task(run(), name=self.name)
            done, _ = await asyncio.wait({call}, timeout=self.timeout)
            call.cancel()
            try:
                return self._checked(self._scores_in(call.result() if done else {}, samples), samples)
            except Exception as error:
                _retry(error, left)

    def _inputs(self, samples: Samples) -> dict[str, Any]:
        columns = {k: v for k, v in samples.columns.items() if self._takes_all or k in self._names}
        return {"prompts": samples.prompts, "completions": samples.completions, **columns}

    def _call(self, samples: Samples):
        inputs = self._inputs(samples)
        grad, device = torch.is_grad_enabled(), torch.cuda.current_device() if torch.cuda.is_initialized() else -1
        outcome: dict[str, Any] = {}

        def run(caught):
            try:
                # A new thread has a grad mode and a CUDA device of its own: it gets those of this thread.
                with torch.set_grad_enabled(grad), torch.cuda.device(device):
                    outcome["scores"] = self.function(**inputs)
            except caught as error:
                outcome["error"] = error

        if self.timeout is None:
            run(Exception)
        else:
            # In a thread SystemExit would end only the thread, so it is caught as an error like any other. A daemon
            # thread does not keep the process alive when the call hangs.
            thread = threading.Thread(target=run, args=(BaseException,), daemon=True)
            thread.start()
            thread.join(self.timeout)
        return self._scores_in(outcome, samples)

    def _scores_in(self, outcome: dict[str, Any], samples: Samples):
        """Return the "scores" of a call, or raise its "error"; a call that has neither took too long."""
        if "scores" in outcome:
            return outcome["scores"]
        error, why = outcome.get("error"), f"took longer than {self.timeout} s (reward_timeout)"
        if error is not None:
            why = f"raised {type(error).__name__}: {error}"
        shown = [str(prompt)[-60:] for prompt in samples.prompts[:8]]
        batch = f"{len(samples.prompts)} prompts: {shown}{' ...' if len(samples.prompts) > 8 else ''}"
        raise ValueError(f"The reward function {self.name!r} {why}. Its batch has {batch}.") from error

    def _checked(self, scores, samples: Samples) -> list[float]:
        scores = scores.tolist() if isinstance(scores, torch.Tensor) else scores
        if not hasattr(scores, "__len__") or len(scores) != len(samples.texts):
            got = f"{len(scores)} values" if hasattr(scores, "__len__") else repr(scores)
            raise ValueError(
                f"The reward function {self.name!r} returned {got} for {len(samples.texts)} completions: return a "
                "list with one float per completion."
            )
        for i, score in enumerate(scores):
            if not _is_finite(score):
                raise ValueError(
                    f"The reward function {self.name!r} returned {score} for row {i}, prompt "
                    f"{str(samples.prompts[i])[-200:]!r}, completion {samples.texts[i][:200]!r}: every reward must be "
                    "a finite number. Return a fallback value there, or drop such prompts."
                )
        return [float(score) for score in scores]


def _retry(error: Exception, left: int) -> None:
    """Warn that a call failed and is made again; raise its error if no call is left."""
    if left == 0:
        raise error
    warnings.warn(f"{str(error)[:300]} Trying again, {left} times at most.", stacklevel=3)


@functools.cache
def event_loop() -> asyncio.AbstractEventLoop:
    """Return the loop in which async rewards run, in a daemon thread.

    It is one for the whole process, because clients for HTTP keep connections that belong to their loop.
    """
    _, loop, ready = start_event_loop_in_daemon("async rewards")
    ready.wait()
    return loop


def score_together(rewards: list[CallableReward], samples: Samples) -> list[list[float] | Exception]:
    """Return the scores of several `async def` rewards, which run at the same time; for one that fails, its error.

    A call that blocks the loop (one that does not `await`) ends the waiting a second after the last timeout.
    """
    grad, device = torch.is_grad_enabled(), torch.cuda.current_device() if torch.cuda.is_initialized() else -1

    async def run():
        with torch.set_grad_enabled(grad), torch.cuda.device(device):  # those of the calling thread
            return await asyncio.gather(*(reward.awaited(samples) for reward in rewards), return_exceptions=True)

    limits = [None if reward.timeout is None else reward.timeout * (reward.retries + 1) + 1 for reward in rewards]
    scores = asyncio.run_coroutine_threadsafe(run(), event_loop())
    try:
        return scores.result(None if None in limits else max(limits, default=0))
    except TimeoutError:
        blocking = asyncio.current_task(event_loop())
        event_loop.cache_clear()  # the blocked thread is left
        names = repr(blocking.get_name()) if blocking else " or ".join(repr(reward.name) for reward in rewards)
        why = f"took longer than {rewards[0].timeout} s (reward_timeout) and blocks its event loop: `await` in it"
        return [ValueError(f"The reward function {names} {why}.") for _ in rewards]


def _is_finite(score) -> bool:
    try:
        return math.isfinite(float(score))
    except (TypeError, ValueError, OverflowError):
        return False


def find_reward(name: str) -> Callable[..., list[float]] | str:
    """Return the function that MODULE:FUNCTION names, or any other name unchanged.

    The module may be a file in the current folder.

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
        where = f"looked in {Path.cwd()} too: give MODULE:FUNCTION"
        raise ValueError(f"reward_funcs: {name!r} can't be imported ({error}); {where}.") from error


class KeptScores:
    """Keep the scores of a rollout whose scoring failed in a file, so that a resumed run does not compute them again.

    Args:
        path: file of JSON lines, one per completion: prompt, completion, and the scores known at the failure.
    """

    def __init__(self, path: Path):
        self.path = path

    def write(self, samples: Samples, scores: dict[str, torch.Tensor]) -> None:
        """Write the file: the samples and {name of the reward: scores [N]}."""
        rows = [
            {
                "prompt": prompt,
                "completion": text,
                "scores": {name: values[i].item() for name, values in scores.items()},
            }
            for i, (prompt, text) in enumerate(zip(samples.prompts, samples.texts, strict=True))
        ]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(f"{self.path.name}.part")
        part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        part.replace(self.path)

    def read(self, samples: Samples) -> dict[str, torch.Tensor]:
        """Return {name of the reward: scores}; {} if the file has other completions, is damaged or does not exist."""
        try:
            # Not splitlines, which also splits at Unicode line separators, and JSON strings may contain those.
            rows = [json.loads(line) for line in self.path.read_text(encoding="utf-8").split("\n") if line]
            kept = [(row["prompt"], row["completion"]) for row in rows]
            scores = {name: torch.tensor([float(row["scores"][name]) for row in rows]) for name in rows[0]["scores"]}
        except (OSError, ValueError, LookupError, TypeError):
            return {}
        return scores if kept == list(zip(samples.prompts, samples.texts, strict=True)) else {}

    def clear(self) -> None:
        """Delete the file if it exists."""
        self.path.unlink(missing_ok=True)


class RunningMoments:
    """Mean and variance of all values so far, by Chan's parallel update (Chan, Golub and LeVeque 1979)."""

    def __init__(self):
        self.count, self.mean, self.squares = 0.0, 0.0, 0.0

    def update(self, values: torch.Tensor) -> None:
        """Include `values` [N], which must be the same on all ranks."""
        values = values.double()
        count, mean = values.numel(), values.mean().item()
        squares, delta, total = (values - mean).square().sum().item(), mean - self.mean, self.count + count
        self.mean += delta * count / total
        self.squares += squares + delta**2 * self.count * count / total
        self.count = total

    @property
    def std(self) -> float:
        """Standard deviation of the population; 1 as long as all values are equal."""
        variance = self.squares / self.count if self.count else 0.0
        return variance**0.5 if variance > 1e-12 else 1.0

    def state_dict(self) -> dict[str, float]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, float]) -> None:
        vars(self).update(state)
