"""Several reward models as one: their scores on a common scale, reduced to one that is hard to over-optimise."""

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from lifecycle_hf.data.collators import pad_sequences
from lifecycle_hf.models.heads import RewardModel
from lifecycle_hf.models.loading import is_adapter, load_reward_model, load_tokenizer, save_adapter_notes

ENSEMBLE = "ensemble.json"
REDUCTIONS = ("min", "mean", "lower_bound")


def reduce_scores(scores: torch.Tensor, reduction: str = "min", coef: float = 1.0) -> torch.Tensor:
    """Reduce the scores of K members to one: min_k r_k, mean_k r_k, or mean_k r_k − λ·std_k r_k ("lower_bound").

    Args:
        scores: [K, B], on a common scale.
        coef: λ; the deviation is that of the population.

    Returns:
        [B].

    Raises:
        ValueError: the reduction is unknown.

    Reference: https://arxiv.org/abs/2310.02743, Section 3.
    """
    if reduction == "min":
        return scores.amin(0)
    if reduction == "mean":
        return scores.mean(0)
    if reduction == "lower_bound":
        return scores.mean(0) - coef * scores.std(0, correction=0)
    raise ValueError(f"reduction={reduction!r} is unknown: use {', '.join(map(repr, REDUCTIONS))}.")


class RewardEnsemble(nn.Module):
    """Score by several reward models: each member's score is made z = (r − mean) / deviation, and these are reduced.

    It stands wherever a reward model may: as an object, or by the name of the folder that [`save_pretrained`] wrote.
    Members that are adapters of one base share it.

    Args:
        members: reward models, or their names or paths.
        reduction: "min", "mean" or "lower_bound", see [`reduce_scores`].
        coef: λ of "lower_bound".
        means, deviations: scale of each member, from [`fit`]; 0 and 1 by default.

    Raises:
        ValueError: there are fewer than two members, their tokenizers differ, or the reduction is unknown.
    """

    def __init__(
        self,
        members: Sequence[str | RewardModel],
        *,
        reduction: str = "min",
        coef: float = 1.0,
        means: Sequence[float] | None = None,
        deviations: Sequence[float] | None = None,
        init_kwargs: dict | None = None,
    ):
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction={reduction!r} is unknown: use {', '.join(map(repr, REDUCTIONS))}.")
        if len(members) < 2:
            raise ValueError(f"An ensemble of {len(members)} reward models is none: give two or more.")
        self.reduction, self.coef, self.sources = reduction, coef, list(members)
        names = ["default", *(f"member_{i}" for i in range(1, len(members)))]
        self.adapters = names if share_a_base(members) else None
        loaded = members[:1] if self.adapters else members
        models = [load_reward_model(member, init_kwargs=init_kwargs) for member in loaded]
        self.tokenizer: PreTrainedTokenizerBase = models[0].tokenizer
        for member, model in zip(members, models if not self.adapters else members, strict=True):
            own = load_tokenizer(model) if isinstance(model, str) else model.tokenizer
            if own.get_vocab() != self.tokenizer.get_vocab():
                raise ValueError(
                    f"The members {members[0]!r} and {member!r} have different tokenizers, so that they do not read "
                    "the same text alike: use reward models of one tokenizer."
                )
        if self.adapters:
            for name, member in zip(self.adapters[1:], members[1:], strict=True):
                models[0].model.load_adapter(member, adapter_name=name, is_trainable=False)
            models[0] = RewardModel(models[0].model, self.tokenizer)  # whose heads are in fp32 now
        self.members = nn.ModuleList(models).eval().requires_grad_(False)
        scale = torch.tensor([means or [0.0] * len(members), deviations or [1.0] * len(members)])
        self.register_buffer("scale", scale)

    @property
    def config(self):
        return self.members[0].config

    @property
    def device(self) -> torch.device:
        return self.members[0].device

    @contextmanager
    def _member(self, i: int):
        """Yield the reward model `i`, with its adapter in force."""
        member = self.members[0 if self.adapters else i]
        if self.adapters:
            member.model.set_adapter(self.adapters[i], inference_mode=True)
        yield member

    def member_scores(self, score: Callable[[RewardModel], torch.Tensor]) -> torch.Tensor:
        """Return `score` of each member, [K, B]."""
        found = []
        for i in range(len(self.sources)):
            with self._member(i) as member:
                found.append(score(member))
        return torch.stack(found)

    def _reduced(self, raw: torch.Tensor) -> torch.Tensor:
        means, deviations = self.scale.to(raw.device)
        return reduce_scores((raw - means[:, None]) / deviations[:, None], self.reduction, self.coef)

    def forward(self, input_ids: torch.LongTensor, lengths: torch.LongTensor) -> torch.Tensor:
        """Return scores [B] of right-padded rows, as [`RewardModel`] does."""
        return self._reduced(self.member_scores(lambda member: member(input_ids, lengths)))

    def score(self, input_ids: torch.LongTensor, lengths: torch.LongTensor) -> torch.Tensor:
        """Return scores [B], like a call of the model."""
        return self(input_ids, lengths)

    def score_states(self, last_hidden: Callable[[nn.Module], torch.Tensor]) -> torch.Tensor:
        """Return scores [B] from a function of a member's backbone to the hidden states [B, H] of the last tokens."""
        return self._reduced(self.member_scores(lambda member: member.score_states(last_hidden)))

    @torch.no_grad()
    def fit(self, rows: Sequence[list[int]], batch_size: int = 8) -> "RewardEnsemble":
        """Set the scale of each member: mean 0 and variance 1 on held-out answers.

        Args:
            rows: token ids of prompts with their answers, such as [`Samples.encode`] returns.

        Raises:
            ValueError: fewer than two rows, or a member that scores all of them alike.
        """
        if len(rows) < 2:
            raise ValueError(f"fit: {len(rows)} answers have no deviation: give the held-out answers of some hundred.")
        parts = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        batches = [(pad_sequences(part, 0).to(self.device), torch.tensor(list(map(len, part)))) for part in parts]
        raw = self.member_scores(lambda member: torch.cat([member(*batch) for batch in batches])).double()
        means, deviations = raw.mean(1), raw.std(1, correction=0)
        flat = [i for i, deviation in enumerate(deviations.tolist()) if deviation < 1e-8]
        if flat:
            raise ValueError(f"fit: member {flat[0]} gives all {len(rows)} answers the score {means[flat[0]]:.4g}.")
        self.scale.copy_(torch.stack([means, deviations]))
        return self

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the members, one folder each, and their scale to `folder`, which is then the ensemble's name."""
        folder, names = Path(folder), [f"member_{i}" for i in range(len(self.sources))]
        for i, name in enumerate(names):
            source = self.sources[i]
            if isinstance(source, str) and Path(source).is_dir():
                shutil.copytree(
                    source, folder / name, dirs_exist_ok=True, ignore=shutil.ignore_patterns("checkpoint-*")
                )
                continue
            with self._member(i) as member:
                member.model.save_pretrained(folder / name)
                if isinstance(member.model, PeftModel):
                    save_adapter_notes(member.model, folder / name)
            self.tokenizer.save_pretrained(folder / name)
        means, deviations = self.scale.tolist()
        notes = {"members": names, "reduction": self.reduction, "coef": self.coef}
        (folder / ENSEMBLE).write_text(json.dumps(notes | {"means": means, "deviations": deviations}, indent=2))

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, init_kwargs: dict | None = None) -> "RewardEnsemble":
        """Load what [`save_pretrained`] wrote."""
        notes = json.loads((Path(folder) / ENSEMBLE).read_text())
        members = [str(Path(folder) / name) for name in notes.pop("members")]
        return cls(members, **notes, init_kwargs=init_kwargs)


def share_a_base(members: Sequence[str | RewardModel]) -> bool:
    """Return whether all members are names of adapters of one base model."""
    if not all(isinstance(member, str) and is_adapter(member) for member in members):
        return False
    return len({PeftConfig.from_pretrained(member).base_model_name_or_path for member in members}) == 1
