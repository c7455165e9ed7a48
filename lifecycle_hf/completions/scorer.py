"""Score samples by several reward functions at once: reward models and callables."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from lifecycle_hf.completions.rewards import CallableReward, KeptScores, Samples, score_together
from lifecycle_hf.completions.scoring import Completions


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
        kept: where the scores that are known stay if a reward function raises.
    """

    def __init__(
        self,
        sources: list[RewardSource],
        run: Callable[[str, Completions], torch.Tensor],
        device: torch.device,
        kept: KeptScores,
    ):
        self.sources, self.run, self.device, self.kept = sources, run, device, kept

    def __call__(self, samples: Samples, batch_size: int) -> dict[str, torch.Tensor]:
        """Return the scores [N] of every reward function, fp32 on the CPU.

        Args:
            batch_size: rows that a reward model reads together.

        Raises:
            ValueError: a reward function raises, or a score is not finite; the scores that are known are in a file.
        """
        known, raw = self.kept.read(samples), {}
        waiting = [s for s in self.sources if s.function is not None and s.function.is_async and s.name not in known]
        together = score_together([source.function for source in waiting], samples) if waiting else []
        done = known | dict(zip((source.name for source in waiting), together, strict=True))
        for source in self.sources:
            try:
                raw[source.name] = self._scores_of(source, samples, batch_size, done.get(source.name))
            except ValueError as error:
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
