"""PPO with a pretraining mix: InstructGPT's objective in the training loop of transformers."""

import copy
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import DistributedType
from accelerate.utils import send_to_device
from datasets import Dataset
from transformers import Trainer, set_seed

from lifecycle_hf.completions.sampling import stop_token_ids
from lifecycle_hf.completions.scoring import Completions
from lifecycle_hf.mitigation.kl_control import AdaptiveKL, ExponentialKL, FixedKL, KLBudget, ZieglerKL
from lifecycle_hf.mitigation.trade_off import LagrangeMultiplier
from lifecycle_hf.models.loading import is_sharded
from lifecycle_hf.objectives.policy import (
    aggregate_tokens,
    importance_ratio,
    kl_estimate,
    ppo_policy_loss,
    ppo_value_loss,
)
from lifecycle_hf.trainers.base.capability import PretrainingRows
from lifecycle_hf.trainers.base.hacking import HackingAlarm
from lifecycle_hf.trainers.base.mitigations import check_mitigations, protect
from lifecycle_hf.trainers.base.options import SamplingOptions
from lifecycle_hf.trainers.base.policy import PolicyTrainerMixin
from lifecycle_hf.trainers.base.prompts import check_reward_columns, check_room, prepare_prompts
from lifecycle_hf.trainers.policy.buffer import RolloutBuffer, RolloutSampler
from lifecycle_hf.trainers.policy.builder import ActorCriticBuilder
from lifecycle_hf.trainers.policy.config import PPOConfig
from lifecycle_hf.trainers.policy.faults import FaultGuard
from lifecycle_hf.trainers.policy.kl_budget import BudgetKeeper
from lifecycle_hf.trainers.policy.rollout import RolloutMaker


@dataclass
class MicroBatch:
    """The input of a micro-step: some completions of the rollout, and pretraining texts with their loss mask.

    It is a class because transformers does not change objects that it does not know. Of a dict it would cast the old
    log-probs to the dtype of the model under DeepSpeed.
    """

    rollout: dict[str, torch.Tensor]
    texts: Completions | None = None
    text_mask: torch.Tensor | None = None


class PPOTrainer(PolicyTrainerMixin, Trainer):
    """Train a policy with rewards by PPO, with the KL in the reward and with pretraining gradients.

    It maximises E[r(x, y) − β·log(π/π_ref)] + γ_ptx·E_pretrain[log π] (InstructGPT, https://arxiv.org/abs/2203.02155,
    Eq. 2) by the clipped surrogate (https://arxiv.org/abs/1707.06347). γ_ptx weighs a mean per token.

    Args:
        model: policy; a name or path (of a model or an adapter), a causal LM or a PeftModel.
        reward_funcs: one or a list of: a reward model, its name or path, or a callable
            `f(prompts, completions, **columns) -> list[float]`, which may be an `async def`.
        args: [`PPOConfig`].
        train_dataset, eval_dataset: prompts, chat or plain; reward callables receive the other columns.
        processing_class: tokenizer; by default the model's.
        reward_processing_classes: tokenizers of the reward models; by default their own.
        value_model: initial value function. Without PEFT, a sequence classifier with one label or its path (by default
            a copy of the reward model, else of the policy with a zero head). With PEFT, the `value` folder of a PPO
            checkpoint.
        ref_model: reference. By default a frozen copy of the initial policy; with PEFT the base with adapters off, or
            a frozen copy of the adapter that the policy starts from.
        ptx_dataset: text, chat or prompt-completion data for `ptx_coef` and the other [`MitigationOptions`].
        peft_config, quantization_config: as in TRL. With PEFT, the policy, the value function, the reference and a
            reward adapter of the same base share one base.
        kwargs: callbacks, optimizers and others, as in `transformers.Trainer`.

    Raises:
        ValueError: an argument or option would make the run wrong; the message names it and the remedy.
    """

    config_class = PPOConfig
    loss_is_scaled_for_ga = True
    budget: BudgetKeeper | None = None
    score_floor: LagrangeMultiplier | None = None
    card_objective = (
        "Maximise E[r(x, y) − β·log(π/π_ref)] + γ_ptx·E_pretrain[log π] by PPO's clipped surrogate: GAE, a clipped "
        "value loss, the KL (k1) in the reward of every token, the pretraining loss as a mean per token."
    )
    card_options = (*SamplingOptions.__annotations__, *PPOConfig.__annotations__)
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
        args = args if args is not None else self.config_class("output/" + type(self).__name__[:-7].lower())
        if train_dataset is None:
            raise ValueError("train_dataset is missing: give a dataset of prompts.")
        set_seed(args.seed)  # fresh adapters and heads are random
        builder = ActorCriticBuilder(
            args, model, processing_class, peft_config, quantization_config, model_init_kwargs
        )
        roles = builder.build(reward_funcs, reward_processing_classes, value_model, ref_model)
        tokenizer = builder.tokenizer
        check_room(roles, args)
        check_mitigations(args, ptx_dataset)
        if eval_dataset is not None:
            eval_dataset = prepare_prompts(eval_dataset, tokenizer, args, "eval_dataset")
        train_dataset = prepare_prompts(train_dataset, tokenizer, args, "train_dataset")
        stop_tokens = stop_token_ids(roles.policy, tokenizer, args.stop_tokens)
        super().__init__(
            roles, args, list, train_dataset, eval_dataset=eval_dataset, processing_class=tokenizer, **kwargs
        )
        self.check_engine()
        self.model.settles_values = settles_values(self)
        check_reward_columns(builder.rewards, self.train_dataset.column_names)
        mixes = args.ptx_coef > 0 and args.ptx_ceiling is None  # with a ceiling it is an auxiliary loss
        self.ptx_rows = pretraining_rows(ptx_dataset, tokenizer, args) if mixes else None
        self.kl_control = make_kl_control(args)
        if args.kl_control == "budget":
            self.budget = self.stateful["kl_budget"] = BudgetKeeper(self)
            self.callback_handler.callbacks.insert(0, self.budget)  # it restores weights before others measure them
        self.rollouts = RolloutMaker(self, builder.rewards, stop_tokens)
        self.buffer, self.guard, self.alarm = RolloutBuffer(args), FaultGuard(self), HackingAlarm(self)
        self.add_callback(self.guard)
        self.add_callback(self.alarm)
        self.stateful |= {"kl_control": self.kl_control, "reward_moments": self.rollouts.reward_moments}
        self.stateful |= {"faults": self.guard, "hacking": self.alarm.detector}
        self.stateful_per_rank["rollout"] = self.buffer
        self.can_return_loss, self.label_names, self._texts, self._step_totals = True, [], [], None
        protect(self, ptx_dataset, mixes=mixes)

    def constrain_objective(self, multiplier: LagrangeMultiplier) -> None:
        """Weigh the policy loss by λ: pretraining and auxiliary losses are minimised subject to a floor of the score.

        λ changes with the mean score of every rollout. The value loss keeps its weight.

        Raises:
            ValueError: the limit is no floor, or scores are normalised, so that their mean has no meaning.
        """
        if multiplier.sign > 0 or self.args.reward_normalization != "none":
            raise ValueError(
                "PPOTrainer.constrain_objective holds the mean score above a floor: sense='at_least' is needed, and "
                f"reward_normalization='none', which is {self.args.reward_normalization!r} here."
            )
        self.score_floor = multiplier
        self.dual_ascent.watch("objective", multiplier)

    def prepared(self, dataset, where: str):
        given = (dataset, self.processing_class, self.args, where)
        return dataset if "prompt_ids" in dataset.column_names else prepare_prompts(*given)

    def get_train_dataloader(self):
        """Return a loader whose batch is the update's prompts, at every micro-step of the update."""
        args = self.args
        sampler = RolloutSampler(len(self.train_dataset), args, epoch=lambda: int(self.state.epoch or 0))
        return self._get_dataloader(
            self.train_dataset, "Training", args.local_prompts, sampler_fn=lambda _: sampler, is_training=True
        )

    def create_optimizer(self, model=None):
        """Create the optimizer of `transformers.Trainer`, with `value_learning_rate` for the value function."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh and self.args.value_learning_rate is not None:
            whole = self.accelerator.unwrap_model(self.model if model is None else model)
            split_groups(optimizer, whole.value_parameters, self.args.value_learning_rate)
        return optimizer

    # The loop

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Train on the next micro-batch; before the first one of an update, sample and score a rollout."""
        start, tokens = time.perf_counter(), 0
        if self.buffer.exhausted:
            getattr(self.optimizer, "train", lambda: None)()  # schedule-free optimizers sample with other weights
            self._new_rollout(inputs)
            tokens = sum(sum(batch["completions"].sizes.completions) for batch in self.buffer.batches)
        loss = super().training_step(model, {"micro_batch": self._next_micro_batch()}, num_items_in_batch)
        if self.rollouts.defers and self.buffer.exhausted:  # before the optimizer step
            self.rollouts.settle()
            self._check_rollout()
        if self.model.shared is not None:  # after the backward pass the adapter that was recomputed last is active
            self.model.shared.activate(self.model.policy_role)
        world_size = self.accelerator.num_processes
        self.metrics["train"].add("tokens_per_second", tokens * world_size, time.perf_counter() - start)
        return loss

    def _next_micro_batch(self) -> MicroBatch:
        """Return the next micro-batch. The first one of an optimizer step also draws the step's pretraining rows, and
        counts its tokens over all micro-batches and ranks."""
        buffer, device = self.buffer, self.args.device
        batches, i = buffer.step_batches, buffer.in_step
        if i == 0 or self._step_totals is None:
            first, n = self.state.global_step * len(batches), len(batches) if self.ptx_rows else 0
            self._texts = [self.ptx_rows.batch(micro_step, device) for micro_step in range(first, first + n)]
            counts = [sum(b["completion_lengths"].sum() for b in batches), sum(m.sum() for _, m in self._texts)]
            totals = torch.stack([torch.as_tensor(count).to(device, torch.float32) for count in counts])
            self._step_totals = self.accelerator.reduce(totals, "sum")
        buffer.micro_step += 1
        texts = self._texts[i] if self._texts else (None, None)
        return MicroBatch(moved_rollout(batches[i], device), *texts)

    def _new_rollout(self, rows: list[dict[str, Any]]) -> None:
        """Fill the buffer with a new rollout; if the KL budget undoes the last update, sample it again."""
        rollouts, budget, metrics = self.rollouts, self.budget, self.metrics["train"]
        schedule = self.buffer.draw_schedule(self.state.global_step // self.args.steps_per_update)
        first = schedule[0][0] if keeps_graphs(self) else None
        logged, scale = copy.deepcopy(metrics.sums), rollouts.reward_moments.state_dict()
        batches, rejected = rollouts.make(rows, metrics, first=first), False
        if budget is not None:
            rejected = budget.takes_back(rollouts.means["kl"], self.args.rollout_size)
        if rejected:
            metrics.sums = logged  # the rollout that is not trained on must not count
            rollouts.reward_moments.load_state_dict(scale)
            batches = rollouts.make(rows, metrics, first=first)
        if budget is not None:
            metrics.add("kl_budget/rejected", float(rejected))
        self.model_wrapped.train()
        self.buffer.fill(batches, schedule)
        metrics.add("kl_coef", self.kl_control.kl_coef)
        self.alarm.check_rollout(rollouts.look)
        if not rollouts.defers:
            self._check_rollout(rejected)

    def _check_rollout(self, rejected: bool = False) -> None:
        """Show the means of the rollout to the guard, the KL control and the floor of the score."""
        means = self.rollouts.means
        if self.score_floor is not None:
            self.dual_ascent.seen.add("objective", means["score"])
        self.guard.check_rollout(kl=means["kl"], entropy=means["entropy"], length=means["length"])
        if math.isfinite(means["kl"]) and not rejected:
            self.kl_control.update(means["kl"], self.args.rollout_size)

    def _get_grad_norm(self, model, grad_norm=None):
        """Return the norm as transformers does, and give the guard the norm before clipping."""
        self.guard.gradient_norm = super()._get_grad_norm(model, grad_norm)
        return self.guard.gradient_norm

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Compute the policy, value, entropy and pretraining losses of a micro-batch.

        Each is a sum over tokens, divided by the number of tokens of the whole mini-batch (all micro-batches and
        ranks), so that the size of micro-batches has no influence.
        """
        args, metrics, micro_batch = self.args, self.metrics["train"], inputs["micro_batch"]
        batch, texts, text_mask = micro_batch.rollout, micro_batch.texts, micro_batch.text_mask
        completions = batch["completions"]
        mask, entropy, (tokens, text_tokens) = completions.mask, args.entropy_coef > 0, self._step_totals
        deferred, known = "logprobs" not in batch, "ref_logprobs" in batch or not self.rollouts.has_reference
        want = {"logprobs": True, "value_loss": "values" in batch, "texts": texts is not None}
        want |= {"entropy": entropy or deferred, "entropy_gradient": entropy, "ref_logprobs": deferred and not known}

        def value_loss(values):
            losses = value_losses(self, values[:, :-1], batch, mask)
            return args.vf_coef * (losses * mask).sum() / tokens

        kept, self.rollouts.kept = self.rollouts.kept, {}
        missing = tuple(name for name, wanted in want.items() if wanted and name not in kept)
        extra = {"features": batch.get("features"), "value_loss": value_loss}
        out = kept | model(completions, texts, want=missing, temperature=args.temperature, **extra)
        if deferred:
            self.rollouts.note(out, batch, metrics)
            batch |= {"logprobs": out["logprobs"].detach(), "ref_logprobs": out.get("ref_logprobs")}
        size = args.per_device_train_batch_size * len(self.buffer.schedule[0]) * self.accelerator.num_processes
        totals = {"tokens": tokens, "completions": size, "max_length": args.max_completion_length}
        losses = policy_losses(self, out["logprobs"], batch, mask)
        loss = aggregate_tokens(losses, mask, aggregation=args.loss_aggregation, **totals)
        if entropy:
            loss = loss - args.entropy_coef * (out["entropy"] * mask).sum() / tokens
        parts = {"policy": loss}
        if "value_loss" in out:
            parts["value"] = out["value_loss"]
            loss = loss + out["value_loss"]
        if texts is not None:
            parts["pretraining"] = nll = -(out["texts"] * text_mask).sum()
            loss = loss + args.ptx_coef * nll / text_tokens
            metrics.add("loss/ptx", nll.detach(), text_mask.sum())
        # Engines average gradients over processes; the loss is a share of a sum, so the average is undone.
        loss = self.with_auxiliary(loss * self.accelerator.num_processes)
        self.guard.check_loss(loss, parts)
        return (loss, out) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Sample and score a batch of eval prompts; the metrics are those of a rollout, with the prefix `eval_`."""
        self.rollouts.make(inputs, self.metrics["eval"], training=False)
        return None, None, None


def settles_values(trainer: PPOTrainer) -> bool:
    """Return whether the value loss takes its gradients at once, and not in the joint backward pass.

    That is impossible for sharded parameters, which are gathered for the joint backward pass only, in reentrant
    checkpointing, which supports no other, and in fp16, whose loss must be scaled before gradients are taken.
    """
    args = trainer.args
    reentrant = args.activation_checkpointing and (args.activation_checkpointing_kwargs or {}).get("use_reentrant")
    return not (is_sharded(trainer.model) or trainer.is_fsdp_enabled or reentrant or args.fp16)


def keeps_graphs(trainer: PPOTrainer) -> bool:
    """Return whether the scores of the first micro-batch keep their graph, so that they are not computed again.

    It is so if no engine must see each forward pass, train mode gives the same numbers, and no separate value
    function needs the memory.
    """
    engine = trainer.accelerator.distributed_type is not DistributedType.NO
    return not engine and trainer.args.disable_dropout and trainer.model.value in (None, "head")


def moved_rollout(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a micro-batch of the rollout on the device; a checkpoint holds only the tensors of its completions."""
    moved = send_to_device(batch, device)
    if "completions" not in moved:
        names = "input_ids", "prompt_lengths", "completion_lengths", "groups"
        batch["completions"] = moved["completions"] = Completions(*(moved.get(name) for name in names))
    return moved


def make_kl_control(args: PPOConfig) -> FixedKL:
    """Return the object that `kl_control` names, which decides the KL coefficient β."""
    if args.kl_control == "adaptive":
        minimum = args.kl_coef_min
        return AdaptiveKL(args.kl_coef, target=args.kl_target, horizon=args.kl_horizon, minimum=minimum)
    if args.kl_control == "ziegler":
        return ZieglerKL(args.kl_coef, target=args.kl_target, horizon=args.kl_horizon)
    if args.kl_control == "exponential":
        minimum, maximum = args.kl_coef_min, args.kl_coef_max
        return ExponentialKL(args.kl_coef, rate=args.kl_rate, minimum=minimum, maximum=maximum)
    if args.kl_control == "budget":
        return KLBudget(args.kl_coef, budget=args.kl_budget, rate=args.kl_rate, maximum=args.kl_coef_max)
    return FixedKL(args.kl_coef)


def pretraining_rows(dataset: Dataset, tokenizer, args: PPOConfig) -> PretrainingRows:
    """Return the batches of `ptx_dataset` that `ptx_coef` weighs."""
    options = {"batch_size": args.ptx_batch_size or args.per_device_train_batch_size, "seed": args.seed}
    options |= {"max_length": args.ptx_max_length, "where": "ptx_dataset", "strict": args.strict_data}
    return PretrainingRows(dataset, tokenizer, **options)


def split_groups(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], rate: float) -> None:
    """Put `parameters` into parameter groups of their own, with the learning rate `rate`."""
    chosen, groups = {id(p) for p in parameters}, []
    for group in optimizer.param_groups:
        for inside, lr in ((False, group["lr"]), (True, rate)):
            params = [p for p in group["params"] if (id(p) in chosen) == inside]
            groups += [{**group, "params": params, "lr": lr}] if params else []
    optimizer.param_groups[:] = groups


def policy_losses(trainer: PPOTrainer, logprobs, batch, mask) -> torch.Tensor:
    """Return and log the policy loss of each token, [B, T], times the multiplier of a score floor."""
    args, metrics = trainer.args, trainer.metrics["train"]
    old, level = batch["logprobs"], {"mask": mask, "level": args.importance_sampling_level}
    clip, high = args.cliprange, args.cliprange if args.cliprange_high is None else args.cliprange_high
    losses = ppo_policy_loss(logprobs, old, batch["advantages"], clip_range=clip, clip_range_high=high, **level)
    if args.kl_in_loss and trainer.kl_control.kl_coef > 0:
        kl = kl_estimate(logprobs, batch["ref_logprobs"], estimator="k3")
        kl = kl * importance_ratio(logprobs, old, **level) if args.use_bias_correction_kl else kl
        metrics.add_masked("loss/kl", kl, mask)
        losses = losses + trainer.kl_control.kl_coef * kl
    if trainer.score_floor is not None:
        losses = trainer.score_floor.value * losses
    new = logprobs.detach()
    distance = importance_ratio(new, old, **level) - 1
    metrics.add_masked("loss/policy", losses, mask)
    metrics.add_masked("policy/clip_fraction", (distance > high) | (distance < -clip), mask)
    metrics.add_masked("policy/approx_kl", kl_estimate(old, new, estimator="k3"), mask)
    if trainer.state.global_step % args.steps_per_update == 0:
        metrics.add_masked("policy/ratio_error_at_start", distance.abs(), mask)
    return losses


def value_losses(trainer: PPOTrainer, values, batch, mask) -> torch.Tensor:
    """Return and log the value loss of each token, [B, T]."""
    metrics, old, clip = trainer.metrics["train"], batch["values"], trainer.args.cliprange_value
    losses = ppo_value_loss(values, old, batch["returns"], clip_range=clip)
    metrics.add_masked("loss/value", losses, mask)
    metrics.add_masked("value/clip_fraction", (values.detach() - old).abs() > clip, mask)
    return losses
