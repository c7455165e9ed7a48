"""Detect training faults (a value that is not finite, a collapsed policy, a large KL); stop the run or skip steps."""

import math
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


class TrainingFault(RuntimeError):
    """The error that stops a faulty run; the message names the fault, and the checkpoint to continue from."""


class FaultGuard(TrainerCallback):
    """Stop the run or skip optimizer steps at a fault of a policy's training, as `on_fault` says.

    To skip a step, the gradients are removed before the optimizer uses them, so that moments and weight decay do not
    act either. DeepSpeed steps within its backward pass, where no step can be skipped, so there every fault stops.

    Args:
        trainer: its `args` hold `on_fault`, `max_faults`, `kl_limit` and `min_entropy`.

    Attributes:
        gradient_norm: norm of the present step before clipping, set by the trainer. (A gradient whose norm overflows
            is zero after clipping.)
        good_step: number of optimizer steps before the last rollout without a fault; later steps were not checked.
    """

    def __init__(self, trainer):
        self.trainer, self.args = trainer, trainer.args
        self.step_losses: list[dict[str, torch.Tensor]] = []
        self.rollout_fault: str | None = None
        self.in_a_row = {"step": 0, "rollout": 0}
        self.gradient_norm: float | torch.Tensor | None = None
        self.good_step = 0

    def state_dict(self) -> dict[str, Any]:
        return {"rollout_fault": self.rollout_fault, "good_step": self.good_step, **self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rollout_fault, self.good_step = state["rollout_fault"], state["good_step"]
        self.in_a_row = {name: state[name] for name in self.in_a_row}

    def check_loss(self, loss: torch.Tensor, parts: dict[str, torch.Tensor]) -> None:
        """Note the loss of a micro-batch before its backward pass; `parts` are the losses that it is a sum of.

        It is read before the optimizer step, so that no micro-step waits for the device; under DeepSpeed at once.
        """
        self.step_losses.append({name: x.detach() for name, x in ({"": loss} | parts).items()})
        if self.trainer.is_deepspeed_enabled and (fault := self._step_fault()):
            self._stop(fault)

    def _step_fault(self) -> str | None:
        """Return the fault of the step's losses, of the last micro-batch that has one, and forget the losses."""
        losses, self.step_losses = self.step_losses, []
        flat = [x.double() for micro_batch in losses for x in micro_batch.values()]
        values, fault = iter(torch.stack(flat).tolist() if flat else []), None
        for micro_batch in losses:
            loss, *parts = [(name, next(values)) for name in micro_batch]
            if not math.isfinite(loss[1]):
                bad = ", ".join(f"{name}: {x}" for name, x in parts if not math.isfinite(x))
                fault = f"the loss is {loss[1]} ({bad or 'the sum of finite parts'})"
        return fault

    def check_rollout(self, *, kl: float, entropy: float, length: float) -> None:
        """Check the means of a rollout over all processes: KL per completion, entropy per token, tokens."""
        limit, fault = self.args.kl_limit, None
        if not all(map(math.isfinite, (kl, entropy, length))):
            fault = f"the rollout has KL {kl}, entropy {entropy} and length {length}, which must be finite"
        elif limit is not None and kl > limit:
            fault = f"the rollout's KL of {kl:.4g} is above {limit:g} (max_kl): raise kl_coef or lower learning_rate"
        elif entropy < self.args.min_entropy:
            fault = (
                f"the policy has collapsed: its entropy of {entropy:.3g} per token is below min_entropy="
                f"{self.args.min_entropy:g}; raise entropy_coef or kl_coef, or lower learning_rate"
            )
        elif length <= 1 < self.args.max_completion_length and self.args.min_entropy > 0:
            fault = (
                "the policy has collapsed: every completion is a single token; check the rewards of empty "
                "completions, raise kl_coef or lower learning_rate; if such answers are correct, set min_entropy=0"
            )
        self.rollout_fault = fault
        if fault is None:
            self.good_step = self.trainer.state.global_step
        self._count("rollout", fault)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        norm, self.gradient_norm = self.gradient_norm, None
        # The scaler of fp16 skips steps itself, and DeepSpeed has made this step already.
        unseen = norm is None or self.trainer.accelerator.scaler is not None or self.trainer.is_deepspeed_enabled
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        norm = 0.0 if unseen else float(norm)
        fault = self._anywhere(self._step_fault())
        if fault is None and not math.isfinite(norm):
            fault = f"the gradient has norm {norm}"
        if self.rollout_fault is None:  # else the rollout was counted, and its steps are not
            self._count("step", fault)
        skipped = fault is not None or self.rollout_fault is not None
        if skipped:
            model.zero_grad(set_to_none=True)
        self.trainer.metrics["train"].add("faults/skipped_steps", float(skipped))

    def _anywhere(self, fault: str | None) -> str | None:
        """Return `fault`, or that of another process, because all processes must skip together."""
        flag = torch.tensor(float(fault is not None), device=self.args.device)
        if self.trainer.accelerator.reduce(flag, "sum").item() == 0:
            return None
        return fault or "the loss of another process is not finite"

    def _count(self, kind: str, fault: str | None) -> None:
        self.in_a_row[kind] = self.in_a_row[kind] + 1 if fault else 0
        if fault is None:
            return
        if self.args.on_fault == "stop" or self.trainer.is_deepspeed_enabled:
            self._stop(fault)
        if self.in_a_row[kind] >= self.args.max_faults:
            self._stop(f"{fault}; it is fault {self.in_a_row[kind]} in a row (max_faults)")
        if self.trainer.is_world_process_zero():
            warnings.warn(f"Step {self.trainer.state.global_step + 1} is skipped: {fault}.", stacklevel=3)

    def _stop(self, fault: str) -> None:
        step = self.trainer.state.global_step
        raise TrainingFault(
            f"Training stopped at step {step + 1} (update {step // self.args.steps_per_update + 1}): {fault}. "
            f"{self._where_to_go_on()} Or skip such steps with --on_fault skip."
        )

    def _where_to_go_on(self) -> str:
        paths = Path(self.args.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        found = {int(number): path for path in paths if (number := path.name.rpartition("-")[2]).isdigit()}
        good = [step for step in found if step <= self.good_step]
        if good:
            path = found[max(good)]
            return f"The last good checkpoint is {path}: remove the cause, then --resume_from_checkpoint {path}."
        if found:
            return f"The last checkpoint {found[max(found)]} may hold the fault: remove the cause, and start again."
        return "There is no checkpoint yet (see save_steps): remove the cause, and start again."
