"""Find options that have no effect under the other options of a run."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
WITHOUT_SCHEDULE = ("constant", "constant_with_warmup")
WITHOUT_MOMENTS = ("sgd", "adafactor", "adagrad", "rmsprop", "galore_adafactor", "galore_adafactor_layerwise")
WITHOUT_ARGUMENTS = ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adafactor")
LORA = (
    "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters", "use_rslora", "use_dora",
)  # fmt: skip
ANY_ADAPTER = ("lora_modules_to_save", "lora_task_type")
BOTTLENECK = ("reduction_factor", "placement")


class Rule(NamedTuple):
    """Say when options have no effect.

    Attributes:
        names: the options.
        decided_by: the option that takes their effect away.
        idle: whether they have no effect, from all options of the run.
        mend: what the user should do.
    """

    names: tuple[str, ...]
    decided_by: str
    idle: Callable[[Any], bool]
    mend: str


def _unless(option: str, *values) -> Callable[[Any], bool]:
    return lambda args: getattr(args, option) not in values


def _if(option: str, *values) -> Callable[[Any], bool]:
    return lambda args: getattr(args, option) in values


RULES = (
    Rule(("save_steps",), "save_strategy", _unless("save_strategy", "steps"), 'set save_strategy to "steps"'),
    Rule(
        ("save_total_limit", "save_only_model", "save_on_each_node"), "save_strategy", _if("save_strategy", "no"),
        "set save_steps, or another save_strategy",
    ),
    Rule(("eval_steps",), "eval_strategy", _unless("eval_strategy", "steps"), 'set eval_strategy to "steps"'),
    Rule(
        ("eval_delay", "load_best_model_at_end", "metric_for_best_model"), "eval_strategy", _if("eval_strategy", "no"),
        "set eval_steps and save_steps, or both strategies",
    ),
    Rule(
        ("save_strategy",), "eval_strategy", lambda args: (args.save_strategy, args.eval_strategy) == ("best", "no"),
        "set eval_steps, since evaluations find the best model",
    ),
    Rule(
        ("greater_is_better",), "metric_for_best_model",
        lambda args: args.metric_for_best_model is None and not args.load_best_model_at_end,
        "set metric_for_best_model",
    ),
    Rule(
        ("logging_steps",), "logging_strategy",  # eval_steps are the logging steps by default
        lambda args: args.logging_strategy != "steps"
        and not (args.eval_strategy == "steps" and args.eval_steps in (None, args.logging_steps)),
        'set logging_strategy to "steps"',
    ),
    Rule(("num_train_epochs",), "max_steps", lambda args: args.max_steps > 0, "leave max_steps out"),
    Rule(
        ("warmup_steps",), "lr_scheduler_type",
        lambda args: args.warmup_steps != 0 and args.lr_scheduler_type in WITHOUT_WARMUP,
        'set lr_scheduler_type to one with warm-up, such as "constant_with_warmup"',
    ),
    Rule(
        ("lr_scheduler_kwargs",), "lr_scheduler_type", _if("lr_scheduler_type", *WITHOUT_SCHEDULE),
        "choose a lr_scheduler_type that has options",
    ),
    Rule(
        ("adam_beta1", "adam_beta2", "adam_epsilon"), "optim", _if("optim", *WITHOUT_MOMENTS),
        "choose an Adam optimizer",
    ),
    Rule(("optim_args",), "optim", _if("optim", *WITHOUT_ARGUMENTS), "choose an optim that has options"),
    Rule(
        ("optim_target_modules",), "optim", lambda args: not args.optim.startswith(("galore", "apollo")),
        "choose a GaLore or APOLLO optim",
    ),
    Rule(
        ("gradient_checkpointing",), "activation_checkpointing",
        lambda args: args.activation_checkpointing not in (None, args.gradient_checkpointing),
        "set one of the two names of this option",
    ),
    Rule(
        ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"), "activation_checkpointing",
        lambda args: args.activation_checkpointing is False
        or (args.activation_checkpointing is None and args.gradient_checkpointing is False),
        "turn activation_checkpointing on",
    ),
    Rule(("liger_kernel_config",), "use_liger_kernel", _unless("use_liger_kernel", True), "turn use_liger_kernel on"),
    Rule(
        ("dataloader_persistent_workers", "dataloader_multiprocessing_context", "dataloader_in_order"),
        "dataloader_num_workers", _if("dataloader_num_workers", 0), "set dataloader_num_workers",
    ),
    Rule(
        ("length_column_name",), "train_sampling_strategy", _if("train_sampling_strategy", "random", "sequential"),
        'set train_sampling_strategy to "group_by_length"',
    ),
    Rule(
        ("value", "value_learning_rate", "vf_coef", "cliprange_value", "lam", "bootstrap_truncated"),
        "advantage_estimator", _unless("advantage_estimator", "gae"), 'choose "gae", which has a value function',
    ),
    Rule(
        ("gamma",), "advantage_estimator", _if("advantage_estimator", "rloo", "grpo"),
        "the completion is one action for this estimator; choose another",
    ),
    Rule(("scale_rewards",), "advantage_estimator", _unless("advantage_estimator", "grpo"), 'choose "grpo"'),
    Rule(("use_bias_correction_kl",), "kl_in_loss", _unless("kl_in_loss", True), "set kl_in_loss"),
)  # fmt: skip
"""Rules for every run: an option with a value that is not its default is refused if it has no effect."""

RECIPE_RULES = (
    Rule(
        ("metric_for_best_model", "greater_is_better"), "load_best_model_at_end",
        lambda args: not (args.load_best_model_at_end or args.save_total_limit or args.save_strategy == "best"
                          or args.lr_scheduler_type in WITHOUT_WARMUP[1:]),
        "set load_best_model_at_end",
    ),
    Rule(
        ("hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push", "hub_revision"),
        "push_to_hub", _unless("push_to_hub", True), "set push_to_hub",
    ),
    Rule(
        ("run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"), "report_to",
        _if("report_to", "none", ["none"], []), "set report_to to the tracker",
    ),
    Rule(
        ("ignore_data_skip", "restore_callback_states_from_checkpoint"), "resume_from_checkpoint",
        _if("resume_from_checkpoint", None), "set resume_from_checkpoint",
    ),
    Rule(
        ("do_train", "do_eval", "do_predict"), "eval_strategy", lambda args: True,
        "a recipe always trains, and eval_strategy says when it evaluates",
    ),
    Rule(
        ("max_steps", "num_train_epochs"), "ladder_budgets", lambda args: True,
        "choose the budgets, which set the steps of each run",
    ),
    Rule(
        ("adapter", *LORA, *ANY_ADAPTER, *BOTTLENECK), "use_peft", _unless("use_peft", True), "set use_peft",
    ),
    Rule(LORA, "adapter", _unless("adapter", "lora"), 'set adapter to "lora"'),
    Rule(BOTTLENECK, "adapter", _unless("adapter", "bottleneck"), 'set adapter to "bottleneck"'),
    Rule(
        ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"), "load_in_4bit",
        _unless("load_in_4bit", True), "set load_in_4bit",
    ),
)  # fmt: skip
"""Rules for recipes alone; a program of one's own may push, track or resume by a call."""


def idle_options(args, names: Iterable[str], rules: tuple[Rule, ...] = RULES) -> list[tuple[str, Rule, str]]:
    """Return (option, rule, message) for each of `names` that has no effect in `args`.

    Args:
        args: an object with the options of the run as attributes.
        names: the options to look at.
    """
    names, found = set(names), []
    for rule in rules:
        for name in [name for name in rule.names if name in names and hasattr(args, rule.decided_by)]:
            if rule.idle(args):
                other = getattr(getattr(args, rule.decided_by), "value", getattr(args, rule.decided_by))
                value = getattr(getattr(args, name), "value", getattr(args, name))
                why = f"{name}={value!r} has no effect with {rule.decided_by}={other!r}"
                found.append((name, rule, f"{why}: {rule.mend}, or leave {name} out."))
    return found
