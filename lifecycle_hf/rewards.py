"""Reward functions: models and callables behind one interface, checked where they can go wrong."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
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
    """

    def __init__(self, function: Callable[..., list[float]]):
        self.function = function
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
            ValueError: if the function returns another count than it got, or None, NaN or infinity, naming the row.
        """
        columns = {k: v for k, v in samples.columns.items() if self._takes_all or k in self._names}
        scores = self.function(prompts=samples.prompts, completions=samples.completions, **columns)
        scores = scores.tolist() if isinstance(scores, torch.Tensor) else scores
        if not hasattr(scores, "__len__") or len(scores) != len(samples.texts):
            got = f"{len(scores)} values" if hasattr(scores, "__len__") else repr(scores)
            raise ValueError(
                f"The reward function {self.name!r} returned {got} for {len(samples.texts)} completions: it must "
                "return a list with one float per completion."
            )
        for i, score in enumerate(scores):
            if score is None or not torch.isfinite(torch.tensor(float(score))):
                raise ValueError(
                    f"The reward function {self.name!r} returned {score} for row {i}, prompt "
                    f"{str(samples.prompts[i])[-200:]!r}, completion {samples.texts[i][:200]!r}: every reward must be "
                    "a finite number. Return a fallback value there, or drop such prompts."
                )
        return [float(score) for score in scores]


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
