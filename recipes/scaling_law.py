r"""Train models of several sizes and token counts, fit Chinchilla's law to the losses, print the best use of a budget.

The embedded default, 10 to 250 thousand parameters on the bytes of Python's documentation, takes minutes on a CPU:
    python recipes/scaling_law.py
Your own text and sizes; the same command again continues after the last finished run:
    accelerate launch recipes/scaling_law.py --dataset_name corpus/ --vocab_size 8192 --output_dir output/mine \
        --hidden_sizes 256 384 512 768 --ladder_budgets 1e15 3e15 1e16 --budget 1e18
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from lifecycle_hf import PretrainingConfig, cli
from lifecycle_hf.data.corpora import encode_corpus, train_tokenizer
from lifecycle_hf.models.loading import load_tokenizer
from lifecycle_hf.scaling import fit_scaling_law, plan_ladder
from lifecycle_hf.scaling.fit import FEWEST
from lifecycle_hf.scaling.law import COLUMNS, short_count, short_flops
from lifecycle_hf.scaling.points import load_runs, read_points, save_runs, tell
from lifecycle_hf.trainers.supervised.base import own_copy
from lifecycle_hf.trainers.supervised.pretraining import PretrainingTrainer, new_model, row_plan

OF_TEXT = ("dataset_name", "tokenizer_name", "vocab_size")
OF_TRAINING = ("objective", "max_length", "learning_rate", "train_batch_size", "gradient_accumulation_steps", "seed")


@dataclass
class ScalingArguments(cli.RecipeArguments):
    """Hold the corpus, the ladder, and the budgets to advise on."""

    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer; by default a new one."})
    vocab_size: int = field(default=258, metadata={"help": "Size of a new tokenizer; 258 are the bytes alone."})
    hidden_sizes: list[int] = field(default_factory=list, metadata={"help": "Widths, multiples of 16 (one head)."})
    ladder_budgets: list[float] = field(default_factory=list, metadata={"help": "FLOPs 6·N·D of the runs to train."})
    max_epochs: float = field(default=3, metadata={"help": "Leave out runs that read the corpus more often."})
    budget: list[float] | None = field(default=None, metadata={"help": "Budgets in FLOPs; by default the ladder's."})
    bootstrap: int = field(default=1000, metadata={"help": "Number of resamples that make the intervals."})


def model_of(width, args, tokenizer):
    sizes = {"hidden_size": width, "num_hidden_layers": max(2, width // 48), "intermediate_size": 8 * round(width / 3)}
    return new_model(args, tokenizer, **sizes, num_attention_heads=width // 16, num_key_value_heads=width // 16)


def plan(script_args, args, tokenizer, corpus_tokens):
    """Return the runs of the ladder; their tokens fill whole optimizer steps."""
    with torch.device("meta"):
        width_of = {model_of(width, args, tokenizer).num_parameters(): width for width in script_args.hidden_sizes}
    per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size * args.max_length
    ladder = plan_ladder(script_args.ladder_budgets, width_of, most_tokens=script_args.max_epochs * corpus_tokens)
    if len(ladder) < FEWEST:
        raise ValueError(f"ladder_budgets: {len(ladder)} runs are planned, the law needs {FEWEST}. Give more budgets.")
    runs = [(n, width_of[n], max(1, round(d / per_step))) for n, d in ladder]
    return [{"parameters": n, "tokens": s * per_step, "hidden_size": w, "steps": s} for n, w, s in runs]


def train(run, args, tokenizer, data):
    """Return the held-out loss of a run; it continues from its last checkpoint if there is one."""
    folder = Path(args.output_dir) / f"width{run['hidden_size']}-steps{run['steps']}"
    args = own_copy(args, output_dir=str(folder), max_steps=run["steps"])
    trainer = PretrainingTrainer(model_of(run["hidden_size"], args, tokenizer), args, *data, tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.is_dir() else None)
    return trainer.evaluate()["eval_loss"]


def main(script_args, args):
    splits = cli.load_splits(script_args, "pretrain")
    text, name, folder = args.dataset_text_field, script_args.tokenizer_name, Path(args.output_dir)
    tokenizer = load_tokenizer(name) if name else train_tokenizer(splits[0][text], script_args.vocab_size)
    row_plan(args, tokenizer, seq2seq=False)  # adds the objective's tokens, whose embeddings count
    data = [encode_corpus(rows, tokenizer, field=text, where=script_args.dataset_name) for rows in splits]
    settings = {key: getattr(script_args, key) for key in OF_TEXT} | {key: getattr(args, key) for key in OF_TRAINING}
    settings["corpus_tokens"] = sum(map(len, data[0]["input_ids"]))
    runs, rows = plan(script_args, args, tokenizer, settings["corpus_tokens"]), load_runs(folder, settings)
    for run in rows + [run for run in runs if not any(run.items() <= row.items() for row in rows)]:
        if "loss" not in run:
            run |= {"loss": train(run, args, tokenizer, data), "settings": settings}
            rows.append(run)
        n, d, loss = (run[column] for column in COLUMNS)
        if args.should_save:
            save_runs(folder, rows)
            sizes = f"{short_count(n)} parameters, {short_count(d)} tokens ({d / n:.3g} each)"
            print(f"{sizes}, {short_flops(6 * n * d)} FLOPs: loss {loss:.4f}", flush=True)
    if args.should_save:
        points = read_points(folder / "points.jsonl")
        law = fit_scaling_law(*points, bootstrap=script_args.bootstrap)
        told = tell(law, points, script_args.budget, folder / "isoflop.png", folder / "law.json")
        cli.write_report(told | {"runs": rows}, folder)
        print(f"isoflop.png, points.jsonl, law.json and report.json are in {folder}")


if __name__ == "__main__":
    default = Path(__file__).parent / "configs" / "scaling_law_python.yaml"
    main(*cli.parse((ScalingArguments, PretrainingConfig), default, description=__doc__))
