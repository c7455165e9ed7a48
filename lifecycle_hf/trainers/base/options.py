"""Options that several trainers have, and the one place where the values of options are checked."""

import math
from dataclasses import MISSING, dataclass, field, fields

import torch
from transformers import TrainingArguments

from lifecycle_hf.trainers.base.idle import idle_options

STRICT_DATA = "Raise on a row that can't be used; by default such a row is dropped, with a count."
LIMITS = (
    (
        (
            "ppo_epochs", "num_mini_batches", "max_prompt_length", "max_completion_length", "generation_batch_size",
            "ptx_batch_size", "ptx_max_length", "max_faults", "num_completions_to_print", "ewc_rows", "projection_k",
            "projection_batches", "projection_every", "precompute_ref_batch_size", "dataset_num_proc",
            "num_generations", "rounds", "n_best", "max_answer_length", "max_target_length", "generation_max_length",
            "generation_num_beams",
        ),
        lambda value: isinstance(value, int) and value >= 1, "must be at least 1, and whole",
    ),
    (
        ("temperature", "kl_target", "kl_horizon", "kl_coef_max", "kl_budget", "reward_clip", "reward_timeout",
         "max_kl", "vllm_server_timeout", "beta", "desirable_weight", "undesirable_weight", "weight_step_size"),
        lambda value: 0 < value < math.inf, "must be above 0",
    ),
    (
        ("cliprange", "cliprange_high", "cliprange_value", "vf_coef", "entropy_coef", "ptx_coef", "ptx_rate",
         "ewc_coef", "kl_coef", "kl_coef_min", "kl_rate", "learning_rate", "value_learning_rate",
         "missing_eos_penalty", "min_entropy"),
        lambda value: 0 <= value < math.inf, "must not be negative, nor infinite",
    ),
    (("reward_retries",), lambda n: isinstance(n, int) and n >= 0, "must be a whole number, and not negative"),
    (("gamma", "lam", "weight_smoothing"), lambda value: 0 <= value <= 1, "must lie between 0 and 1"),
    (("label_smoothing_factor",), lambda value: 0 <= value < 1, "must lie in [0, 1)"),
    (("label_smoothing",), lambda value: 0 <= value < 0.5, "must lie in [0, 0.5): it is a share of flips"),
    (
        ("reward_weights",),
        lambda value: all(map(math.isfinite, value)) and any(value), "must be finite numbers, not all of them 0",
    ),
    (("stop_tokens",), bool, "is empty: name a token, or leave it out"),
)  # fmt: skip
"""Names of options, what their values must fulfil, and the same in words. None is always allowed."""

OWN_LOSS = {
    "label_smoothing_factor": "has no effect, since the loss is not a cross entropy with labels: leave it out.",
    "label_names": "has no effect, since the trainer knows the labels of its rows: leave it out.",
    "average_tokens_across_devices": "has no effect, since a step is averaged over all devices: leave it out.",
}
SUMS_ALONE = dict.fromkeys(
    ("include_for_metrics", "batch_eval_metrics", "eval_do_concat_batches", "eval_accumulation_steps"),
    "has no effect, since an evaluation keeps sums and no predictions: leave it out.",
)
"""Reasons to refuse an option, and the mend; a config names the options that it refuses in `refused`."""


def option(default, help: str, **metadata):
    """Return a dataclass field with a line of `--help`, and where it has them its `choices`."""
    return field(default=default, metadata={"help": help, **metadata})


def changed_options(args) -> list[str]:
    """Return the names of the options that do not have their default value."""
    defaults = {
        item.name: item.default if item.default_factory is MISSING else item.default_factory() for item in fields(args)
    }
    return [name for name, default in defaults.items() if getattr(args, name) != default]


def check_options(args) -> None:
    """Check the value of each option by its choices and by [`LIMITS`], and that each that is set has an effect.

    Raises:
        ValueError: names the first option with a value that it can't have, or that has no effect.
    """
    for item in fields(args):
        choices, value = item.metadata.get("choices"), getattr(args, item.name)
        if choices and value != item.default and value not in choices:
            raise ValueError(f"{item.name}={value!r} is unknown: choose one of {', '.join(map(str, choices))}.")
    for names, fits, must in LIMITS:
        for name in names:
            value = getattr(args, name, None)
            if value is not None and not fits(value):
                raise ValueError(f"{name}={value} {must}.")
    changed = changed_options(args)
    for name in changed:
        if name in args.refused:
            raise ValueError(f"{name}={getattr(args, name)!r} {args.refused[name]}")
    for _, _, message in idle_options(args, changed):
        raise ValueError(message)


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
class SamplingOptions:
    """Options of the trainers that learn from samples of their policy."""

    max_prompt_length: int | None = option(512, "Drop prompts with more tokens than this; None keeps all prompts.")
    max_completion_length: int = option(256, "Maximum number of tokens in a completion.")
    chat_template_kwargs: dict | str | None = option(
        None, "Arguments of the chat template, such as enable_thinking; a column of this name has precedence."
    )
    temperature: float = option(1.0, "Sampling temperature; the policy gradient is that of log-probs at it, too.")
    stop_tokens: list[str] | None = option(
        None, "Tokens that end a completion; by default the EOS tokens of the tokenizer and of the model."
    )
    generation_batch_size: int | None = option(None, "Prompts decoded together; a whole rollout by default.")
    merge_adapter: bool | None = option(
        None,
        "Decode with the adapter merged into a copy of its layers' weights, which is faster. By default only if these "
        "are fp32, because bf16 would round small changes away.",
    )
    missing_eos_penalty: float | None = option(None, "Subtract this from the score of completions without stop token.")

    reward_weights: list[float] | None = option(
        None, "Weight of each reward function; 1 each by default. One of weight 0 is logged, and not trained on."
    )
    reward_timeout: float | None = option(
        None,
        "Seconds that a reward callable may take for a rollout; None sets no limit. A call that took longer may "
        "still be running when the callable is called again.",
    )
    reward_retries: int = option(0, "How often to call a reward callable again after it raised or timed out.")

    log_completions: bool = option(True, "Print a table of sample completions every logging_steps.")
    num_completions_to_print: int = option(4, "Rows of that table.")
    on_hacking: str = option(
        "warn",
        "If completions, scores or lengths look like reward hacking: 'warn', or also 'stop' after the next optimizer "
        "step, with a checkpoint.",
        choices=("warn", "stop"),
    )

    use_vllm: bool = option(False, "Sample with a vLLM server, which needs its own GPU; see docs/scaling.md.")
    vllm_server_base_url: str = option("http://localhost:8000", "Address of the vLLM server.")
    vllm_server_timeout: float = option(240.0, "Seconds to wait until the vLLM server answers.")

    def sampling_conflicts(self) -> list[tuple[bool, str]]:
        """Return what [`TrainerConfig.conflicts`] returns, for the options of sampling."""
        vllm, size = self.use_vllm, self.generation_batch_size
        return [
            (vllm and self.merge_adapter is False, "use_vllm sends merged weights: leave merge_adapter out."),
            (vllm and size is not None, f"use_vllm decodes whole rollouts: leave generation_batch_size={size} out."),
        ]


@dataclass
class TrainerConfig(MitigationOptions, TrainingArguments):
    """Options of the trainers that are not built on TRL's, with TRL's names and defaults.

    Attributes:
        refused: {option that the trainer can't follow: why, and the mend}.
    """

    refused = OWN_LOSS | SUMS_ALONE

    logging_steps: float = option(10, "Log every X optimizer steps, or this share of all steps if below 1.")
    bf16: bool | None = option(None, "bf16 autocast; by default on where a GPU supports it, and off on CPU.")
    remove_unused_columns: bool | None = option(False, "Keep False: the trainer picks the columns that it needs.")
    trust_remote_code: bool = option(False, "Run model code from the Hub; only for repositories that you trust.")

    def __post_init__(self):
        if self.bf16 is None:
            self.bf16 = not self.fp16 and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        super().__post_init__()
        check_options(self)
        wrong = "remove_unused_columns=True would take needed columns away: leave it False."
        for holds, message in [(self.remove_unused_columns, wrong), *self.conflicts()]:
            if holds:
                raise ValueError(message)

    def conflicts(self) -> list[tuple[bool, str]]:
        """Return (whether it is so, what is wrong and how to mend it) for options that do not go together."""
        return []


@dataclass
class PolicyConfig(TrainerConfig):
    """Options that PPO and preference optimisation share."""

    refused = TrainerConfig.refused | {
        "auto_find_batch_size": "can't take back what a failed step counted: set per_device_train_batch_size.",
        "use_liger_kernel": "has no effect on a policy with its reference: the head is read in chunks; leave it out.",
    }

    learning_rate: float = option(1e-6, "Learning rate of the policy.")
    disable_dropout: bool = option(True, "Switch dropout off, so that log-probs do not depend on chance.")
    strict_data: bool = option(False, STRICT_DATA)
    dataset_num_proc: int | None = option(None, "Number of processes that tokenise the data; None: one.")

    def __post_init__(self):
        if self.activation_checkpointing is None and self.gradient_checkpointing is None:
            self.activation_checkpointing = True
        super().__post_init__()
