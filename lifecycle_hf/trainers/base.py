"""What every trainer of the library shares: exact metrics, extra state in checkpoints, the model card."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from lifecycle_hf.alignment_tax.ewc import EWC
from lifecycle_hf.alignment_tax.report import TaxReport
from lifecycle_hf.alignment_tax.trade_off import LagrangeMultiplier
from lifecycle_hf.models.loading import is_sharded
from lifecycle_hf.trainers.callbacks import PREFIX, TaxMonitor
from lifecycle_hf.trainers.mitigations import active_policy, mitigations_in_force, protect
from lifecycle_hf.trainers.model_card import write_model_card

STAGING = "_tmp-"
"""Before the name of a checkpoint that is being written or deleted; a push to the Hub leaves `_*` out."""
CARD_OPTIONS = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim", "max_steps",
    "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "world_size", "bf16", "seed",
)  # fmt: skip


@runtime_checkable
class Stateful(Protocol):
    """Anything whose state must survive a checkpoint."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def _clear(folder: Path) -> None:
    """Deletes what a killed run left half written, and what was put aside."""
    for path in folder.glob(f"{STAGING}{PREFIX_CHECKPOINT_DIR}-*"):
        shutil.rmtree(path, ignore_errors=True)


class MetricAccumulator:
    """Means over everything that was added on every rank: Σ totals / Σ counts, divided once."""

    def __init__(self):
        self.sums: dict[str, list[float]] = {}

    def add(self, name: str, total: float | torch.Tensor, count: float | torch.Tensor = 1.0) -> None:
        """Adds `total`, the sum of `count` values of the metric `name`."""
        sums = self.sums.setdefault(name, [0.0, 0.0])
        sums[0] += float(total)
        sums[1] += float(count)

    def add_masked(self, name: str, values: torch.Tensor, mask: torch.Tensor) -> None:
        """Adds the entries of `values` where `mask` (same shape) is true."""
        self.add(name, (values.detach().double() * mask).sum(), mask.sum())

    def reduce(self, accelerator=None) -> dict[str, float]:
        """Returns name -> mean over all ranks and forgets what was added; every rank must call it."""
        sums, self.sums = self.sums, {}
        gathered = gather_object([sums]) if accelerator is not None and accelerator.num_processes > 1 else [sums]
        means = {}
        for name in sorted({name for rank in gathered for name in rank}):
            total, count = (sum(rank.get(name, (0.0, 0.0))[i] for rank in gathered) for i in (0, 1))
            if count > 0:
                means[name] = total / count
        return means


def save_state(state: dict[str, Any], path: Path) -> None:
    """Writes a flat state dict: tensors to `path`.safetensors, everything else to `path`.json."""
    tensors = {key: value.contiguous() for key, value in state.items() if isinstance(value, torch.Tensor)}
    if tensors:
        save_file(tensors, path.with_suffix(".safetensors"))
    rest = {key: value for key, value in state.items() if key not in tensors}
    path.with_suffix(".json").write_text(json.dumps(rest))


def load_state(path: Path) -> dict[str, Any]:
    """Reads what [`save_state`] wrote."""
    state = json.loads(path.with_suffix(".json").read_text())
    tensors = path.with_suffix(".safetensors")
    return state | (load_file(tensors) if tensors.exists() else {})


class LogState(TrainerCallback):
    """What the next log line is made of, so that a stop within it leaves no trace."""

    def __init__(self, trainer):
        self.trainer, self._restored = trainer, None

    def state_dict(self) -> dict[str, Any]:
        trainer = self.trainer
        line = {"loss": trainer._tr_loss.item(), "since": trainer._globalstep_last_logged}
        return line | {"sums": trainer.metrics["train"].sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._restored = state

    def on_train_begin(self, *args, **kwargs):
        """Transformers' loop sets its counters to zero after it has read a checkpoint, and before this."""
        self.trainer.remove_callback(self)
        trainer, state, self._restored = self.trainer, self._restored, None
        trainer._tr_loss += state["loss"]
        trainer._total_loss_scalar -= state["loss"]  # the mean of a call of `train` is over its own steps
        trainer._globalstep_last_logged = state["since"]
        trainer.metrics["train"].sums = state["sums"]


class DualAscent(TrainerCallback):
    """After every optimizer step, moves the multipliers of a trainer by the means of what it saw in that step, over
    all micro-batches and ranks; logs them as `lambda/<name>`."""

    def __init__(self, trainer):
        self.trainer, self.multipliers, self.seen = trainer, {}, MetricAccumulator()

    def watch(self, name: str, multiplier: LagrangeMultiplier) -> None:
        if not self.multipliers:
            self.trainer.add_callback(self)
        self.multipliers[name] = self.trainer.stateful[f"multiplier_{name}"] = multiplier

    def on_step_end(self, *args, **kwargs):
        means = self.seen.reduce(self.trainer.accelerator)
        for name, multiplier in self.multipliers.items():
            if name in means:
                multiplier.update(means[name])
            self.trainer.metrics["train"].add(f"lambda/{name}", multiplier.value)


class LifecycleTrainerMixin:
    """Put before `transformers.Trainer` (or a subclass) in the bases of a trainer.

    - `self.metrics["train" | "eval"]` are [`MetricAccumulator`]s that `log` and evaluations reduce and merge in.
    - `self.stateful` names [`Stateful`] objects, saved in every checkpoint as `lifecycle_<name>` and restored on
      resume; those in `self.stateful_per_rank` hold state that differs between ranks.
    - [`add_auxiliary_loss`] adds a loss of the model to that of the trainer, [`constrain_objective`] weighs that;
      [`protect`] does what the [`MitigationOptions`] say.
    - `create_model_card` tells what the attributes say: `card_objective`, `card_paper` (title, arXiv id), the values
      of the common options and of those in `card_options`, `dataset_name` and the table in `tax_report`.
    """

    card_objective: str
    card_paper: tuple[str, str]
    card_options: tuple[str, ...] = ()
    dataset_name: str | None = None

    @property
    def tax_report(self) -> TaxReport | None:
        """The before/after table that a [`TaxMonitor`] among the callbacks measured, or None."""
        monitors = [c for c in self.callback_handler.callbacks if isinstance(c, TaxMonitor) and c.history]
        return monitors[0].report() if monitors else None

    def _init_lifecycle(self) -> None:
        self.metrics = {"train": MetricAccumulator(), "eval": MetricAccumulator()}
        self.stateful: dict[str, Stateful] = {}
        self.stateful_per_rank: dict[str, Stateful] = {}
        self.log_state = LogState(self)
        self._staging: Path | None = None
        self._auxiliary: dict[str, tuple[Callable[[nn.Module], torch.Tensor], float | LagrangeMultiplier]] = {}
        self._objective: LagrangeMultiplier | None = None
        self.dual_ascent = DualAscent(self)

    protect = protect

    def add_auxiliary_loss(
        self, name: str, function: Callable[[nn.Module], torch.Tensor], weight: float | LagrangeMultiplier = 1.0
    ) -> None:
        """Adds weight·function(policy) to the loss of every optimizer step, logged as `loss/<name>`.

        A fixed weight makes a weighted sum of two objectives; with a [`LagrangeMultiplier`] the trainer's own loss is
        minimised subject to its limit on the auxiliary one, and λ moves with the mean of every optimizer step.

        Args:
            function: from the model that trains (without its engine's wrapper) to a scalar. Its mean is taken over the
                step's micro-batches and ranks. One with a state (see [`Stateful`]) has it saved and restored.

        Raises:
            ValueError: there is one of that name already, or the engine has sharded what the function would read.
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
        """Raises a ValueError under an engine on which an auxiliary loss does not run: ZeRO-3; FSDP2, where the loss
        reads weights or the policy is but a part of what is sharded."""
        plugin, partial = self.args.deepspeed_plugin, active_policy(self.model) is not self.model
        zero3 = is_sharded(self.model) or (plugin is not None and plugin.zero_stage == 3)
        if zero3 or (self.is_fsdp_enabled and (reads_weights or partial)):
            raise ValueError(
                f"The auxiliary loss {name!r} does not run under {'ZeRO-3' if zero3 else 'FSDP'}, which shards what "
                "it reads: use DDP, ZeRO-1 or ZeRO-2. (PPO's ptx_coef without a ceiling is none, and runs there too.)"
            )

    def constrain_objective(self, multiplier: LagrangeMultiplier) -> None:
        """Weighs the trainer's own loss by λ: the auxiliary losses are minimised subject to its mean's limit.

        Raises:
            ValueError: the limit is a floor; a loss needs a ceiling.
        """
        if multiplier.sign < 0:
            raise ValueError("constrain_objective: a loss is held under a ceiling, sense='at_most'.")
        self._objective = multiplier
        self.dual_ascent.watch("objective", multiplier)

    def with_auxiliary(self, loss: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
        """`loss` of a micro-batch plus its share of the auxiliary losses; an evaluation has none."""
        if not (self._auxiliary or self._objective) or not self.model.training:
            return loss
        whole = self.accelerator.unwrap_model(self.model)
        share, scaled, seen = 1.0, self.loss_is_scaled_for_ga, self.dual_ascent.seen
        if scaled or (scaled is None and self.model_accepts_loss_kwargs and num_items_in_batch is not None):
            share = 1 / self.current_gradient_accumulation_steps
        if self._objective is not None:
            seen.add("objective", loss.detach() / share)
            loss = self._objective.value * loss
        for name, (function, weight) in self._auxiliary.items():
            value = function(getattr(whole, "policy", whole))
            self.metrics["train"].add(f"loss/{name}", value.detach())
            if isinstance(weight, LagrangeMultiplier):
                seen.add(name, value.detach())
                weight = weight.weight
            loss = loss + share * weight * value
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if all(key.startswith(PREFIX) for key in logs):  # a TaxMonitor's line, in between the others
            return super().log(logs, start_time)
        if not any(key.startswith("eval_") for key in logs):
            logs.update(self.reduced_metrics("train"))
        super().log(logs, start_time)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self.reduced_metrics("eval")
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def reduced_metrics(self, kind: str) -> dict[str, float]:
        """The metrics gathered in "train" or "eval", over all ranks; they start anew."""
        return self.metrics[kind].reduce(self.accelerator)

    def _state_files(self, folder: str | Path) -> list[tuple[Stateful, Path, bool]]:
        rank = self.accelerator.process_index
        shared = [(item, Path(folder) / f"lifecycle_{name}", True) for name, item in self.stateful.items()]
        per_rank = {"log": self.log_state} | self.stateful_per_rank
        own = [(item, Path(folder) / f"lifecycle_{name}_rank{rank}", False) for name, item in per_rank.items()]
        return shared + own

    def _get_output_dir(self, trial) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:  # what is still being written is pushed once it stands
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model, trial) -> None:
        """As in transformers, but written elsewhere and moved in one step: a checkpoint is complete or absent."""
        run_dir, name = Path(self._get_output_dir(trial)), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        wait, writes = self.accelerator.wait_for_everyone, self.args.local_process_index == 0
        if writes:
            _clear(run_dir)
        wait()
        self._staging = run_dir / f"{STAGING}{name}"
        try:
            super()._save_checkpoint(model, trial)
        finally:
            written, self._staging = self._staging, None
        best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if self.state.best_global_step and (best.is_dir() or best.name == name):
            self.state.best_model_checkpoint = str(best)
            if self.args.should_save:
                self.state.save_to_json(str(written / name / TRAINER_STATE_NAME))
        wait()
        for moves in (self.args.process_index == 0, writes):  # other nodes may have disks of their own
            if moves and (written / name).is_dir():
                if (run_dir / name).exists():
                    (run_dir / name).rename(written / "replaced")
                (written / name).rename(run_dir / name)
            wait()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run_dir / name))
        if self.args.should_save:
            self._rotate(run_dir)

    def _run_epoch(self, *args, **kwargs) -> None:
        """As in transformers, whose loop makes a step before it asks whether a resumed run has made all of them."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _rotate(self, run_dir: Path) -> None:
        """Deletes the oldest checkpoints beyond `save_total_limit`, never the last nor the best."""
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
        if limit is not None and limit > 0:
            checkpoints = sort_checkpoints(str(run_dir), use_mtime=True)
            kept = {checkpoints[-1], *([str(Path(best))] if best else [])}
            surplus = max(len(checkpoints) - max(limit, len(kept)), 0)
            for path in [path for path in checkpoints if path not in kept][:surplus]:
                Path(path).rename(run_dir / f"{STAGING}{Path(path).name}")
        _clear(run_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        for item, path, shared in self._state_files(output_dir):
            if not shared or self.args.should_save:
                save_state(item.state_dict(), path)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.load_extra_state(checkpoint)

    def load_extra_state(self, checkpoint: str | Path) -> None:
        """Restores every [`Stateful`] from `checkpoint`.

        Raises:
            ValueError: if the checkpoint lacks one, as one of another trainer or another number of processes does.
        """
        for item, path, _ in self._state_files(checkpoint):
            if not path.with_suffix(".json").exists():
                raise ValueError(
                    f"The checkpoint {checkpoint} has no {path.name}.json: it was written by another trainer, with "
                    "another number of processes, or by save_only_model. Resume with the setup that wrote it."
                )
            item.load_state_dict(load_state(path))
        self.add_callback(self.log_state)
        if self.args.should_save:
            _clear(Path(self.args.output_dir))

    @property
    def base_model(self) -> str:
        """Name or path of what was trained; of an adapter, its base."""
        model = getattr(self.model, "policy", self.model)
        if isinstance(model, PeftModel):
            return model.active_peft_config.base_model_name_or_path
        return model.config._name_or_path

    def create_model_card(self, model_name: str | None = None, dataset_name: str | None = None, tags=None, **_):
        """Writes the README.md of the model in `output_dir`; the arguments are those of TRL's trainers."""
        if not self.is_world_process_zero():
            return
        options = {name: getattr(self.args, name) for name in (*CARD_OPTIONS, *self.card_options)}
        options |= mitigations_in_force(self.args)
        model = getattr(self.model, "policy", self.model)
        if isinstance(model, PeftModel):
            config = model.active_peft_config
            options |= {f"lora_{name}": getattr(config, name, None) for name in ("r", "lora_alpha")}
        write_model_card(
            self.args.output_dir,
            trainer_name=type(self).__name__,
            objective=self.card_objective,
            paper=self.card_paper,
            base_model=self.base_model,
            dataset_name=dataset_name or self.dataset_name,
            hyperparameters={k: getattr(v, "value", v) for k, v in options.items() if v is not None},
            tax=self.tax_report,
            tags=[tags] if isinstance(tags, str) else tags or [],
            model_name=self.hub_model_id or model_name,
        )
