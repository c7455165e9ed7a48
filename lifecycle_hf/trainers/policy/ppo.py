"""PPO with pretraining mix: InstructGPT's objective on transformers' own training loop."""

import copy
import math
import time
from dataclasses import dataclass, fields
from typing import Any

import torch
from accelerate import DistributedType
from datasets import Dataset
from transformers import Trainer, set_seed

from lifecycle_hf.completions.sampling import stop_token_ids
from lifecycle_hf.completions.scoring import Completions
from lifecycle_hf.mitigation.kl_control import AdaptiveKL, ExponentialKL, FixedKL, KLBudget
from lifecycle_hf.mitigation.trade_off import LagrangeMultiplier
from lifecycle_hf.models.loading import is_sharded
from lifecycle_hf.objectives.policy import kl_estimate, ppo_policy_loss, ppo_value_loss
from lifecycle_hf.trainers.base.capability import PretrainingRows, prepare_texts
from lifecycle_hf.trainers.base.mitigations import check_mitigations, protect
from lifecycle_hf.trainers.base.policy import PolicyTrainerMixin
from lifecycle_hf.trainers.policy.buffer import RolloutBuffer, RolloutSampler
from lifecycle_hf.trainers.policy.builder import (
    ActorCriticBuilder,
    check_reward_columns,
    check_room,
    prepare_prompts,
)
from lifecycle_hf.trainers.policy.config import PPOConfig
from lifecycle_hf.trainers.policy.faults import FaultGuard
from lifecycle_hf.trainers.policy.kl_budget import BudgetKeeper
from lifecycle_hf.trainers.policy.rollout import RolloutMaker

ROLLOUT_LAYOUT = (
    "world_size", "per_device_train_batch_size", "gradient_accumulation_steps", "num_mini_batches", "ppo_epochs",
)  # fmt: skip
"""Options that a rollout in hand must keep when its run is resumed."""


@dataclass
class MicroBatch:
    """What a micro-step trains on: some completions of the rollout, and pretraining texts with their loss mask.

    It is a class of its own, so that transformers leaves it as it is: under DeepSpeed it would cast the old log-probs
    to the dtype of the model.
    """

    rollout: dict[str, torch.Tensor]
    texts: Completions | None = None
    text_mask: torch.Tensor | None = None


class PPOTrainer(PolicyTrainerMixin, Trainer):
    """Trains a policy against rewards by PPO, with KL in the reward and pretraining gradients mixed in.

    Maximises E[r(x, y) − β·log(π/π_ref)] + γ_ptx·E_pretrain[log π] (InstructGPT, https://arxiv.org/abs/2203.02155,
    Eq. 2) by the clipped surrogate (https://arxiv.org/abs/1707.06347). γ_ptx here weighs a mean per token, so
    InstructGPT's 27.8, on a sum per sequence, is not comparable.

    Args:
        model: policy; a name or path (of a model or an adapter), a causal LM or a PeftModel.
        reward_funcs: one or a list of: a reward model, its name or path, or a callable
            `f(prompts, completions, **columns) -> list[float]`.
        args: [`PPOConfig`].
        train_dataset, eval_dataset: prompts, chat or plain; other columns go to the reward callables.
        processing_class: tokenizer; the model's by default.
        reward_processing_classes: tokenizers of the reward models; their own by default.
        value_model: value function to start from: without PEFT a sequence classifier with one label or its path (a
            copy of the reward model by default, else of the policy with a zero head); with PEFT the `value` folder of
            a PPO checkpoint.
        ref_model: reference; by default a frozen copy of the policy as it starts, with PEFT the base with adapters
            off, or a frozen copy of the adapter that the policy starts from.
        ptx_dataset: text, chat or prompt-completion data for `ptx_coef` and the other [`MitigationOptions`].
        peft_config, quantization_config: as in TRL. With PEFT policy, value, reference, and a reward adapter of the
            same base, share one base.
        kwargs: callbacks, optimizers and others, as in `transformers.Trainer`.

    Raises:
        ValueError: for whatever would make the run wrong, before it starts, naming the place and the mend.
    """

    loss_is_scaled_for_ga = True
    budget: BudgetKeeper | None = None
    score_floor: LagrangeMultiplier | None = None
    card_objective = (
        "Maximise E[r(x, y) − β·log(π/π_ref)] + γ_ptx·E_pretrain[log π] by PPO's clipped surrogate: GAE, a clipped "
        "value loss, the KL (k1) in the reward of every token, the pretraining loss as a mean per token."
    )
    card_options = tuple(f.name for f in fields(PPOConfig) if f.name in PPOConfig.__annotations__)
    card_paper = ("Training language models to follow instructions with human feedback", "2203.02155")

    def __init__(
        self,
        model,
        reward_funcs,
        args: PPOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class=None,
        reward_processing_classes=None,
        value_model=None,
        ref_model=None,
        ptx_dataset: Dataset | None = None,
        peft_config=None,
        quantization_config=None,
        model_init_kwargs: dict | None = None,
        **kwargs,
    ):
        args = args if args is not None else PPOConfig("output/ppo")
        if train_dataset is None:
            raise ValueError("train_dataset is missing: give a dataset of prompts.")
        set_seed(args.seed)  # fresh adapters and heads are random
        builder = ActorCriticBuilder(
            args,
            model,
            processing_class=processing_class,
            peft_config=peft_config,
            quantization_config=quantization_config,
            init_kwargs=model_init_kwargs,
        )
        actor_critic = builder.build(reward_funcs, reward_processing_classes, value_model, ref_model)
        tokenizer = builder.tokenizer
        check_room(actor_critic, args)
        check_mitigations(args, ptx_dataset)
        if eval_dataset is not None:
            eval_dataset = prepare_prompts(eval_dataset, tokenizer, args, "eval_dataset")
        stop_tokens = stop_token_ids(actor_critic.policy, tokenizer, args.stop_tokens)
        super().__init__(
            model=actor_critic,
            args=args,
            data_collator=list,
            train_dataset=prepare_prompts(train_dataset, tokenizer, args, "train_dataset"),
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            **kwargs,
        )
        self.check_engine()
        self.model.settles_values = self._settles_values()
        check_reward_columns(builder.rewards, self.train_dataset.column_names)
        mixes = args.ptx_coef > 0 and args.ptx_ceiling is None  # a ceiling makes it an auxiliary loss
        self.ptx_rows = self._pretraining_rows(ptx_dataset) if mixes else None
        self.kl_control = self._kl_control()
        self.rollouts = RolloutMaker(self, builder.rewards, stop_tokens)
        self.buffer = RolloutBuffer({name: getattr(args, name) for name in ROLLOUT_LAYOUT})
        self.guard = FaultGuard(self)
        self.add_callback(self.guard)
        moments = self.rollouts.reward_moments
        self.stateful |= {"kl_control": self.kl_control, "reward_moments": moments, "faults": self.guard}
        self.stateful_per_rank["rollout"] = self.buffer
        self.can_return_loss, self.label_names, self._texts, self._step_totals = True, [], [], None
        protect(self, ptx_dataset, mixes=mixes)

    # Setting up

    def _kl_control(self) -> FixedKL:
        args = self.args
        if args.kl_control == "adaptive":
            return AdaptiveKL(args.kl_coef, target=args.kl_target, horizon=args.kl_horizon)
        if args.kl_control == "exponential":
            return ExponentialKL(args.kl_coef, rate=args.kl_rate, maximum=args.kl_coef_max)
        if args.kl_control == "budget":
            self.budget = self.stateful["kl_budget"] = BudgetKeeper(self)
            self.callback_handler.callbacks.insert(0, self.budget)  # what it takes back is measured by nobody
            return KLBudget(args.kl_coef, budget=args.kl_budget, rate=args.kl_rate, maximum=args.kl_coef_max)
        return FixedKL(args.kl_coef)

    def constrain_objective(self, multiplier: LagrangeMultiplier) -> None:
        """Weighs the policy loss by λ: pretraining and auxiliary losses are minimised subject to a floor of the score.

        λ moves with the mean score of every rollout. The value loss keeps its weight.

        Raises:
            ValueError: the limit is no floor, or scores are normalised, so that their mean says nothing.
        """
        if multiplier.sign > 0 or self.args.reward_normalization != "none":
            raise ValueError(
                "PPOTrainer.constrain_objective holds the mean score above a floor: sense='at_least', and "
                f"reward_normalization='none', which is {self.args.reward_normalization!r} here."
            )
        self.score_floor = multiplier
        self.dual_ascent.watch("objective", multiplier)

    def _settles_values(self) -> bool:
        """Sharded parameters come and go with their own backward, reentrant checkpointing knows no other, and fp16's
        loss must be scaled before its gradients are taken: there the value loss waits for the joint backward."""
        args = self.args
        reentrant = args.activation_checkpointing and (args.activation_checkpointing_kwargs or {}).get("use_reentrant")
        return not (is_sharded(self.model) or self.is_fsdp_enabled or reentrant or args.fp16)

    def _pretraining_rows(self, dataset: Dataset) -> PretrainingRows:
        args, tokenizer = self.args, self.processing_class
        return PretrainingRows(
            prepare_texts(
                dataset, tokenizer, max_length=args.ptx_max_length, where="ptx_dataset", strict=args.strict_data
            ),
            batch_size=args.ptx_batch_size or args.per_device_train_batch_size,
            pad_token_id=tokenizer.pad_token_id,
            seed=args.seed,
            rank=args.process_index,
            world_size=args.world_size,
        )

    def get_train_dataloader(self):
        """Every micro-step is handed the prompts of its update; the first of an update makes the rollout of them."""
        args = self.args
        sampler = RolloutSampler(
            len(self.train_dataset),
            rollout_size=args.local_rollout_size * args.world_size,
            repeats=args.steps_per_update * args.gradient_accumulation_steps,
            seed=args.data_seed if args.data_seed is not None else args.seed,
            epoch=lambda: int(self.state.epoch or 0),
        )
        return self._get_dataloader(
            self.train_dataset, "Training", args.local_rollout_size, sampler_fn=lambda _: sampler, is_training=True
        )

    def create_optimizer(self, model=None):
        """As `transformers.Trainer`, with `value_learning_rate` for the value function's parameters."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh and self.args.value_learning_rate is not None:
            names = (self.model if model is None else model).named_parameters()
            value = {id(p) for n, p in names if self.accelerator.unwrap_model(self.model).is_value(n)}
            groups = []
            for group in optimizer.param_groups:
                for is_value, rate in ((False, group["lr"]), (True, self.args.value_learning_rate)):
                    parameters = [p for p in group["params"] if (id(p) in value) == is_value]
                    groups += [{**group, "params": parameters, "lr": rate}] if parameters else []
            optimizer.param_groups[:] = groups
        return optimizer

    # The loop

    def training_step(self, model, inputs, num_items_in_batch=None):
        """As in transformers, on the next micro-batch; the first one of an update samples and scores a rollout."""
        start, tokens = time.perf_counter(), 0
        fresh = self.buffer.exhausted
        if fresh:
            getattr(self.optimizer, "train", lambda: None)()  # schedule-free optimizers sample with other weights
            self._new_rollout(inputs)
            tokens = sum(int(batch["completion_lengths"].sum()) for batch in self.buffer.batches)
        loss = super().training_step(model, {"micro_batch": self._next_micro_batch()}, num_items_in_batch)
        if self.model.shared is not None:  # checkpointing recomputes under the role that came last
            self.model.shared.activate(self.model.policy_role)
        world_size = self.accelerator.num_processes
        self.metrics["train"].add("tokens_per_second", tokens * world_size, time.perf_counter() - start)
        return loss

    def _next_micro_batch(self) -> MicroBatch:
        buffer = self.buffer
        if buffer.in_step == 0 or self._step_totals is None:
            self._start_step()
        batch = {name: x.to(self.args.device) for name, x in buffer.step_batches[buffer.in_step].items()}
        texts = self._texts[buffer.in_step] if self._texts else (None, None)
        buffer.micro_step += 1
        return MicroBatch(batch, *texts)

    def _new_rollout(self, rows: list[dict[str, Any]]) -> None:
        args, metrics = self.args, self.metrics["train"]
        update = self.state.global_step // args.steps_per_update
        schedule = self.buffer.draw_schedule(
            args.gradient_accumulation_steps * args.num_mini_batches,
            epochs=args.ppo_epochs,
            mini_batches=args.num_mini_batches,
            seed=args.seed * 1_000_003 + update,
        )
        first, size = schedule[0][0] if self._keeps_graphs() else None, len(rows) * self.accelerator.num_processes
        logged, scale = copy.deepcopy(metrics.sums), self.rollouts.reward_moments.state_dict()
        batches = self.rollouts.make(rows, metrics, first=first)
        rejected = self.budget is not None and self.budget.takes_back(self.rollouts.means["kl"], size)
        if rejected:
            metrics.sums = logged  # log and scale are of what is trained on
            self.rollouts.reward_moments.load_state_dict(scale)
            batches = self.rollouts.make(rows, metrics, first=first)
        if self.budget is not None:
            metrics.add("kl_budget/rejected", float(rejected))
        self.model_wrapped.train()
        self.buffer.fill(batches, schedule)
        metrics.add("kl_coef", self.kl_control.kl_coef)
        means = self.rollouts.means
        if self.score_floor is not None:
            self.dual_ascent.seen.add("objective", means["score"])
        self.guard.check_rollout(kl=means["kl"], entropy=means["entropy"], length=means["length"])
        if math.isfinite(means["kl"]) and not rejected:
            self.kl_control.update(means["kl"], size)

    def _keeps_graphs(self) -> bool:
        """Whether the micro-batch that is trained on first is scored with its graph kept, and not computed again:
        where no engine must see each forward, train mode computes the same, and no value function needs the memory."""
        engine = self.accelerator.distributed_type is not DistributedType.NO
        return not engine and self.args.disable_dropout and self.model.value in (None, "head")

    def _get_grad_norm(self, model, grad_norm=None):
        """As in transformers; the guard is told the norm, as it is before clipping."""
        self.guard.gradient_norm = super()._get_grad_norm(model, grad_norm)
        return self.guard.gradient_norm

    def _start_step(self) -> None:
        """Draws the pretraining rows of an optimizer step; counts its tokens over all micro-batches and ranks."""
        batches, args = self.buffer.step_batches, self.args
        first = self.state.global_step * len(batches)
        n = len(batches) if self.ptx_rows else 0
        self._texts = [self.ptx_rows.batch(first + i, args.device) for i in range(n)]
        counts = [sum(b["completion_lengths"].sum() for b in batches), sum(m.sum() for _, m in self._texts)]
        totals = torch.tensor([float(c) for c in counts], device=args.device)
        self._step_totals = self.accelerator.reduce(totals, "sum").tolist()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Policy, value, entropy and pretraining losses, each a sum over tokens divided by the tokens of the whole
        mini-batch (all micro-batches and ranks), so that how the mini-batch is cut up plays no part."""
        args, micro_batch = self.args, inputs["micro_batch"]
        batch, texts, text_mask = micro_batch.rollout, micro_batch.texts, micro_batch.text_mask
        completions = Completions(batch["input_ids"], batch["prompt_lengths"], batch["completion_lengths"])
        critic, mask = "values" in batch, completions.mask
        want = ("logprobs", *(("value_loss",) if critic else ()), *(("texts",) if texts is not None else ()))
        want += ("entropy", "entropy_gradient") if args.entropy_coef > 0 else ()
        tokens, text_tokens = self._step_totals

        def value_loss(values):
            values = values[:, :-1]
            losses = ppo_value_loss(values, batch["values"], batch["returns"], clip_range=args.cliprange_value)
            self._log_value(losses, values, batch, mask)
            return args.vf_coef * (losses * mask).sum() / tokens

        extra = {"features": batch.get("features"), "value_loss": value_loss}
        kept, self.rollouts.kept = self.rollouts.kept, {}
        missing = tuple(name for name in want if name not in kept)
        out = kept | model(completions, texts, want=missing, temperature=args.temperature, **extra)
        policy = ppo_policy_loss(out["logprobs"], batch["logprobs"], batch["advantages"], clip_range=args.cliprange)
        if self.score_floor is not None:
            policy = self.score_floor.value * policy
        total = policy - args.entropy_coef * out["entropy"] if args.entropy_coef > 0 else policy
        loss = (total * mask).sum() / tokens
        parts = {"policy": loss.detach(), "value": out.get("value_loss", torch.zeros(())).detach()}
        loss = loss + out.get("value_loss", 0.0)
        if texts is not None:
            nll = -(out["texts"] * text_mask).sum()
            loss = loss + args.ptx_coef * nll / text_tokens
            parts["pretraining"] = nll.detach()
            self.metrics["train"].add("loss/ptx", nll.detach(), text_mask.sum())
        self._log_policy(policy, out["logprobs"], batch, mask)
        # Engines average gradients over processes; the loss is a share of a sum, so the average is undone.
        loss = self.with_auxiliary(loss * self.accelerator.num_processes)
        self.guard.check_loss(loss, parts)
        return (loss, out) if return_outputs else loss

    @torch.no_grad()
    def _log_policy(self, losses, logprobs, batch, mask) -> None:
        metrics = self.metrics["train"]
        ratio = torch.exp(logprobs - batch["logprobs"])
        metrics.add_masked("loss/policy", losses, mask)
        metrics.add_masked("policy/clip_fraction", (ratio - 1).abs() > self.args.cliprange, mask)
        metrics.add_masked("policy/approx_kl", kl_estimate(batch["logprobs"], logprobs, estimator="k3"), mask)
        if self.state.global_step % self.args.steps_per_update == 0:
            metrics.add_masked("policy/ratio_error_at_start", (ratio - 1).abs(), mask)

    @torch.no_grad()
    def _log_value(self, losses, values, batch, mask) -> None:
        metrics = self.metrics["train"]
        metrics.add_masked("loss/value", losses, mask)
        metrics.add_masked("value/clip_fraction", (values - batch["values"]).abs() > self.args.cliprange_value, mask)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Samples and scores a batch of eval prompts; the metrics are those of a rollout, prefixed `eval_`."""
        self.rollouts.make(inputs, self.metrics["eval"], training=False)
        return None, None, None
