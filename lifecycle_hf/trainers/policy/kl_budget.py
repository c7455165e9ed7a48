"""The strict part of a KL budget: undo an update after which the KL is above the budget."""

import math
import warnings
from typing import Any

import torch
from transformers import TrainerCallback

from lifecycle_hf.trainers.base.metrics import MetricAccumulator


class BudgetKeeper(TrainerCallback):
    """Restore the last weights of a policy that were within its [`KLBudget`].

    The KL after an update is measured on the next rollout, which is sampled from the updated policy (k1, mean over all
    completions of all ranks). For the last update an extra rollout is made at the end of training. If the KL is above
    the budget, the weights at the last rollout within it are restored, β rises, and the rollout is sampled again. So
    `train()` ends with weights whose measured KL was at most the budget. The true KL may be larger by the estimator's
    noise, the deviation of a completion's KL over √completions. Checkpoints hold the present update, which is not
    measured yet, and the weights to restore. The value function and the optimizer's moments are not restored.

    Raises:
        ValueError: the engine is DeepSpeed or FSDP, whose weights are not accessible here; or, at the first rollout,
            the initial policy is above the budget.
    """

    def __init__(self, trainer):
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            raise ValueError(
                "kl_control='budget' does not run on DeepSpeed and FSDP: use DDP, or kl_control='adaptive'."
            )
        self.trainer, self.kl = trainer, math.nan
        self.kept: dict[str, torch.Tensor] = {}

    def _parameters(self) -> dict[str, torch.nn.Parameter]:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        return {n: p for n, p in model.named_parameters() if p.requires_grad and not model.is_value(n)}

    @torch.no_grad()
    def takes_back(self, kl: float, completions: int) -> bool:
        """Store the weights if their measured `kl` is within the budget; else restore the last stored ones.

        Args:
            completions: number of completions that `kl` is the mean of.

        Returns:
            Whether weights were restored.
        """
        control = self.trainer.kl_control
        if not control.rejects(kl):
            self.kl, self.kept = kl, {name: p.detach().clone() for name, p in self._parameters().items()}
            return False
        if not self.kept:
            raise ValueError(
                f"The policy starts with a KL of {kl:.4g} nats to the reference, above kl_budget={control.budget:g}: "
                "raise kl_budget, or start from a policy that is nearer to the reference."
            )
        for name, parameter in self._parameters().items():
            parameter.copy_(self.kept[name])
        control.update(kl, completions)
        if self.trainer.is_world_process_zero():
            warnings.warn(
                f"Step {self.trainer.state.global_step}: the last update is taken back, its KL of {kl:.4g} nats is "
                f"above kl_budget={control.budget:g}; the KL is {self.kl:.4g} again, and β is {control.kl_coef:.4g}.",
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
