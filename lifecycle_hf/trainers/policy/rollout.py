"""Make a scored rollout of prompts: completions, rewards, log-probs, values and advantages."""

from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from trl.models.utils import add_hooks, remove_hooks
from trl.trainer.utils import print_prompt_completions_sample

from lifecycle_hf.completions.rewards import KeptScores, RunningMoments, Samples, score_together
from lifecycle_hf.completions.sampling import VLLMSampler, generate
from lifecycle_hf.completions.scoring import Completions
from lifecycle_hf.data.collators import length_mask
from lifecycle_hf.models.loading import is_sharded, unsharded
from lifecycle_hf.models.roles import role_weights
from lifecycle_hf.objectives.policy import (
    discounted_returns,
    generalized_advantage_estimate,
    kl_estimate,
    token_rewards,
    whiten,
)
from lifecycle_hf.trainers.base.metrics import MetricAccumulator
from lifecycle_hf.trainers.policy.actor_critic import ActorCritic
from lifecycle_hf.trainers.policy.hacking import RolloutLook, look_at_all

EXACT = (torch.float32, torch.float64)
RESERVED = ("prompt", "prompt_ids", "prompts", "completions")


class RolloutMaker:
    """Make the rollouts of a [`PPOTrainer`], which holds the models, the options and the KL control.

    Attributes:
        means: of the last rollout over all ranks: "kl" (the sum over tokens, mean over completions, nats), "entropy"
            (mean over tokens, nats), "length" (tokens per completion) and "score" (per completion).
        look: what the last rollout of all ranks looks like.
        kept: log-probs and entropies of the first micro-batch to train on, with their graph, until it is trained on.
        reward_moments: running mean and deviation of the scores, used with `reward_normalization="running"`.
    """

    def __init__(self, trainer, reward_sources, stop_token_ids: list[int]):
        self.trainer, self.args, self.accelerator = trainer, trainer.args, trainer.accelerator
        self.tokenizer, self.sources, self.stop_token_ids = trainer.processing_class, reward_sources, stop_token_ids
        self.weights = self.args.reward_weights or [1.0] * len(reward_sources)
        model = self.accelerator.unwrap_model(trainer.model)
        self.value, self.reward_moments, self.vllm = model.value, RunningMoments(), None
        self.means: dict[str, float] = {}
        self.look: RolloutLook | None = None
        self.kept: dict[str, torch.Tensor] = {}
        if self.args.use_vllm:
            check_vllm(model, trainer.is_fsdp_enabled)
            self.vllm = VLLMSampler(self.accelerator, self.args.vllm_server_base_url, self.args.vllm_server_timeout)
        rank = self.accelerator.process_index
        # A push to the Hub leaves out files whose name starts with an underscore.
        self.kept_scores = KeptScores(Path(self.args.output_dir) / f"_unscored_rollout_rank{rank}.jsonl")

    @torch.no_grad()
    def make(
        self, rows: list[dict[str, Any]], metrics: MetricAccumulator, training: bool = True, first: int | None = None
    ) -> list[dict[str, torch.Tensor]]:
        """Sample a completion for each row and return micro-batches with the inputs of the losses.

        Each holds "input_ids" [B, L], "prompt_lengths", "completion_lengths" [B], all three again as "completions",
        and [B, T]: "logprobs", "advantages", and with a critic "values", "returns"; for a value head "features"
        [B, T + 1, H].

        Args:
            training: if False, sampling has its own seed, so that an evaluation does not change the run.
            first: index of the micro-batch whose graph is left in `kept`.
        """
        self.trainer.model_wrapped.eval()
        samples, completion_ids = self._sample(rows, None if training else self.args.seed)
        size, prompts = self.args.per_device_train_batch_size, [row["prompt_ids"] for row in rows]
        batches = [self._batch(prompts[i : i + size], completion_ids[i : i + size]) for i in range(0, len(rows), size)]
        raw = self._raw_scores(samples, size)
        ended = torch.tensor([ids[-1] in self.stop_token_ids for ids in completion_ids])
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
            self._show(samples, raw, scores)
        scored, self._sums, self.kept = [{} for _ in batches], [], {}
        for i in sorted(range(len(batches)), key=lambda i: i == first):  # last, so that its graph lives shortly
            part, device = slice(i * size, (i + 1) * size), batches[i].input_ids.device
            scored[i] = self._score(batches[i], scores[part].to(device), ended[part], metrics, keep=i == first)
        self._finish_advantages(scored, metrics)
        sums = (sum(column) for column in zip(*self._sums, strict=True))
        kl, entropy, tokens, count, score = self._reduce(*sums, scores.sum())
        self.means = {"kl": kl / count, "entropy": entropy / tokens, "length": tokens / count, "score": score / count}
        return scored

    def _batch(self, prompts, completions) -> Completions:
        return Completions.from_lists(prompts, completions, self.tokenizer.pad_token_id, self.args.device)

    def _run(self, batch: Completions, *want: str) -> dict[str, torch.Tensor]:
        with self.accelerator.autocast():
            return self.trainer.model_wrapped(batch, want=want, temperature=self.args.temperature)

    def _sample(self, rows, seed: int | None) -> tuple[Samples, list[list[int]]]:
        args, prompts = self.args, [row["prompt_ids"] for row in rows]
        options = {"max_new_tokens": args.max_completion_length, "temperature": args.temperature}
        options |= {"stop_token_ids": self.stop_token_ids, "generator_seed": seed}
        with self._whole_policy() as policy, self.accelerator.autocast():
            if self.vllm is not None:
                ids = self.vllm(_untied(role_weights(policy)), prompts, **options)
            else:
                pad, size = self.tokenizer.pad_token_id, args.generation_batch_size
                ids = generate(policy, prompts, **options, pad_token_id=pad, batch_size=size)
        columns = {name: [row[name] for row in rows] for name in rows[0] if name not in RESERVED}
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return Samples([row["prompt"] for row in rows], texts, columns), ids

    @contextmanager
    def _whole_policy(self):
        """Yield the policy. If it is sharded, it is gathered once for the whole decoding, not for every token."""
        engine = self.trainer.model_wrapped
        actor_critic = self.accelerator.unwrap_model(engine)
        policy = actor_critic.policy
        with actor_critic.role(actor_critic.policy_role), unsharded(actor_critic):
            sharded = [p for p in policy.parameters() if hasattr(p, "ds_id")]
            if not sharded:
                with actor_critic.shared.merged() if self._merges(actor_critic) else nullcontext():
                    yield policy
                return
            from deepspeed.runtime.zero import GatheredParameters

            with GatheredParameters(sharded):
                remove_hooks(engine)
                try:
                    yield policy
                finally:
                    add_hooks(engine)

    def _merges(self, actor_critic) -> bool:
        """Return whether decoding runs on merged weights; in low precision merging would round small changes away."""
        if actor_critic.shared is None or self.args.merge_adapter is False or self.trainer.is_fsdp_enabled:
            return False
        exact = next(actor_critic.policy.parameters()).dtype in EXACT
        return bool(self.args.merge_adapter) or self.vllm is not None or exact

    def _raw_scores(self, samples: Samples, size: int) -> dict[str, torch.Tensor]:
        """Return the scores [N] of every reward, async ones first; if one raises, write the others to a file."""
        known, raw = self.kept_scores.read(samples), {}
        waiting = [s for s in self.sources if s.function is not None and s.function.is_async and s.name not in known]
        together = score_together([source.function for source in waiting], samples) if waiting else []
        done = known | dict(zip((source.name for source in waiting), together, strict=True))
        for source in self.sources:
            try:
                raw[source.name] = self._scores_of(source, samples, size, done.get(source.name))
            except ValueError as error:
                finished = {
                    s.name: done[s.name] for s in self.sources if not isinstance(done.get(s.name, error), Exception)
                }
                raw |= {name: torch.as_tensor(scores) for name, scores in finished.items()}
                self.kept_scores.write(samples, raw)
                where = f"The completions and {len(raw)} of {len(self.sources)} columns of scores are in"
                raise ValueError(f"{error} {where} {self.kept_scores.path}; a resumed run reads that file.") from error
        if known:
            self.kept_scores.clear()
        return raw

    def _scores_of(self, source, samples: Samples, size: int, done=None) -> torch.Tensor:
        """Return the scores [N] of a reward function; `done` are its scores, or its error, if it was called before."""
        if isinstance(done, BaseException):
            raise done
        if source.function is not None or done is not None:
            return torch.as_tensor(source.function(samples) if done is None else done, dtype=torch.float32)
        ids, key, scores = samples.encode(source.tokenizer), f"reward:{source.name}", []
        for i in range(0, len(ids), size):
            # A reward model reads the last state of a whole sequence, so it does not matter where the prompt ends, nor
            # which token pads, if it is in the vocabulary.
            heads, tails = [row[:-1] for row in ids[i : i + size]], [row[-1:] for row in ids[i : i + size]]
            batch = Completions.from_lists(heads, tails, 0, self.args.device)
            scores.append(self._run(batch, key)[key].float().cpu())
        scores = torch.cat(scores)
        bad = (~scores.isfinite()).nonzero()
        if len(bad):
            raise ValueError(
                f"The reward model {source.name!r} gave {scores[bad[0]].item()} for the completion "
                f"{samples.texts[int(bad[0])][:200]!r}: check its weights and its dtype."
            )
        return scores

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
        policy, others = ("logprobs", "entropy"), ("ref_logprobs",) + ("values",) * (self.value is not None)
        others += ("ref_states",) * (self.value == "head")
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
        args, kl_coef, mask = self.args, self.trainer.kl_control.kl_coef, batch.mask
        out = self._forward(batch, keep)
        kl = torch.where(mask, kl_estimate(out["logprobs"], out["ref_logprobs"]), 0.0)
        rewards = token_rewards(scores, kl, mask, kl_coef=kl_coef)
        metrics.add("kl", kl.sum(), len(scores))
        self._sums.append((kl.sum(), out["entropy"].sum(), mask.sum(), len(scores)))
        metrics.add("reward", rewards.sum(), len(scores))
        metrics.add_masked("entropy", out["entropy"], mask)
        result = {name: getattr(batch, name) for name in ("input_ids", "prompt_lengths", "completion_lengths")}
        result |= {"completions": batch, "logprobs": out["logprobs"]}
        if "ref_states" in out:  # large and seldom needed, so kept in the host's memory
            result["features"] = out["ref_states"].cpu()
        if self.value is None:
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

    def _finish_advantages(self, scored: list[dict[str, torch.Tensor]], metrics: MetricAccumulator) -> None:
        """Whiten advantages over all ranks (REINFORCE may only subtract the mean), and log the explained variance."""
        masks = [_mask(batch) for batch in scored]
        mean, variance = self._moments([batch["advantages"] for batch in scored], masks)
        if self.args.whiten_advantages or "values" not in scored[0]:
            scale = variance if self.args.whiten_advantages else 1.0
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

    def _show(self, samples: Samples, raw: dict[str, torch.Tensor], scores: torch.Tensor) -> None:
        """Print a table of completions, once in `logging_steps` optimizer steps."""
        state, per_update, n = self.trainer.state, self.args.steps_per_update, self.args.num_completions_to_print
        every = max(1, round(state.logging_steps or 1) // per_update)
        if self.accelerator.is_main_process and (state.global_step // per_update) % every == 0:
            columns = {name: values[:n].tolist() for name, values in (raw | {"score": scores}).items()}
            prompts, completions = samples.prompts[:n], samples.completions[:n]
            print_prompt_completions_sample(prompts, completions, columns, None, state.global_step)


def check_vllm(model: ActorCritic, fsdp: bool) -> None:
    """Check that the vLLM server can get whole weights with the adapter merged in.

    Raises:
        ValueError: the policy is quantised or sharded, or its adapter has weights that merging leaves out.
    """
    config = model.policy.active_peft_config if model.shared is not None else None
    beside = [name for name in ("modules_to_save", "trainable_token_indices") if getattr(config, name, None)]
    sharded = model.shared is not None and is_sharded(model.policy)
    if getattr(model.policy, "is_quantized", False) or sharded or beside or fsdp:
        raise ValueError(
            "use_vllm needs weights that can be sent whole: no quantised policy, no FSDP, no adapters under ZeRO-3, "
            f"none with {' or '.join(beside) or 'modules_to_save'}, which merging leaves out. Use DDP or ZeRO-2 and "
            "plain adapters, or leave use_vllm out."
        )


def _untied(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return every tensor once, under the first of its names."""
    names = {id(tensor): name for name, tensor in reversed(weights.items())}
    return {name: tensor for name, tensor in weights.items() if names[id(tensor)] == name}


def _mask(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return length_mask(batch["completion_lengths"], batch["logprobs"].shape[1])
