"""Make a scored rollout of prompts: completions, rewards, log-probs, values and advantages."""

from pathlib import Path
from typing import Any

import torch

from lifecycle_hf.completions.rewards import KeptScores, RunningMoments
from lifecycle_hf.completions.scorer import RewardScorer, RewardSource
from lifecycle_hf.completions.scoring import Completions
from lifecycle_hf.objectives.policy import (
    discounted_returns,
    generalized_advantage_estimate,
    group_advantages,
    group_deviations,
    kl_estimate,
    token_rewards,
    whiten,
)
from lifecycle_hf.trainers.base.hacking import RolloutLook, look_at_all
from lifecycle_hf.trainers.base.metrics import MetricAccumulator
from lifecycle_hf.trainers.base.sampler import PolicySampler, show_samples
from lifecycle_hf.trainers.policy.config import GROUPED


class RolloutMaker:
    """Make the rollouts of a [`PPOTrainer`], which holds the models, the options and the KL control.

    Attributes:
        means: of the last rollout over all ranks: "kl" (the sum over tokens, mean over completions, nats), "entropy"
            (mean over tokens, nats), "length" (tokens per completion) and "score" (per completion).
        look: what the last rollout of all ranks looks like.
        kept: log-probs and entropies of the first micro-batch to train on, with their graph, until it is trained on.
        reward_moments: running mean and deviation of the scores, used with `reward_normalization="running"`.
    """

    def __init__(self, trainer, reward_sources: list[RewardSource], stop_token_ids: list[int]):
        self.trainer, self.args, self.accelerator = trainer, trainer.args, trainer.accelerator
        self.sampler, self.tokenizer = PolicySampler(trainer, stop_token_ids), trainer.processing_class
        self.weights = self.args.reward_weights or [1.0] * len(reward_sources)
        model = self.accelerator.unwrap_model(trainer.model)
        self.value, self.reward_moments = model.value, RunningMoments()
        self.has_reference = model.reference is not None or model.reference_role is not None
        self.grouped = self.args.advantage_estimator in GROUPED
        self.means: dict[str, float] = {}
        self.look: RolloutLook | None = None
        self.kept: dict[str, torch.Tensor] = {}
        rank = self.accelerator.process_index
        # A push to the Hub leaves out files whose name starts with an underscore.
        kept = KeptScores(Path(self.args.output_dir) / f"_unscored_rollout_rank{rank}.jsonl")
        self.raw_scores = RewardScorer(reward_sources, self._reward, self.args.device, kept)

    @torch.no_grad()
    def make(
        self, rows: list[dict[str, Any]], metrics: MetricAccumulator, training: bool = True, first: int | None = None
    ) -> list[dict[str, torch.Tensor]]:
        """Sample the completions of each row and return micro-batches with the inputs of the losses.

        Each holds "input_ids" [B, L], "prompt_lengths", "completion_lengths", "groups" [B], all four again as
        "completions", and [B, T]: "logprobs", "advantages", with a critic "values" and "returns", with the KL in the
        loss "ref_logprobs"; for a value head "features" [B, T + 1, H]. What [`defers`] leaves to the training step is
        missing.

        Args:
            training: if False, sampling has its own seed, so that an evaluation does not change the run.
            first: index of the micro-batch whose graph is left in `kept`.
        """
        self.trainer.model_wrapped.eval()
        n = self.args.num_generations if training else 1
        samples, completion_ids = self.sampler.sample(rows, n, None if training else self.args.seed)
        size, rows = self.args.per_device_train_batch_size, [row for row in rows for _ in range(n)]
        prompts, groups = [row["prompt_ids"] for row in rows], [i // n for i in range(len(rows))]
        parts = [slice(i, i + size) for i in range(0, len(rows), size)]
        batches = [self._batch(prompts[part], completion_ids[part], groups[part] if n > 1 else None) for part in parts]
        raw, ended = self.raw_scores(samples, size), self.sampler.ended(completion_ids)
        weighted = sum(weight * values for weight, values in zip(self.weights, raw.values(), strict=True))
        scores = self._shape(weighted, ended, training)
        held_out = {name: raw[name].tolist() for name, weight in zip(raw, self.weights, strict=True) if weight == 0}
        self.look = look_at_all(samples, list(map(len, completion_ids)), weighted.tolist(), held_out)
        for name, value in self.look.metrics.items():
            metrics.add(name, value)
        metrics.add("completions/no_eos", (~ended).sum(), len(rows))
        metrics.add("completions/length", sum(map(len, completion_ids)), len(rows))
        for name, values in ({f"reward/{name}": values for name, values in raw.items()} | {"score": scores}).items():
            metrics.add(name, values.sum(), len(rows))
        if training and self.args.log_completions:
            show_samples(self.trainer, samples, raw | {"score": scores}, self.args.steps_per_update)
        scored, self._sums, self.kept, self._score_sum = [{} for _ in batches], [], {}, scores.sum()
        if training and self.defers:
            scored = [as_tensors(batch) for batch in batches]
            metrics.add("reward", scores.sum(), len(rows))
        else:
            for i in sorted(range(len(batches)), key=lambda i: i == first):  # last, so that its graph lives shortly
                of_rows = scores[parts[i]].to(batches[i].input_ids.device), ended[parts[i]]
                scored[i] = self._score(batches[i], *of_rows, metrics, keep=i == first)
        if not self.grouped:
            self._finish_advantages(scored, metrics)
        elif training:
            self._compare_groups(scored, scores, metrics)
        if self._sums:
            self.settle()
        return scored

    @property
    def defers(self) -> bool:
        """Whether the one training step of a rollout computes what would be scored before it.

        It needs no log-probs before: there is no critic, no KL in the rewards, and none that could undo the rollout.
        """
        in_reward = self.has_reference and not self.args.kl_in_loss
        needed = self.value is not None or in_reward or self.args.kl_control == "budget"
        return self.grouped and self.args.steps_per_update == 1 and not needed

    def note(self, out: dict[str, torch.Tensor], batch: dict[str, torch.Tensor], metrics: MetricAccumulator) -> None:
        """Add the KL and the entropy of a micro-batch to the means of the rollout and to the metrics."""
        mask, kl = batch["completions"].mask, out["entropy"].new_zeros(())
        if "ref_logprobs" in out:
            kl = torch.where(mask, kl_estimate(out["logprobs"].detach(), out["ref_logprobs"]), 0.0)
            metrics.add("kl", kl.sum(), len(mask))
        entropy = out["entropy"].detach()
        self._sums.append((kl.sum(), entropy.sum(), mask.sum(), len(mask)))
        metrics.add_masked("entropy", entropy, mask)

    def settle(self) -> None:
        """Set `means`, once every micro-batch of the rollout is scored."""
        sums = (sum(column) for column in zip(*self._sums, strict=True))
        kl, entropy, tokens, count, score = self._reduce(*sums, self._score_sum)
        self.means = {"kl": kl / count, "entropy": entropy / tokens, "length": tokens / count, "score": score / count}

    def _batch(self, prompts, completions, groups=None) -> Completions:
        pad = self.tokenizer.pad_token_id
        return Completions.from_lists(prompts, completions, pad, self.args.device, groups=groups)

    def _run(self, batch: Completions, *want: str) -> dict[str, torch.Tensor]:
        with self.accelerator.autocast():
            return self.trainer.model_wrapped(batch, want=want, temperature=self.args.temperature)

    def _reward(self, name: str, batch: Completions) -> torch.Tensor:
        return self._run(batch, f"reward:{name}")[f"reward:{name}"]

    def _shape(self, score: torch.Tensor, ended: torch.Tensor, training: bool) -> torch.Tensor:
        """Return the scores [N]: `score`, Σ weights × raw scores, minus the penalty for a missing stop token.

        In training `score` is normalised and clipped before. An evaluation leaves it as it is, so that scores before
        and after a run can be compared.
        """
        args = self.args
        if training and args.reward_normalization != "none":
            moments = self.reward_moments if args.reward_normalization == "running" else RunningMoments()
            moments.update(self.accelerator.gather(score.to(args.device)).cpu())
            score = (score - moments.mean) / moments.std
        if training and args.reward_clip is not None:
            score = score.clamp(-args.reward_clip, args.reward_clip)
        return score - (args.missing_eos_penalty or 0.0) * ~ended

    def _forward(self, batch: Completions, keep: bool) -> dict[str, torch.Tensor]:
        """Return the outputs of all models for a micro-batch; `keep` leaves the policy's, with graph, in `kept`."""
        policy, others = ("logprobs", "entropy"), ("ref_logprobs",) * self.has_reference
        others += ("values",) * (self.value is not None) + ("ref_states",) * (self.value == "head")
        if not keep:
            return self._run(batch, *policy, *others)
        out = self._run(batch, *others)
        self.trainer.model_wrapped.train()  # gradient checkpointing works in train mode only
        with torch.enable_grad():
            gradient = ("entropy_gradient",) * (self.args.entropy_coef > 0)
            self.kept = {name: x for name, x in self._run(batch, *policy, *gradient).items() if name in policy}
        return out | {name: x.detach() for name, x in self.kept.items()}

    def _score(
        self, batch: Completions, scores, ended, metrics: MetricAccumulator, keep: bool = False
    ) -> dict[str, torch.Tensor]:
        """Return the inputs of the losses for a micro-batch, with advantages that are not whitened yet."""
        args, mask, result = self.args, batch.mask, as_tensors(batch)
        out = self._forward(batch, keep)
        self.note(out, result, metrics)
        result["logprobs"] = out["logprobs"]
        kl_coef, kl = 0.0, torch.zeros_like(out["logprobs"])
        if args.kl_in_loss and self.has_reference:
            result["ref_logprobs"] = out["ref_logprobs"]
        elif self.has_reference:
            kl_coef, kl = self.trainer.kl_control.kl_coef, kl_estimate(out["logprobs"], out["ref_logprobs"])
        rewards = token_rewards(scores, kl, mask, kl_coef=kl_coef)
        metrics.add("reward", rewards.sum(), len(scores))
        if "ref_states" in out:  # large and seldom needed, so kept in the host's memory
            result["features"] = out["ref_states"].cpu()
        if self.value is None:
            if self.grouped:
                return result | {"total": rewards.sum(1)}
            return result | {"advantages": discounted_returns(rewards, mask, gamma=args.gamma)}
        values = torch.where(mask, out["values"][:, :-1], 0.0)
        bootstrap = None
        if args.bootstrap_truncated:
            after_last = out["values"].gather(1, batch.completion_lengths[:, None])[:, 0]
            bootstrap = torch.where(ended.to(mask.device), 0.0, after_last)
        advantages, returns = generalized_advantage_estimate(
            rewards, values, mask, gamma=args.gamma, lam=args.lam, bootstrap_values=bootstrap
        )
        return result | {"values": values, "advantages": advantages, "returns": returns}

    def _compare_groups(self, scored: list[dict], scores: torch.Tensor, metrics: MetricAccumulator) -> None:
        """Set the advantages of RLOO or GRPO, from the scores [n], minus β·KL of the completion if it is in them."""
        args, n = self.args, self.args.num_generations
        totals = scores if "total" not in scored[0] else torch.cat([batch.pop("total") for batch in scored])
        totals, scale = totals.to(args.device), {"group": None, "none": 0.0}.get(args.scale_rewards)
        deviations = group_deviations(totals, n)
        metrics.add("group_reward_std", deviations.sum(), len(deviations))
        metrics.add("frac_reward_zero_std", (deviations == 0).sum(), len(deviations))
        if args.scale_rewards == "batch":
            _, variance = self._moments([totals], [torch.ones_like(totals, dtype=torch.bool)])
            count = len(totals) * self.accelerator.num_processes
            scale = torch.tensor((variance * count / (count - 1)) ** 0.5)
        advantages = group_advantages(totals, n, estimator=args.advantage_estimator, scale=scale)
        for batch, part in zip(scored, advantages.split(args.per_device_train_batch_size), strict=True):
            batch["advantages"] = batch["completions"].mask * part[:, None]
        if args.whitens:
            self._finish_advantages(scored, metrics)

    def _finish_advantages(self, scored: list[dict[str, torch.Tensor]], metrics: MetricAccumulator) -> None:
        """Whiten advantages over all ranks (REINFORCE may only subtract the mean), and log the explained variance."""
        masks = [batch["completions"].mask for batch in scored]
        mean, variance = self._moments([batch["advantages"] for batch in scored], masks)
        if self.args.whitens or "values" not in scored[0]:
            scale = variance if self.args.whitens else 1.0
            for batch, mask in zip(scored, masks, strict=True):
                batch["advantages"] = whiten(batch["advantages"], mask, mean=mean, variance=scale)
        if "values" in scored[0]:
            _, residual = self._moments([batch["returns"] - batch["values"] for batch in scored], masks)
            _, total = self._moments([batch["returns"] for batch in scored], masks)
            if total > 0:
                metrics.add("value/explained_variance", 1 - residual / total)

    def _moments(self, values: list[torch.Tensor], masks: list[torch.Tensor]) -> tuple[float, float]:
        """Return mean and variance of the masked entries on all ranks, in two passes for precision."""
        x = torch.cat([v[m] for v, m in zip(values, masks, strict=True)]).double()
        total, count = self._reduce(x.sum(), x.numel())
        squares, _ = self._reduce((x - total / count).square().sum(), x.numel())
        return total / count, squares / count

    def _reduce(self, *values) -> list[float]:
        local = torch.tensor([float(v) for v in values], dtype=torch.float64, device=self.args.device)
        return self.accelerator.reduce(local, "sum").tolist()


def as_tensors(batch: Completions) -> dict[str, Any]:
    """Return a micro-batch as its tensors, which a checkpoint holds, and itself as "completions"."""
    return batch.tensors() | {"completions": batch}
