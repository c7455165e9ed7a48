"""Auxiliary losses of any trainer, with fixed weights or with Lagrange multipliers that dual ascent moves."""

from collections.abc import Callable

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import TrainerCallback

from lifecycle_hf.mitigation.ewc import EWC
from lifecycle_hf.mitigation.trade_off import LagrangeMultiplier
from lifecycle_hf.models.adapters.limits import check_virtual_tokens
from lifecycle_hf.models.loading import is_sharded
from lifecycle_hf.trainers.base.checkpoints import Stateful
from lifecycle_hf.trainers.base.metrics import MetricAccumulator


def active_policy(model: nn.Module) -> nn.Module:
    """Return the policy in a trainer's model, without the wrapper of its engine and with its trained adapter on."""
    whole = extract_model_from_parallel(model)
    if hasattr(getattr(whole, "shared", None), "activate"):  # T5 has a layer of that name
        whole.shared.activate(whole.policy_role)
    return getattr(whole, "policy", whole)


class DualAscent(TrainerCallback):
    """Move the multipliers of a trainer after every optimizer step, and log them as `lambda/<name>`.

    Each moves by the mean of what was seen in that step, over all micro-batches and ranks.
    """

    def __init__(self, trainer):
        self.trainer, self.multipliers, self.seen = trainer, {}, MetricAccumulator()

    def watch(self, name: str, multiplier: LagrangeMultiplier) -> None:
        """Move `multiplier` from now on by the means of what is added to `seen` under `name`."""
        if not self.multipliers:
            self.trainer.add_callback(self)
        self.multipliers[name] = self.trainer.stateful[f"multiplier_{name}"] = multiplier

    def on_step_end(self, *args, **kwargs):
        means = self.seen.reduce(self.trainer.accelerator)
        for name, multiplier in self.multipliers.items():
            if name in means:
                multiplier.update(means[name])
            self.trainer.metrics["train"].add(f"lambda/{name}", multiplier.value)


class AuxiliaryLossMixin:
    """Add losses of the model to a trainer's own ([`add_auxiliary_loss`]), or weigh that ([`constrain_objective`]).

    A trainer calls [`with_auxiliary`] on the loss of each micro-batch.
    """

    def __init__(self, *args, **kwargs):
        self._auxiliary: dict[str, tuple[Callable[[nn.Module], torch.Tensor], float | LagrangeMultiplier]] = {}
        self._objective: LagrangeMultiplier | None = None
        self.dual_ascent = DualAscent(self)
        super().__init__(*args, **kwargs)
        packed = any(getattr(self.args, name, False) for name in ("packing", "padding_free"))
        check_virtual_tokens(self.model, checkpointing=self.args.activation_checkpointing, packed=packed)

    def add_auxiliary_loss(
        self, name: str, function: Callable[[nn.Module], torch.Tensor], weight: float | LagrangeMultiplier = 1.0
    ) -> None:
        """Add weight·function(policy) to the loss of every optimizer step, logged as `loss/<name>`.

        A fixed weight makes a weighted sum of two objectives. With a [`LagrangeMultiplier`] the trainer's own loss is
        minimised subject to its limit on the auxiliary one, and λ moves with the mean of every optimizer step.

        Args:
            function: takes the model that trains (without the wrapper of its engine) and returns a scalar. Its mean is
                taken over the step's micro-batches and ranks. If it has a state (see [`Stateful`]), the state is
                saved and restored.

        Raises:
            ValueError: there is a loss of that name already, or the engine has sharded what the function would read.
        """
        self.check_auxiliary(name, isinstance(function, EWC))
        if name in self._auxiliary:
            raise ValueError(f"There is an auxiliary loss named {name!r} already: choose another name.")
        self._auxiliary[name] = (function, weight)
        if isinstance(function, Stateful):
            self.stateful[f"loss_{name}"] = function
        if isinstance(weight, LagrangeMultiplier):
            self.dual_ascent.watch(name, weight)

    def check_auxiliary(self, name: str, reads_weights: bool) -> None:
        """Check that an auxiliary loss runs under the engine in force.

        Raises:
            ValueError: the engine is ZeRO-3; or it is FSDP2, and the loss reads weights or the policy is only a part
                of what is sharded.
        """
        plugin, partial = self.args.deepspeed_plugin, active_policy(self.model) is not self.model
        zero3 = is_sharded(self.model) or (plugin is not None and plugin.zero_stage == 3)
        if zero3 or (self.is_fsdp_enabled and (reads_weights or partial)):
            raise ValueError(
                f"The auxiliary loss {name!r} does not run under {'ZeRO-3' if zero3 else 'FSDP'}, which shards what "
                "it reads: use DDP, ZeRO-1 or ZeRO-2. (PPO's ptx_coef without a ceiling is none, and runs there too.)"
            )

    def constrain_objective(self, multiplier: LagrangeMultiplier) -> None:
        """Weigh the trainer's own loss by λ: the auxiliary losses are minimised subject to a limit of its mean.

        Raises:
            ValueError: the limit is a floor; a loss needs a ceiling.
        """
        if multiplier.sign < 0:
            raise ValueError("constrain_objective: a loss is held under a ceiling, sense='at_most'.")
        self._objective = multiplier
        self.dual_ascent.watch("objective", multiplier)

    def with_auxiliary(self, loss: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
        """Return `loss` of a micro-batch plus its share of the auxiliary losses; in an evaluation `loss` alone."""
        if not (self._auxiliary or self._objective) or not self.model.training:
            return loss
        policy = active_policy(self.model)
        share, scaled, seen = 1.0, self.loss_is_scaled_for_ga, self.dual_ascent.seen
        if scaled or (scaled is None and self.model_accepts_loss_kwargs and num_items_in_batch is not None):
            share = 1 / self.current_gradient_accumulation_steps
        if self._objective is not None:
            seen.add("objective", loss.detach() / share)
            loss = self._objective.value * loss
        for name, (function, weight) in self._auxiliary.items():
            value = function(policy)
            self.metrics["train"].add(f"loss/{name}", value.detach())
            if isinstance(weight, LagrangeMultiplier):
                seen.add(name, value.detach())
                weight = weight.weight
            loss = loss + share * weight * value
        return loss
