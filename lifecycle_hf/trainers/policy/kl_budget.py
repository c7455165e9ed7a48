"""The hard part of a KL budget: an update that spends more than it is taken back."""

import math
import warnings
from typing import Any

import torch
from transformers import TrainerCallback

from lifecycle_hf.trainers.base.metrics import MetricAccumulator


class BudgetKeeper(TrainerCallback):
    """Takes a policy's weights back to where it last was within its [`KLBudget`].

    The KL of an update shows in the next rollout, sampled from the policy that it left (k1, mean over all completions
    of all ranks); that of the last one in a rollout of its own as training ends. Above the budget, the weights of the
    last rollout within it are restored, β rises, and the rollout is sampled again. So `train()` ends with weights
    whose measured KL was at most the budget; the KL itself may lie above by the estimator's noise, the deviation of a
    completion's KL over √completions. Checkpoints of the run hold the update in hand, not measured yet, and the
    weights to go back to. Value function and optimizer moments stay as they are.

    Raises:
        ValueError: under DeepSpeed or FSDP, whose weights are not here to take back, and at the first rollout where
            the policy starts above the budget.
    """

    def __init__(self, trainer):
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            raise ValueError(
                "kl_control='budget' takes weights back, which DeepSpeed and FSDP hold where it can't reach them: use "
                "DDP, or kl_control='adaptive'."
            )
        self.trainer, self.kl = trainer, math.nan
        self.kept: dict[str, torch.Tensor] = {}

    def _parameters(self) -> dict[str, torch.nn.Parameter]:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        return {n: p for n, p in model.named_parameters() if p.requires_grad and not model.is_value(n)}

    @torch.no_grad()
    def takes_back(self, kl: float, completions: int) -> bool:
        """Keeps the weights as they are if `kl`, measured on them, is within the budget; else restores the last kept
        ones, lets β rise and returns True."""
        control = self.trainer.kl_control
        if not control.rejects(kl):
            self.kl, self.kept = kl, {name: p.detach().clone() for name, p in self._parameters().items()}
            return False
        if not self.kept:
            raise ValueError(
                f"The policy starts with a KL of {kl:.4g} nats to the reference, above kl_budget={control.budget:g}: "
                "raise the budget, or start nearer."
            )
        for name, parameter in self._parameters().items():
            parameter.copy_(self.kept[name])
        control.update(kl, completions)
        if self.trainer.is_world_process_zero():
            warnings.warn(
                f"Step {self.trainer.state.global_step}: the last update is taken back, its KL of {kl:.4g} nats lies "
                f"above kl_budget={control.budget:g}; the KL is {self.kl:.4g} again and β {control.kl_coef:.4g}.",
                stacklevel=3,
            )
        return True

    def on_train_end(self, args, state, control, **kwargs):
        trainer, size = self.trainer, args.local_rollout_size
        if not self.kept:
            return
        data, first = trainer.train_dataset, args.process_index * size
        rows = [data[i % len(data)] for i in range(first, first + size)]
        trainer.rollouts.make(rows, MetricAccumulator(), training=False)
        rejected = self.takes_back(trainer.rollouts.means["kl"], size * args.world_size)
        trainer.metrics["train"].add("kl_budget/rejected", float(rejected))
        trainer.log({"kl_budget/kl": self.kl})

    def state_dict(self) -> dict[str, Any]:
        return {"kl": self.kl} | self.kept

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kl = state["kl"]
        self.kept = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
