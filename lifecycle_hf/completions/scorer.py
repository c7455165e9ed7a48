"""Score samples by several reward functions at once: reward models and callables."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from lifecycle_hf.completions.rewards import CallableReward, KeptScores, Samples, score_together
from lifecycle_hf.completions.scoring import Completions
from lifecycle_hf.models.loading import load_reward_model


@dataclass
class RewardSource:
    """A reward function: a callable, or the name of a reward model and its tokenizer."""

    name: str
    function: CallableReward | None = None
    tokenizer: PreTrainedTokenizerBase | None = None


class RewardScorer:
    """Score samples by reward models and callables; async callables run together, before the others.

    Args:
        sources: the reward functions.
        run: function from the name of a reward model and a batch to its scores [B].
        device: device of the batches.
        kept: where the scores that are known stay if a reward function raises; None to keep none.
    """

    def __init__(
        self,
        sources: list[RewardSource],
        run: Callable[[str, Completions], torch.Tensor],
        device: torch.device,
        kept: KeptScores | None,
    ):
        self.sources, self.run, self.device, self.kept = sources, run, device, kept

    def __call__(self, samples: Samples, batch_size: int) -> dict[str, torch.Tensor]:
        """Return the scores [N] of every reward function, fp32 on the CPU.

        Args:
            batch_size: rows that a reward model reads together.

        Raises:
            ValueError: a reward function raises, or a score is not finite; the scores that are known are in a file.
        """
        known, raw = {} if self.kept is None else self.kept.read(samples), {}
        waiting = [s for s in self.sources if s.function is not None and s.function.is_async and s.name not in known]
        together = score_together([source.function for source in waiting], samples) if waiting else []
        done = known | dict(zip((source.name for source in waiting), together, strict=True))
        for source in self.sources:
            try:
                raw[source.name] = self._scores_of(source, samples, batch_size, done.get(source.name))
            except ValueError as error:
                if self.kept is None:
                    raise
                finished = {
                    s.name: done[s.name] for s in self.sources if not isinstance(done.get(s.name, error), Exception)
                }
                raw |= {name: torch.as_tensor(scores) for name, scores in finished.items()}
                self.kept.write(samples, raw)
                where = f"The completions and {len(raw)} of {len(self.sources)} columns of scores are in"
                raise ValueError(f"{error} {where} {self.kept.path}; a resumed run reads that file.") from error
        if known:
            self.kept.clear()
        return raw

    def _scores_of(self, source: RewardSource, samples: Samples, size: int, done=None) -> torch.Tensor:
        """Return the scores [N] of a reward function; `done` are its scores, or its error, if it was called before."""
        if isinstance(done, BaseException):
            raise done
        if source.function is not None or done is not None:
            return torch.as_tensor(source.function(samples) if done is None else done, dtype=torch.float32)
        ids, scores = samples.encode(source.tokenizer), []
        for i in range(0, len(ids), size):
            # A reward model reads the last state of a whole sequence, so it does not matter where the prompt ends, nor
            # which token pads, if it is in the vocabulary.
            heads, tails = [row[:-1] for row in ids[i : i + size]], [row[-1:] for row in ids[i : i + size]]
            batch = Completions.from_lists(heads, tails, 0, self.device)
            scores.append(self.run(source.name, batch).float().cpu())
        scores = torch.cat(scores)
        bad = (~scores.isfinite()).nonzero()
        if len(bad):
            raise ValueError(
                f"The reward model {source.name!r} gave {scores[bad[0]].item()} for the completion "
                f"{samples.texts[int(bad[0])][:200]!r}: check its weights and its dtype."
            )
        return scores


def as_list(reward_funcs) -> list:
    """Return one or several reward functions as a list.

    Raises:
        ValueError: there is none.
    """
    funcs = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    if not funcs or None in funcs:
        raise ValueError("reward_funcs is missing: give a reward model, its name, a callable, or a list of them.")
    return funcs


def is_callable(func) -> bool:
    """Return whether a reward function is a callable, and no model or name of one."""
    return callable(func) and not isinstance(func, nn.Module)


def unique_name(base: str, taken: Iterable[str], reserved: Sequence[str] = ()) -> str:
    """Return a name for a reward function that is no other's: letters, digits and underscores for a model."""
    name, taken = f"reward_{base}" if base in reserved else base, set(taken)
    return name if name not in taken else next(f"{name}_{i}" for i in range(2, 99) if f"{name}_{i}" not in taken)


def model_name(func) -> str:
    """Return the name of a reward model, by the last part of its path where it has one."""
    return "reward" if not isinstance(func, str) else re.sub(r"\W", "_", Path(func).name)


def reward_scorer(
    reward_funcs,
    reward_weights: Sequence[float] | None,
    device: torch.device,
    kept: KeptScores | None = None,
    *,
    timeout: float | None = None,
    retries: int = 0,
) -> tuple[RewardScorer, dict[str, float]]:
    """Return a scorer that holds its own reward models, and the weight of each score by its name.

    Args:
        timeout, retries: of calls of callables, see [`CallableReward`].

    Raises:
        ValueError: there is no reward function, or another number of weights.
    """
    funcs, sources, models = as_list(reward_funcs), [], {}
    weights = [1.0] * len(funcs) if reward_weights is None else list(reward_weights)
    if len(weights) != len(funcs):
        raise ValueError(f"reward_weights has {len(weights)} entries for {len(funcs)} reward_funcs: give one each.")
    for func in funcs:
        taken = [source.name for source in sources]
        if is_callable(func):
            function = CallableReward(func, timeout, retries)
            sources.append(RewardSource(unique_name(function.name, taken), function=function))
        else:
            name = unique_name(model_name(func), taken)
            models[name] = load_reward_model(func).to(device)
            sources.append(RewardSource(name, tokenizer=models[name].tokenizer))

    @torch.no_grad()
    def run(name, batch):
        return models[name](batch.input_ids, batch.prompt_lengths + batch.completion_lengths)

    names = [source.name for source in sources]
    return RewardScorer(sources, run, device, kept), dict(zip(names, weights, strict=True))
