"""The arguments that recipes share, and the data, models and trainer inputs that they name."""

from dataclasses import dataclass, field

import torch
from datasets import Dataset
from peft import PeftConfig
from trl import ScriptArguments, get_peft_config, get_quantization_config

from lifecycle_hf import toyworld
from lifecycle_hf.completions.rewards import find_reward
from lifecycle_hf.data import loading
from lifecycle_hf.models.adapters.bottleneck import PLACEMENTS, BottleneckConfig


@dataclass
class RecipeArguments(ScriptArguments):
    """Data of the run, and what is done with the trained model."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "`toyworld`, a local file (.jsonl, .json, .csv, .parquet, .txt, also with .gz), a local folder, "
            "or a data set of the Hub; to pretrain on also `python`, its documentation."
        },
    )
    dataset_test_split: str = field(
        default="test",
        metadata={
            "help": "Held-out split; 5 %% of the train split are held out when there is none of the name `test`."
        },
    )
    merge: bool = field(
        default=False,
        metadata={"help": "Also write the adapter merged into its base model, ready to deploy, to OUTPUT_DIR/merged."},
    )
    adapter: str = field(
        default="lora",
        metadata={"help": "What use_peft trains: LoRA or bottleneck adapters.", "choices": ("lora", "bottleneck")},
    )
    reduction_factor: float = field(
        default=16, metadata={"help": "Bottleneck adapters: width of the model / width of the bottleneck."}
    )
    placement: str = field(
        default="both",
        metadata={"help": "Bottleneck adapters: the outputs that they change.", "choices": tuple(PLACEMENTS)},
    )


@dataclass
class ProtectedArguments(RecipeArguments):
    """Data of the run and of what it should not cost."""

    ptx_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Text or chat data whose loss is mixed in (ptx_coef), or that EWC and projection protect."},
    )


@dataclass
class MeasuredArguments(ProtectedArguments):
    """Data of the run, what is measured on the way, and what is done with the trained model."""

    measure_steps: int = field(
        default=0, metadata={"help": "Measure what alignment costs every X optimizer steps beside both ends; 0: ends."}
    )
    measure_rows: int = field(default=128, metadata={"help": "Held-out prompts, pairs and texts per measurement."})
    text_dataset_name: str | None = field(
        default=None, metadata={"help": "Text or chat data whose held-out part measures perplexity."}
    )


@dataclass
class PolicyArguments(ProtectedArguments):
    """Hold the data, the rewards and the measurements of a run that trains a policy."""

    reward_funcs: list[str] = field(
        default_factory=list, metadata={"help": "Reward models by name or path, and functions as MODULE:FUNCTION."}
    )
    measure_updates: int = field(
        default=5, metadata={"help": "Measure capability, reward and KL before, after and every X updates; 0: never."}
    )
    measure_rows: int = field(default=128, metadata={"help": "Held-out prompts and texts of each measurement."})


def load_splits(script_args, stage) -> tuple[Dataset, Dataset | None]:
    """Load (train, test) by `dataset_name`, see [`lifecycle_hf.data.loading.load_splits`].

    Raises:
        ValueError: no name, streaming was asked for, nothing is found under the name, or a split is missing.
    """
    if not script_args.dataset_name:
        raise ValueError(
            "dataset_name is missing: give --dataset_name toyworld, a local file or folder, or a Hub name."
        )
    if script_args.dataset_streaming:
        raise ValueError("dataset_streaming is not supported: the trainers need the length of their data.")
    return loading.load_splits(
        script_args.dataset_name,
        stage,
        config=script_args.dataset_config,
        train_split=script_args.dataset_train_split,
        test_split=script_args.dataset_test_split,
    )


def resolve_model(name: str, stage: str) -> str:
    """Return the cached checkpoint of `stage` (made where absent) for `toyworld`, and any other name as it is."""
    return str(toyworld.stage_checkpoint(stage)) if name == "toyworld" else name


def resolve_reward(name: str):
    """Return the function of MODULE:FUNCTION; a model's name or path otherwise, see [`resolve_model`]."""
    return resolve_model(name, "reward") if name == "toyworld" else find_reward(name)


def model_init_kwargs(model_args) -> dict:
    """Return the keyword arguments of `from_pretrained` in a `trl.ModelConfig`: revision, dtype and attention."""
    dtype = model_args.dtype
    kwargs = {
        "revision": model_args.model_revision,
        "dtype": dtype if dtype in (None, "auto") else getattr(torch, dtype),
        "attn_implementation": model_args.attn_implementation,
    }
    return {name: value for name, value in kwargs.items() if value is not None}


def adapter_config(script_args, model_args) -> PeftConfig | None:
    """Return the configuration of the adapter to train, or None: LoRA of a `trl.ModelConfig`, or bottlenecks.

    Bottleneck adapters take `lora_task_type` and `lora_modules_to_save` of the options of LoRA.
    """
    lora = get_peft_config(model_args)
    if lora is None or script_args.adapter == "lora":
        return lora
    size = {"reduction_factor": script_args.reduction_factor, "placement": script_args.placement}
    return BottleneckConfig(task_type=lora.task_type, modules_to_save=lora.modules_to_save, **size)


def trainer_inputs(script_args, args, model_args, stage, start) -> dict:
    """Return the arguments of a trainer: the model (`toyworld` is that of the stage `start`), the options, the data of
    `stage`, adapters and quantisation."""
    args.model_init_kwargs = model_init_kwargs(model_args) | (args.model_init_kwargs or {})
    train, test = load_splits(script_args, stage)
    texts = {"ptx_dataset": load_ptx(script_args)[0]} if isinstance(script_args, ProtectedArguments) else {}
    return texts | {
        "model": resolve_model(model_args.model_name_or_path, start),
        "args": args,
        "train_dataset": train,
        "eval_dataset": test,
        "peft_config": adapter_config(script_args, model_args),
        "quantization_config": get_quantization_config(model_args),
    }


def load_ptx(script_args) -> tuple[Dataset | None, Dataset | None]:
    """Return (train, test) of `ptx_dataset_name`, or None for both."""
    name = script_args.ptx_dataset_name
    return loading.load_splits(name, "ptx") if name else (None, None)


def load_texts(script_args) -> Dataset | None:
    """Return the held-out part of `text_dataset_name`, or None."""
    name = script_args.text_dataset_name
    return loading.load_splits(name, "ptx")[1] if name else None
