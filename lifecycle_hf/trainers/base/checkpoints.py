"""Checkpoints: complete or absent, with the state of every object that a resumed run needs.

Beside the policy trainer this is the one place that overrides methods of transformers' Trainer whose names begin with
an underscore.
"""

import json
import shutil
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

STAGING = "_tmp-"
"""Stands before the name of a checkpoint while it is written or deleted. A push to the Hub leaves `_*` out."""


@runtime_checkable
class Stateful(Protocol):
    """An object whose state must survive a checkpoint."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def save_state(state: dict[str, Any], path: Path) -> None:
    """Write a flat state dict: its tensors to `path`.safetensors, everything else to `path`.json."""
    tensors = {key: value.contiguous() for key, value in state.items() if isinstance(value, torch.Tensor)}
    if tensors:
        save_file(tensors, path.with_suffix(".safetensors"))
    rest = {key: value for key, value in state.items() if key not in tensors}
    path.with_suffix(".json").write_text(json.dumps(rest))


def load_state(path: Path) -> dict[str, Any]:
    """Read what [`save_state`] wrote."""
    state = json.loads(path.with_suffix(".json").read_text())
    tensors = path.with_suffix(".safetensors")
    return state | (load_file(tensors) if tensors.exists() else {})


def _clear(folder: Path) -> None:
    """Delete what a killed run left half written, and what was moved aside."""
    for path in folder.glob(f"{STAGING}{PREFIX_CHECKPOINT_DIR}-*"):
        shutil.rmtree(path, ignore_errors=True)


class LogState(TrainerCallback):
    """Keep what the next log line will be made of, so that a run that stops between two lines logs the same ones."""

    def __init__(self, trainer):
        self.trainer, self._restored = trainer, None

    def state_dict(self) -> dict[str, Any]:
        trainer = self.trainer
        line = {"loss": trainer._tr_loss.item(), "since": trainer._globalstep_last_logged}
        return line | {"sums": trainer.metrics["train"].read()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._restored = state

    def on_train_begin(self, *args, **kwargs):
        """Restore the counters: transformers sets them to zero after it has read a checkpoint, and before this."""
        self.trainer.remove_callback(self)
        trainer, state, self._restored = self.trainer, self._restored, None
        trainer._tr_loss += state["loss"]
        trainer._total_loss_scalar -= state["loss"]  # the mean of a call of `train` is over its own steps
        trainer._globalstep_last_logged = state["since"]
        trainer.metrics["train"].sums = state["sums"]


class CheckpointMixin:
    """Write checkpoints that are complete or absent, and with them the state of [`Stateful`] objects.

    Attributes:
        stateful: {name: object}, saved in every checkpoint as `lifecycle_<name>` and restored on resume.
        stateful_per_rank: the same for objects whose state differs between ranks.
    """

    def __init__(self, *args, **kwargs):
        self.stateful: dict[str, Stateful] = {}
        self.stateful_per_rank: dict[str, Stateful] = {"log": LogState(self)}
        self._staging: Path | None = None
        super().__init__(*args, **kwargs)

    # Saving

    def _get_output_dir(self, trial) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:  # a checkpoint is pushed once it stands in its place
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model, trial) -> None:
        """As in transformers, but written elsewhere and moved in one step."""
        run_dir, name = Path(self._get_output_dir(trial)), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        wait, writes = self.accelerator.wait_for_everyone, self.args.local_process_index == 0
        if writes:
            _clear(run_dir)
        wait()
        self._staging = run_dir / f"{STAGING}{name}"
        try:
            super()._save_checkpoint(model, trial)
            if not self.args.save_only_model:
                self.save_extra_state(self._staging / name)
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
            self.rotate_checkpoints(run_dir)

    def rotate_checkpoints(self, run_dir: Path) -> None:
        """Delete the oldest checkpoints beyond `save_total_limit`, but never the last one nor the best one."""
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
        if limit is not None and limit > 0:
            checkpoints = sort_checkpoints(str(run_dir), use_mtime=True)
            kept = {checkpoints[-1], *([str(Path(best))] if best else [])}
            surplus = max(len(checkpoints) - max(limit, len(kept)), 0)
            for path in [path for path in checkpoints if path not in kept][:surplus]:
                Path(path).rename(run_dir / f"{STAGING}{Path(path).name}")
        _clear(run_dir)

    def _state_files(self, folder: str | Path) -> list[tuple[Stateful, Path, bool]]:
        """(object, path, whether all ranks share it) of everything that has a state."""
        rank, folder = self.accelerator.process_index, Path(folder)
        shared = [(item, folder / f"lifecycle_{name}", True) for name, item in self.stateful.items()]
        per_rank = self.stateful_per_rank.items()
        return shared + [(item, folder / f"lifecycle_{name}_rank{rank}", False) for name, item in per_rank]

    def save_extra_state(self, checkpoint: str | Path) -> None:
        """Write the state of every [`Stateful`] object into `checkpoint`."""
        Path(checkpoint).mkdir(parents=True, exist_ok=True)
        for item, path, shared in self._state_files(checkpoint):
            if not shared or self.args.should_save:
                save_state(item.state_dict(), path)

    # Resuming

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.load_extra_state(checkpoint)

    def load_extra_state(self, checkpoint: str | Path) -> None:
        """Restore every [`Stateful`] object from `checkpoint`.

        Raises:
            ValueError: the checkpoint lacks one, as does one of another trainer or another number of processes.
        """
        for item, path, _ in self._state_files(checkpoint):
            if not path.with_suffix(".json").exists():
                if getattr(item, "may_be_missing", False):
                    continue
                raise ValueError(
                    f"The checkpoint {checkpoint} has no {path.name}.json: it was written by another trainer, with "
                    "another number of processes, or by save_only_model. Resume with the setup that wrote it."
                )
            item.load_state_dict(load_state(path))
        self.add_callback(self.stateful_per_rank["log"])
        if self.args.should_save:
            _clear(Path(self.args.output_dir))

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As in transformers, but a resumed run that has made all of its steps makes no other one."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)


class PolicyCheckpointMixin(CheckpointMixin):
    """Write and read checkpoints by `model.save_pretrained` and `model.load_pretrained`.

    It is for a trainer whose model is a [`PolicyAndReference`]: the policy stands at the root of the checkpoint, as an
    ordinary checkpoint or adapter.
    """

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        folder = output_dir if output_dir is not None else self.args.output_dir
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.accelerator.unwrap_model(self.model).save_pretrained(folder, state_dict)
        self.processing_class.save_pretrained(folder)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        self.accelerator.unwrap_model(self.model).load_pretrained(resume_from_checkpoint)
