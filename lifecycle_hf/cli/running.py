"""What recipes do around training: measure, resume, report, draw, save, merge and push."""

import math
from pathlib import Path

from peft import PeftModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint
from trl import get_quantization_config

from lifecycle_hf import toyworld
from lifecycle_hf.cli.arguments import (
    adapter_config,
    load_ptx,
    load_splits,
    load_texts,
    model_init_kwargs,
    resolve_model,
    resolve_reward,
)
from lifecycle_hf.data.loading import first_rows
from lifecycle_hf.evaluation.metrics import perplexity
from lifecycle_hf.evaluation.pictures import plot_history, plot_overoptimization
from lifecycle_hf.evaluation.report import write_report
from lifecycle_hf.models.adapters.limits import can_merge
from lifecycle_hf.models.loading import merge_adapter
from lifecycle_hf.trainers.base.callbacks import TaxMonitor


def monitor_preferences(trainer, script_args, evaluated):
    """Call `monitor_tax` with the options of [`MeasuredArguments`], where there is held-out data."""
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
    capability = toyworld.HIGHER_IS_BETTER if toy else {"perplexity": False} if readable else {}

    def metrics(model, tokenizer):
        evaluation, values = trainer.evaluate(), {}
        if toy:
            values = toyworld.measure(model, tokenizer, n=script_args.measure_rows, seed=0)
        elif capability:
            rows = first_rows(texts, script_args.measure_rows)
            column = "messages" if "messages" in rows.column_names else "text"
            values = {"perplexity": perplexity(model, tokenizer, list(rows[column]))}
        return {row: evaluation.get(metric, math.nan) for row, (metric, _) in evaluated.items()} | values

    better = {row: higher for row, (_, higher) in evaluated.items()} | capability
    return TaxMonitor(metrics, every or None, better).attach(trainer)


def train_policy(trainer_class, script_args, args, model_args):
    """Train a policy against rewards, measure what it costs, and keep everything: the body of the policies' recipes.

    Args:
        trainer_class: [`PPOTrainer`] or one of its kind.
        script_args: [`PolicyArguments`].
    """
    train, test = load_splits(script_args, "ppo")
    texts = load_ptx(script_args)
    trainer = trainer_class(
        model=resolve_model(model_args.model_name_or_path, "sft"),
        reward_funcs=[resolve_reward(name) for name in script_args.reward_funcs],
        args=args,
        train_dataset=train,
        eval_dataset=first_rows(test, script_args.measure_rows),
        ptx_dataset=texts[0],
        peft_config=adapter_config(script_args, model_args),
        quantization_config=get_quantization_config(model_args),
        model_init_kwargs=model_init_kwargs(model_args),
    )
    every = script_args.measure_updates * args.steps_per_update
    if every and test:
        evaluated = {"proxy_reward": ("eval_score", True)}
        evaluated |= {"kl": ("eval_kl", False)} if args.needs_reference else {}
        monitor_tax(trainer, script_args, every, evaluated, texts[1])
    train_and_report(trainer, script_args)


def resume_point(args) -> str | None:
    """Return the checkpoint that `resume_from_checkpoint` means: a path as it is; with `true` or no value, the last in
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


def train_and_report(trainer, script_args, evaluate=None, title="Alignment tax"):
    """Train (or resume), draw what was measured on the way, keep everything and print the closing table.

    Args:
        evaluate: called after training where there is held-out data. Its metrics are report.json, with the table of
            before and after as "before_after". Without it report.json is the table.
        title: of the table.
    """
    check_merge(trainer, script_args)
    trainer.dataset_name = script_args.dataset_name
    trainer.train(resume_from_checkpoint=resume_point(trainer.args))
    measured = evaluate() if evaluate is not None and trainer.eval_dataset is not None else {}
    tax = trainer.tax_report
    report = tax.to_json() if tax else {}
    if evaluate is not None:
        report = measured | ({"before_after": report} if tax else {})
    elif tax and trainer.is_world_process_zero():
        try:  # before the push, and never at the cost of the model
            plot_history(trainer.state.log_history, Path(trainer.args.output_dir) / "training.png")
            _plot_overoptimization(trainer.state.log_history, Path(trainer.args.output_dir) / "overoptimization.png")
        except ValueError as error:
            print(f"No picture: {error}")
    finish(trainer, script_args, report)
    if tax:
        trainer.accelerator.print(tax.to_terminal(title=title))
    trainer.accelerator.print(f"The model and what was measured of it are in {trainer.args.output_dir}")


def _plot_overoptimization(history, path):
    """Draw where KL and rewards were measured together at three points or more."""
    names = {"proxy reward": "tax/proxy_reward", "gold reward": "tax/gold_reward"}
    rows = [entry for entry in history if entry.keys() >= {"tax/kl", *names.values()}]
    if len(rows) > 2:
        scores = {label: [row[name] for row in rows] for label, name in names.items()}
        plot_overoptimization([row["tax/kl"] for row in rows], scores, path)


def finish(trainer, script_args, report):
    """Save what a recipe made: report.json, the model and its card in `output_dir`, a push when `push_to_hub` is set,
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


def check_merge(trainer, script_args):
    """Check before training that what `--merge` asks for is possible.

    Raises:
        ValueError: the adapter that trains can't be merged.
    """
    model = getattr(trainer.model, "policy", trainer.model)
    if getattr(script_args, "merge", False) and isinstance(model, PeftModel) and not can_merge(model):
        kind = model.active_peft_config.peft_type.value
        raise ValueError(f"merge: an adapter of the kind {kind} can't be merged: leave merge out, or train LoRA.")


def _merge(trainer, output_dir):
    if not (output_dir / "adapter_config.json").exists():
        trainer.accelerator.print(f"--merge: {output_dir} already holds a whole model, there is nothing to merge.")
        return
    if is_deepspeed_zero3_enabled():
        unset_hf_deepspeed_config()  # the main process loads the merged model whole, the others do not take part
    if trainer.is_world_process_zero():
        merge_adapter(str(output_dir), str(output_dir / "merged"))
    trainer.accelerator.wait_for_everyone()
