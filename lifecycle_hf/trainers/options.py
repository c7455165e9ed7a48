"""Options that every trainer of a policy has."""

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

STRICT_DATA = "Raise on a row that can't be used, where otherwise it is dropped with a count."


def option(default, help: str, **metadata):
    return field(default=default, metadata={"help": help, **metadata})


def settle_bf16(args: TrainingArguments) -> None:
    """Where unset, turn `bf16` on if a GPU supports it."""
    if args.bf16 is None:
        args.bf16 = not args.fp16 and torch.cuda.is_available() and torch.cuda.is_bf16_supported()


@dataclass
class MitigationOptions:
    """Options that make a run pay less alignment tax; all but a given `ewc` read in `ptx_dataset` what to protect."""

    ptx_coef: float = option(0.0, "γ_ptx, weight of the pretraining loss (mean NLL per token); needs a ptx_dataset.")
    ptx_batch_size: int | None = option(
        None, "Pretraining rows per device and micro-batch; per_device_train_batch_size by default."
    )
    ptx_max_length: int = option(512, "Cut pretraining rows to this many tokens.")
    ptx_ceiling: float | None = option(
        None,
        "Hold the pretraining loss (nats per token) under this by a Lagrange multiplier, which starts as ptx_coef.",
    )
    ptx_rate: float = option(0.1, "How much that multiplier moves per nat and optimizer step.")
    ewc_coef: float = option(0.0, "λ, weight of the EWC penalty ½·Σ F·(θ − θ*)², θ* the weights at the start.")
    ewc: str | None = option(None, "File of EWC.save; by default the Fisher is estimated on ptx_dataset at the start.")
    ewc_rows: int = option(256, "Rows of ptx_dataset, per process, that estimate the Fisher.")
    projection: str | None = option(
        None,
        "Take out of every optimizer step what changes the pretraining loss to first order: of the 'gradient', or of "
        "the realised 'update'.",
        choices=("gradient", "update"),
    )
    projection_when: str = option(
        "always",
        "Project 'always', or on 'conflict' only: where the step would raise that loss.",
        choices=("always", "conflict"),
    )
    projection_k: int = option(1, "Protected directions: gradients of the pretraining loss.")
    projection_batches: int = option(1, "Batches of ptx_batch_size rows averaged in each direction.")
    projection_every: int = option(1, "Optimizer steps between refreshes of the directions.")
    projection_scope: str = option(
        "global", "Project all tensors as one vector, or each 'tensor' by itself.", choices=("global", "tensor")
    )
    projection_refresh: str = option(
        "fresh",
        "Compute all k directions anew ('fresh'), or one, and keep the last k ('running').",
        choices=("fresh", "running"),
    )


@dataclass
class PolicyConfig(MitigationOptions, TrainingArguments):
    """Options shared by PPO and preference optimisation, with TRL's names and defaults."""

    learning_rate: float = option(1e-6, "Learning rate of the policy.")
    logging_steps: float = option(10, "Log every X optimizer steps, or this share of all steps if below 1.")
    bf16: bool | None = option(None, "bf16 autocast; by default on where a GPU supports it, and off on CPU.")
    remove_unused_columns: bool | None = option(False, "Keep False: the trainer picks the columns it needs.")
    trust_remote_code: bool = option(False, "Run model code from the Hub; only for repositories that you trust.")
    disable_dropout: bool = option(True, "Switch dropout off, so that log-probs do not depend on chance.")
    strict_data: bool = option(False, STRICT_DATA)

    def __post_init__(self):
        if self.activation_checkpointing is None and self.gradient_checkpointing is None:
            self.activation_checkpointing = True
        settle_bf16(self)
        super().__post_init__()
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns=True would take needed columns away: leave it False.")
        self.check()

    def check(self) -> None:
        """Raises a ValueError that names the first option with a value that can't be meant."""
