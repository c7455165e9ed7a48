"""Kahneman-Tversky optimisation (KTO) on unpaired answers, each labelled desirable or not."""

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from lifecycle_hf.data.collators import shuffled
from lifecycle_hf.data.schemas import detect, to_preference, to_unpaired
from lifecycle_hf.data.tokenize import tokenize_pairs, tokenize_unpaired
from lifecycle_hf.objectives.unpaired import class_balance, kto_loss, kto_reference_point
from lifecycle_hf.trainers.preference.base import CompletionTrainer, RowMetrics
from lifecycle_hf.trainers.preference.config import KTOConfig

MOMENTUM = 0.9
KL = "KL_"


class RunningReference:
    """Keep the running mean m of log-ratios: m ← 0.9·m + 0.1·mean of the step, from m = 0 (policy = reference)."""

    def __init__(self):
        self.mean = 0.0

    def update(self, mean: float) -> None:
        """Take in the mean of an optimizer step, in nats."""
        self.mean = MOMENTUM * self.mean + (1 - MOMENTUM) * mean

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean = state["mean"]


class KTOTrainer(CompletionTrainer):
    """Train a policy on answers that are each desirable or not, by the value function of KTO.

    The loss of a desirable answer is λ_D·(1 − σ(β(h − z₀))), that of an undesirable one λ_U·(1 − σ(β(z₀ − h))), with
    h = log π(y|x) − log π_ref(y|x). z₀ is one number for an optimizer step, over all its micro-batches and ranks (or
    for all held-out data). It is max(0, mean of h over *mismatched* answers), each from a row with another prompt,
    whatever the batch size; or it is a running mean of h. Of pairs, each becomes a desirable and an undesirable
    answer.

    Metrics, means over answers (with the prefix `eval_` on held-out ones): `rewards/chosen`, `rewards/rejected` (β·h
    of the desirable and of the undesirable), `rewards/margins` (their difference), `rewards/accuracies` (share with h
    above z₀ if desirable, else below), `logps/chosen`, `logps/rejected`, `logps/chosen_displacement` (h of the
    desirable), `kl` (z₀), `entropy`, `tokens_saved`.

    Args: see [`CompletionTrainer`]. Data: prompt, completion and label, or preference pairs.

    Raises:
        ValueError: all answers have one label, all rows have one prompt and `reference_point="mismatched"`, and as
            [`CompletionTrainer`].
    """

    config_class = KTOConfig
    columns = ("completion_ids",)
    ref_columns = ("ref_logps",)
    extra_columns = ("label",)
    card_objective = (
        "KTO: λ_D·(1 − σ(β(h − z₀))) for desirable answers, λ_U·(1 − σ(β(z₀ − h))) for others, h = log π − log π_ref."
    )
    card_paper = ("KTO: Model Alignment as Prospect Theoretic Optimization", "2402.01306")
    card_options = ("max_length", *KTOConfig.__annotations__)

    def __init__(self, model, ref_model=None, args: KTOConfig | None = None, **kwargs):
        args = KTOConfig("output/kto") if args is None else args
        self._mismatched = args.reference_point == "mismatched"
        if self._mismatched:
            self.ref_columns, self.extra_columns = ("ref_logps", "ref_KL_logps"), ("label", f"{KL}completion_ids")
            self.prefixes = ("", KL)
        super().__init__(model, ref_model, args, **kwargs)
        self._micro_steps, self._logratios = 0, torch.zeros(2, dtype=torch.float64, device=args.device)
        self._running, self._z0 = RunningReference(), 0.0
        if not self._mismatched:
            self.stateful["reference_point"] = self._running

    # Data

    def tokenize(self, dataset: Dataset, where: str) -> Dataset:
        if detect(dataset, where) == "preference":
            rows = tokenize_pairs(to_preference(dataset, where), where=where, **self._tokenizing)
            rows = rows.map(_unpair, batched=True, remove_columns=rows.column_names)
        else:
            rows = tokenize_unpaired(to_unpaired(dataset, where), where=where, **self._tokenizing)
        if self._mismatched:
            rows = with_mismatched(rows, seed=self.args.seed, max_length=self.args.max_length, where=where)
        return rows.remove_columns("prompt_key")

    def prepare_train(self, dataset: Dataset) -> Dataset:
        """Check that there are answers of both labels, and warn if their weights are out of balance."""
        desirable, weights = sum(dataset["label"]), (self.args.desirable_weight, self.args.undesirable_weight)
        undesirable = len(dataset) - desirable
        if not desirable or not undesirable:
            raise ValueError(
                f"train_dataset: all {len(dataset)} answers have the label {bool(desirable)}; KTO needs desirable "
                "and undesirable ones. Check the column 'label'."
            )
        balance = class_balance(desirable, undesirable, desirable_weight=weights[0], undesirable_weight=weights[1])
        if not 1 <= balance <= 4 / 3 and not math.isclose(balance, 1) and not math.isclose(balance, 4 / 3):
            low, high = (bound * undesirable * weights[1] / desirable for bound in (1, 4 / 3))
            warnings.warn(
                f"KTO: {desirable} desirable and {undesirable} undesirable answers weigh λ_D·n_D/(λ_U·n_U) = "
                f"{balance:.2f}, outside [1, 4/3]. With undesirable_weight={weights[1]:g}, a desirable_weight from "
                f"{low:.2f} to {high:.2f} is inside.",
                stacklevel=4,
            )
        return dataset

    def _collate(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        out = super()._collate(rows) | {"label": torch.tensor([row["label"] for row in rows])}
        return out | self._pack(rows, (f"{KL}completion_ids",), KL) if self._mismatched else out

    # The reference point

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As in [`CompletionTrainer`], and compute z₀ for the optimizer step."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._micro_steps = len(batches)
        if self._mismatched and batches:
            self._z0 = self._mismatched_mean(self.model_wrapped, batches, held_out=False)
        elif not self._mismatched:
            self._z0 = max(0.0, self._running.mean)
        return batches, count

    def evaluation_loop(self, dataloader, *args, **kwargs):
        """As in [`CompletionTrainer`], with one z₀ for all held-out data."""
        self._held_out, self._held_out_z0 = dataloader.dataset, None
        return super().evaluation_loop(dataloader, *args, **kwargs)

    @torch.no_grad()
    def _mismatched_mean(self, model, batches: Iterable[dict[str, torch.Tensor]], held_out: bool) -> torch.Tensor:
        """Return max(0, mean of h over the mismatched answers of `batches` on all ranks)."""
        total, training = torch.zeros(2, device=self.args.device), model.training
        model.eval()
        for inputs in batches:
            with self.compute_loss_context_manager():
                out, reference = self.score(model, inputs, "logprobs", prefix=KL)
            logps = out["logprobs"].sum(1)
            logratios = logps - reference[-len(logps) :]
            if held_out:  # without the rows that only fill up the last batch
                logratios = self.accelerator.gather_for_metrics(logratios)
            total += torch.stack([logratios.sum(), torch.ones_like(logratios).sum()])
        model.train(training)
        return kto_reference_point(*(total if held_out else self.accelerator.reduce(total, "sum")))

    def _step_running_mean(self, logratios: torch.Tensor) -> None:
        """Take in the log-ratios of a micro-batch; update the running mean after the last one of a step."""
        self._logratios += torch.stack([logratios.sum(), torch.ones_like(logratios).sum()])
        self._micro_steps -= 1
        if self._micro_steps == 0:
            total, count = self.accelerator.reduce(self._logratios, "sum").tolist()
            self._running.update(total / count)
            self._logratios.zero_()

    # The loop

    def losses(self, model, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, RowMetrics]:
        args, labels = self.args, inputs["label"].bool()
        z0 = self._z0
        if not self.model.training:
            if self._held_out_z0 is None and self._mismatched:
                # A separate loader, because a loader stores its progress, and gather_for_metrics reads that.
                loader = DataLoader(self._held_out, args.per_device_eval_batch_size, collate_fn=self._collate)
                loader = self.accelerator.prepare_data_loader(loader)
                self._held_out_z0 = self._mismatched_mean(model, loader, held_out=True)
            z0 = self._held_out_z0 if self._mismatched else max(0.0, self._running.mean)
        out, reference = self.score(model, inputs, "logprobs", "entropy")
        logps = out["logprobs"].sum(1)
        logratios = logps - reference[: len(labels)]
        weights = {"desirable_weight": args.desirable_weight, "undesirable_weight": args.undesirable_weight}
        losses = kto_loss(logratios, labels, z0, beta=args.beta, **weights)
        if self.model.training and not self._mismatched:
            self._step_running_mean(logratios.detach())
        rewards, one = args.beta * logratios, torch.ones_like(logratios)
        return losses, {
            "rewards/chosen": (rewards * labels, labels),
            "rewards/rejected": (rewards * ~labels, ~labels),
            "rewards/accuracies": ((logratios > z0) == labels, one),
            "logps/chosen": (logps * labels, labels),
            "logps/rejected": (logps * ~labels, ~labels),
            "logps/chosen_displacement": (logratios * labels, labels),
            "kl": (one * z0, one),
            "entropy": (out["entropy"].sum(1), inputs["completion_lengths"]),
        }

    def reduced_metrics(self, kind: str) -> dict[str, float]:
        means = super().reduced_metrics(kind)
        if {"rewards/chosen", "rewards/rejected"} <= means.keys():
            means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
        return means


def _unpair(rows: dict[str, list]) -> dict[str, list]:
    """Return tokenised pairs as answers: the chosen ones, then the rejected ones."""
    n = len(rows["prompt_ids"])
    out = {name: rows[name] * 2 for name in ("prompt_ids", "prompt_key")}
    out |= {"completion_ids": rows["chosen_ids"] + rows["rejected_ids"], "label": [True] * n + [False] * n}
    if "ref_chosen_logps" in rows:
        out["ref_logps"] = rows["ref_chosen_logps"] + rows["ref_rejected_logps"]
    return out


def with_mismatched(dataset: Dataset, *, seed: int, max_length: int | None, where: str) -> Dataset:
    """Return `dataset` with a column "KL_completion_ids" of mismatched answers.

    In a shuffled order of the rows, the mismatched answer is that of the next row with another prompt. It is cut so
    that it has at most `max_length` tokens together with the prompt of its new row. A column "ref_logps" is removed,
    as it has no log-probs of the mismatched answers.

    Raises:
        ValueError: all rows have the same prompt.
    """
    keys, n = dataset["prompt_key"][:], len(dataset)
    if len(set(keys)) < 2:
        raise ValueError(
            f"{where}: all {n} rows have the same prompt, so no answer can be put under another one: set "
            "reference_point='running_mean'."
        )
    order, partner = shuffled(n, seed), [0] * n
    other = order[0]
    for place in reversed(range(2 * n)):  # two rounds, as the next row of the last one is the first one
        row, following = order[place % n], order[(place + 1) % n]
        other = following if keys[following] != keys[row] else other
        partner[row] = other
    completions, prompts = dataset["completion_ids"][:], dataset["prompt_ids"][:]
    room = [None if max_length is None else max_length - len(prompt) for prompt in prompts]
    mismatched = [completions[other][:most] for other, most in zip(partner, room, strict=True)]
    if "ref_logps" in dataset.column_names:
        dataset = dataset.remove_columns("ref_logps")
    return dataset.add_column(f"{KL}completion_ids", mismatched)
