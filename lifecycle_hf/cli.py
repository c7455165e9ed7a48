"""What every recipe shares: options, data and model names, and the closing steps."""

import importlib
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint
from trl import ScriptArguments, get_peft_config, get_quantization_config

from lifecycle_hf.alignment_tax.metrics import perplexity
from lifecycle_hf.alignment_tax.pictures import plot_history, plot_overoptimization
from lifecycle_hf.data.corpora import split_tail, text_corpus
from lifecycle_hf.parsing import parse as parse
from lifecycle_hf.trainers.callbacks import TaxMonitor

LOADER_OF_SUFFIX = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
HELD_OUT_SHARE, HELD_OUT_MOST, HELD_OUT_SEED = 0.05, 500, 0
TOYWORLD = {"gold_reward": True, "refusal_rate": True, "benign_accuracy": True, "perplexity": False}
"""What is measured in the toy world, and whether more is better."""


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


def load_splits(script_args, stage) -> tuple[Dataset, Dataset | None]:
    """Load (train, test) by `dataset_name`: `toyworld`, a local file or folder, or a dataset of the Hub.

    When there is no split named `test`, 5 % of train (1 to 500 rows, always the same) are held out for it; a train
    split of one row gives None. To `pretrain` on, text files are whole documents (`text_corpus`), held out by
    `split_tail`.

    Raises:
        ValueError: no name, nothing found under it, or a split that it does not have.
    """
    name = script_args.dataset_name
    if not name:
        raise ValueError(
            "dataset_name is missing: give --dataset_name toyworld, a local file or folder, or a Hub name."
        )
    if script_args.dataset_streaming:
        raise ValueError("dataset_streaming is not supported: the trainers need the length of their data.")
    splits = _load(name, script_args.dataset_config, stage)
    train_name, test_name = script_args.dataset_train_split, script_args.dataset_test_split
    wanted = [train_name] if test_name == "test" else [train_name, test_name]
    for option, split in zip(("dataset_train_split", "dataset_test_split"), wanted):
        if split not in splits:
            raise ValueError(f"{option}: {name} has no split {split!r}; it has {', '.join(map(repr, splits))}.")
    train = splits[train_name]
    if test_name in splits:
        return train, splits[test_name]
    if len(train) < 2:
        return train, None
    held_out = min(max(1, round(HELD_OUT_SHARE * len(train))), HELD_OUT_MOST)
    parts = train.train_test_split(test_size=held_out, seed=HELD_OUT_SEED)
    return parts["train"], parts["test"]


def load_test(name, stage) -> Dataset:
    """The split `test` of what `dataset_name` can be, or the only split: all rows of data that are there to measure.

    Raises:
        ValueError: nothing found under the name, or several splits and none is `test`.
    """
    splits = _load(name, None, stage)
    if "test" not in splits and len(splits) > 1:
        raise ValueError(f"{name} has the splits {', '.join(splits)}, none is named test: give the one to measure on.")
    return splits["test"] if "test" in splits else next(iter(splits.values()))


def _load(name, config, stage):
    if name == "toyworld":
        from lifecycle_hf import toyworld

        return toyworld.dataset(stage)
    if stage == "pretrain" and (corpus := text_corpus(name)):
        return dict(zip(("train", "test"), split_tail(corpus)))
    path = Path(name).expanduser()
    suffix = next((s for s in reversed(path.suffixes) if s in LOADER_OF_SUFFIX), None)
    if path.is_file():
        if suffix is None:
            readable = " ".join(LOADER_OF_SUFFIX)
            raise ValueError(
                f"dataset_name: cannot read {path}; give a file ending in {readable} (or these with .gz)."
            )
        return load_dataset(LOADER_OF_SUFFIX[suffix], data_files=str(path))
    if path.is_dir():
        if (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists():
            loaded = load_from_disk(str(path))
            return loaded if isinstance(loaded, DatasetDict) else DatasetDict(train=loaded)
        return load_dataset(str(path), name=config)
    if suffix or path.is_absolute() or name.startswith("."):
        raise ValueError(f"dataset_name: there is no file or folder {path} (looked from {Path.cwd()}).")
    try:
        return load_dataset(name, name=config)
    except (ConnectionError, FileNotFoundError) as error:
        raise ValueError(
            f"dataset_name: {name!r} is neither a local file or folder nor found on the Hub ({error}). "
            "Check the spelling and the connection; HF_HUB_OFFLINE=1 allows cached datasets only."
        ) from error


def resolve_model(name, stage) -> str:
    """The path of the cached checkpoint of `stage` (made when absent) for `toyworld`; any other name as it is."""
    if name != "toyworld":
        return name
    from lifecycle_hf import toyworld

    return str(toyworld.stage_checkpoint(stage))


def resolve_reward(name: str):
    """The callable of MODULE:FUNCTION, modules in the current folder included; a model's name or path otherwise.

    Raises:
        ValueError: no such module or function.
    """
    module, _, function = name.partition(":")
    if not function or "/" in name:
        return resolve_model(name, "reward")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward_funcs: {name!r} can't be imported ({error}); looked in {Path.cwd()} too.") from error


def model_init_kwargs(model_args) -> dict:
    """Keyword arguments for `from_pretrained` that `trl.ModelConfig` names: revision, dtype and attention."""
    dtype = model_args.dtype
    kwargs = {
        "revision": model_args.model_revision,
        "dtype": dtype if dtype in (None, "auto") else getattr(torch, dtype),
        "attn_implementation": model_args.attn_implementation,
    }
    return {name: value for name, value in kwargs.items() if value is not None}


def trainer_inputs(script_args, args, model_args, stage, start) -> dict:
    """What a recipe hands its trainer: the model (`toyworld` is that of the stage `start`), the options, the data of
    `stage`, adapters and quantisation."""
    args.model_init_kwargs = model_init_kwargs(model_args) | (args.model_init_kwargs or {})
    train, test = load_splits(script_args, stage)
    texts = {"ptx_dataset": load_ptx(script_args)[0]} if isinstance(script_args, ProtectedArguments) else {}
    return texts | {
        "model": resolve_model(model_args.model_name_or_path, start),
        "args": args,
        "train_dataset": train,
        "eval_dataset": test,
        "peft_config": get_peft_config(model_args),
        "quantization_config": get_quantization_config(model_args),
    }


def load_ptx(script_args) -> tuple[Dataset | None, Dataset | None]:
    """(train, test) of `ptx_dataset_name`, or None for both."""
    if not script_args.ptx_dataset_name:
        return None, None
    return load_splits(RecipeArguments(dataset_name=script_args.ptx_dataset_name), "ptx")


def load_texts(script_args) -> Dataset | None:
    """The held-out part of `text_dataset_name`, or None."""
    if not script_args.text_dataset_name:
        return None
    return load_splits(RecipeArguments(dataset_name=script_args.text_dataset_name), "ptx")[1]


def held_out(dataset, rows):
    """The first `rows` rows of a held-out split, or None where there is none."""
    return None if dataset is None else dataset.select(range(min(len(dataset), rows)))


def monitor_preferences(trainer, script_args, evaluated):
    """`monitor_tax` with the options of [`MeasuredArguments`], where anything is held out."""
    if trainer.eval_dataset is not None:
        monitor_tax(trainer, script_args, script_args.measure_steps, evaluated, load_texts(script_args))


def monitor_tax(trainer, script_args, every, evaluated, texts=None):
    """Attach a TaxMonitor: `trainer.evaluate()`, and the toyworld's truth or perplexity on held-out `texts`.

    Args:
        every: optimizer steps between measurements; 0 measures both ends only.
        evaluated: {row of the table: (metric of `evaluate`, whether more is better)}.
    """
    toy = script_args.dataset_name == "toyworld"
    readable = texts is not None and {"text", "messages"}.intersection(texts.column_names)
    capability = TOYWORLD if toy else {"perplexity": False} if readable else {}

    def metrics(model, tokenizer):
        evaluation, values = trainer.evaluate(), {}
        if toy:
            from lifecycle_hf import toyworld

            values = toyworld.measure(model, tokenizer, n=script_args.measure_rows, seed=0)
        elif capability:
            rows = held_out(texts, script_args.measure_rows)
            column = "messages" if "messages" in rows.column_names else "text"
            values = {"perplexity": perplexity(model, tokenizer, list(rows[column]))}
        return {row: evaluation.get(metric, math.nan) for row, (metric, _) in evaluated.items()} | values

    better = {row: higher for row, (_, higher) in evaluated.items()} | capability
    return TaxMonitor(metrics, every or None, better).attach(trainer)


def resume_point(args) -> str | None:
    """The checkpoint that `resume_from_checkpoint` means: a path as it is; without one, or with `true`, the last in
    `output_dir`, where there is one.

    Raises:
        ValueError: there is no checkpoint at that path.
    """
    wanted = args.resume_from_checkpoint
    if str(wanted).lower() in ("none", "false"):
        return None
    if str(wanted).lower() == "true":
        last = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
        if args.process_index == 0:
            print(f"Resuming from {last}" if last else f"{args.output_dir} has no checkpoint yet: starting anew.")
        return last
    if not (Path(wanted) / TRAINER_STATE_NAME).exists():
        last = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
        raise ValueError(
            f"resume_from_checkpoint: {wanted} is no checkpoint. The last one is {last or 'nowhere yet'}."
        )
    return str(wanted)


def train_and_report(trainer, script_args, model_args):
    """Train (or resume), draw what was measured on the way, keep everything and print the closing table."""
    trainer.dataset_name = script_args.dataset_name
    trainer.train(resume_from_checkpoint=resume_point(trainer.args))
    report = trainer.tax_report
    if report and trainer.is_world_process_zero():
        try:  # before the push, and never at the cost of the model
            plot_history(trainer.state.log_history, Path(trainer.args.output_dir) / "training.png")
            _plot_overoptimization(trainer.state.log_history, Path(trainer.args.output_dir) / "overoptimization.png")
        except ValueError as error:
            print(f"No picture: {error}")
    finish(trainer, script_args, model_args, report.to_json() if report else {})
    if report:
        trainer.accelerator.print(report.to_terminal())
    trainer.accelerator.print(f"Model, report.json and pictures are in {trainer.args.output_dir}")


def _plot_overoptimization(history, path):
    """Where KL and rewards were measured together at three points or more."""
    names = {"proxy reward": "tax/proxy_reward", "gold reward": "tax/gold_reward"}
    rows = [entry for entry in history if entry.keys() >= {"tax/kl", *names.values()}]
    if len(rows) > 2:
        scores = {label: [row[name] for row in rows] for label, name in names.items()}
        plot_overoptimization([row["tax/kl"] for row in rows], scores, path)


def finish(trainer, script_args, model_args, report):
    """Keep what a recipe made: report.json, the model and its card in `output_dir`, a push when `push_to_hub` is set,
    and with `--merge` a deployable copy under `output_dir/merged`. Every process calls it.

    Args:
        report: what report.json says (`write_report`).
    """
    args = trainer.args
    output_dir = Path(args.output_dir)
    if trainer.is_world_process_zero():
        write_report(report, output_dir)
    trainer.save_model(str(output_dir))
    if not args.push_to_hub:  # otherwise save_model has written the card and pushed
        trainer.create_model_card()
    trainer.accelerator.wait_for_everyone()
    if getattr(script_args, "merge", False):
        _merge(trainer, output_dir)
    trainer.end()


def write_report(report, output_dir):
    """report.json in `output_dir`; NaN and infinity become null."""
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "report.json").write_text(json.dumps(json_ready(report), indent=2, ensure_ascii=False) + "\n")


def _merge(trainer, output_dir):
    if not (output_dir / "adapter_config.json").exists():
        trainer.accelerator.print(f"--merge: {output_dir} already holds a whole model, there is nothing to merge.")
        return
    if is_deepspeed_zero3_enabled():
        unset_hf_deepspeed_config()  # the main process loads the merged model whole, the others do not take part
    if trainer.is_world_process_zero():
        from lifecycle_hf.models.loading import merge_adapter

        merge_adapter(str(output_dir), str(output_dir / "merged"))
    trainer.accelerator.wait_for_everyone()


def json_ready(value):
    """`value` for `json.dump`: keys as text, NaN and infinity as null."""
    if isinstance(value, dict):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
