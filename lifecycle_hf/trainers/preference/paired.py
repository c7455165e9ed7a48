"""Preference optimisation on pairs by DPO, IPO, ORPO, or an objective that you add to the table."""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from datasets import Dataset

from lifecycle_hf.data.schemas import to_preference
from lifecycle_hf.data.tokenize import tokenize_pairs
from lifecycle_hf.objectives.preference import dpo_loss, ipo_loss, orpo_loss
from lifecycle_hf.trainers.preference.base import CompletionTrainer, RowMetrics
from lifecycle_hf.trainers.preference.config import PreferenceConfig


@dataclass(frozen=True)
class Pairs:
    """Hold the log-probs of a batch of pairs, each [B], nats.

    Attributes:
        chosen_logps, rejected_logps: log π(y|x), summed over the completion.
        chosen_lengths, rejected_lengths: |y|, tokens.
        ref_chosen_logps, ref_rejected_logps: log π_ref(y|x); None without a reference.
        prompt_logps: Σ log π(x_t | x_<t) over the prompt's tokens except the first; None without `nll_on_prompt`.
        prompt_lengths: |x|, tokens.
    """

    chosen_logps: torch.Tensor
    rejected_logps: torch.Tensor
    chosen_lengths: torch.Tensor
    rejected_lengths: torch.Tensor
    prompt_lengths: torch.Tensor
    ref_chosen_logps: torch.Tensor | None = None
    ref_rejected_logps: torch.Tensor | None = None
    prompt_logps: torch.Tensor | None = None

    @property
    def chosen_logratios(self) -> torch.Tensor:
        """h_w = log π(y_w|x) − log π_ref(y_w|x)."""
        return self.chosen_logps - self.ref_chosen_logps

    @property
    def rejected_logratios(self) -> torch.Tensor:
        """h_l = log π(y_l|x) − log π_ref(y_l|x)."""
        return self.rejected_logps - self.ref_rejected_logps

    @property
    def chosen_mean_logps(self) -> torch.Tensor:
        """p̄_w, the mean log-prob per token of the chosen answer."""
        return self.chosen_logps / self.chosen_lengths

    @property
    def rejected_mean_logps(self) -> torch.Tensor:
        """p̄_l, the mean log-prob per token of the rejected answer."""
        return self.rejected_logps / self.rejected_lengths


@dataclass(frozen=True)
class PairedObjective:
    """Hold an objective: a row of [`OBJECTIVES`].

    Attributes:
        loss: function (pairs, options) -> loss of each pair, [B].
        formula, paper: text for the model card; paper is (title, arXiv id).
        reference: whether the loss reads the reference's log-probs.
        options: options of [`PreferenceConfig`] besides `beta` that the loss reads.
    """

    loss: Callable[[Pairs, PreferenceConfig], torch.Tensor]
    formula: str
    paper: tuple[str, str]
    reference: bool = True
    options: tuple[str, ...] = ()


def _dpo(pairs: Pairs, args: PreferenceConfig) -> torch.Tensor:
    options = {"beta": args.beta, "label_smoothing": args.label_smoothing}
    return dpo_loss(pairs.chosen_logratios, pairs.rejected_logratios, **options)


def _ipo(pairs: Pairs, args: PreferenceConfig) -> torch.Tensor:
    chosen, rejected = pairs.chosen_logratios, pairs.rejected_logratios
    if args.length_normalize:
        chosen, rejected = chosen / pairs.chosen_lengths, rejected / pairs.rejected_lengths
    return ipo_loss(chosen, rejected, tau=args.beta)


def _orpo(pairs: Pairs, args: PreferenceConfig) -> torch.Tensor:
    nll = -pairs.chosen_mean_logps
    if args.nll_on_prompt:
        tokens = pairs.chosen_lengths + pairs.prompt_lengths - 1
        nll = -(pairs.chosen_logps + pairs.prompt_logps) / tokens
    return orpo_loss(nll, pairs.chosen_mean_logps, pairs.rejected_mean_logps, lambda_or=args.beta)


OBJECTIVES: dict[str, PairedObjective] = {
    "dpo": PairedObjective(
        _dpo,
        "DPO: −log σ(β(h_w − h_l)), h = log π(y|x) − log π_ref(y|x) summed over the completion.",
        ("Direct Preference Optimization: Your Language Model is Secretly a Reward Model", "2305.18290"),
        options=("label_smoothing",),
    ),
    "ipo": PairedObjective(
        _ipo,
        "IPO: (h_w − h_l − 1/(2τ))², τ = beta, h = log π(y|x) − log π_ref(y|x), per token with `length_normalize`.",
        ("A General Theoretical Paradigm to Understand Learning from Human Preferences", "2310.12036"),
        options=("length_normalize",),
    ),
    "orpo": PairedObjective(
        _orpo,
        "ORPO: NLL(y_w) − λ·log σ(log odds(y_w) − log odds(y_l)), λ = beta, odds of the mean log-prob per token.",
        ("ORPO: Monolithic Preference Optimization without Reference Model", "2403.07691"),
        reference=False,
        options=("nll_on_prompt",),
    ),
}
"""The objectives by name. [`PreferenceTrainer`] and `recipes/dpo.py` also know what you add here."""


class PreferenceTrainer(CompletionTrainer):
    """Train a policy on preference pairs by one of [`OBJECTIVES`].

    Metrics, means over pairs (with the prefix `eval_` on held-out ones): `rewards/chosen`, `rewards/rejected` (β·h;
    β·p̄ without a reference), `rewards/margins`, `rewards/accuracies`, `logps/chosen`, `logps/rejected` (sums),
    `logps/chosen_displacement` (h_w; without a reference, in training only, p̄_w minus its first logged value),
    `entropy` (per token of the completions), `tokens_saved` (share of the tokens of the padded batch that the model
    need not process because of packing).

    Args:
        objective: a name in [`OBJECTIVES`], or a [`PairedObjective`].
        Others: see [`CompletionTrainer`].

    Raises:
        ValueError: the objective is unknown, or it does not read an option that is set; and as [`CompletionTrainer`].
    """

    config_class = PreferenceConfig
    columns = ("chosen_ids", "rejected_ids")
    ref_columns = ("ref_chosen_logps", "ref_rejected_logps")
    objective: str | PairedObjective = "dpo"
    card_options = ("max_length", *PreferenceConfig.__annotations__)

    def __init__(self, model, ref_model=None, args: PreferenceConfig | None = None, *, objective=None, **kwargs):
        objective = self.objective if objective is None else objective
        if isinstance(objective, str):
            if objective not in OBJECTIVES:
                raise ValueError(f"objective={objective!r} is unknown: choose one of {', '.join(OBJECTIVES)}.")
            objective = OBJECTIVES[objective]
        self.objective, self.needs_reference = objective, objective.reference
        self.card_objective, self.card_paper = objective.formula, objective.paper
        if args is not None:
            self._check_options(args)
        super().__init__(model, ref_model, args, **kwargs)

    def _check_options(self, args: PreferenceConfig) -> None:
        known = {name for row in OBJECTIVES.values() for name in row.options}
        for option in fields(PreferenceConfig):
            value = getattr(args, option.name)
            if option.name in known - set(self.objective.options) and value != option.default:
                raise ValueError(f"{option.name}={value} is set, but this objective does not read it: leave it out.")
        if args.precompute_ref_log_probs and not self.needs_reference:
            raise ValueError("precompute_ref_log_probs is on, but this objective has no reference: turn it off.")

    def tokenize(self, dataset: Dataset, where: str) -> Dataset:
        return tokenize_pairs(to_preference(dataset, where), where=where, **self._tokenizing)

    def losses(self, model, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, RowMetrics]:
        prompts = ("prompt_logprobs",) if self.args.nll_on_prompt else ()
        out, reference = self.score(model, inputs, "logprobs", "entropy", *prompts)
        reference = reference.chunk(2) if self.needs_reference else (None, None)
        prompt = out["prompt_logprobs"].chunk(2)[0] if prompts else None
        lengths, (prompt_lengths, _) = inputs["completion_lengths"].chunk(2), inputs["prompt_lengths"].chunk(2)
        pairs = Pairs(*out["logprobs"].sum(1).chunk(2), *lengths, prompt_lengths, *reference, prompt)
        return self.objective.loss(pairs, self.args), self._rows(pairs, out["entropy"].sum(1).chunk(2))

    @torch.no_grad()
    def _rows(self, pairs: Pairs, entropies: tuple[torch.Tensor, torch.Tensor]) -> RowMetrics:
        beta, one = self.args.beta, torch.ones_like(pairs.chosen_logps)
        if self.needs_reference:
            chosen, rejected = beta * pairs.chosen_logratios, beta * pairs.rejected_logratios
            displacement = {"logps/chosen_displacement": (pairs.chosen_logratios, one)}
        else:
            chosen, rejected, displacement = beta * pairs.chosen_mean_logps, beta * pairs.rejected_mean_logps, {}
        return displacement | {
            "rewards/chosen": (chosen, one),
            "rewards/rejected": (rejected, one),
            "rewards/margins": (chosen - rejected, one),
            "rewards/accuracies": (chosen > rejected, one),
            "logps/chosen": (pairs.chosen_logps, one),
            "logps/rejected": (pairs.rejected_logps, one),
            "entropy": (sum(entropies), pairs.chosen_lengths + pairs.rejected_lengths),
        }

    def reduced_metrics(self, kind: str) -> dict[str, float]:
        means = super().reduced_metrics(kind)
        if kind == "train" and not self.needs_reference and "rewards/chosen" in means:
            mean_logp = means["rewards/chosen"] / self.args.beta
            if self.displacement.baseline is None:
                self.displacement.baseline = mean_logp
            means["logps/chosen_displacement"] = mean_logp - self.displacement.baseline
        return means


class DPOTrainer(PreferenceTrainer):
    """Train by direct preference optimisation: [`PreferenceTrainer`] with the objective "dpo"."""

    objective = "dpo"


class IPOTrainer(PreferenceTrainer):
    """Train by identity preference optimisation: [`PreferenceTrainer`] with the objective "ipo"; τ is `beta`."""

    objective = "ipo"


class ORPOTrainer(PreferenceTrainer):
    """Train by odds-ratio preference optimisation, which needs no reference: the objective "orpo"; λ is `beta`."""

    objective = "orpo"


DPOConfig = IPOConfig = ORPOConfig = PreferenceConfig
