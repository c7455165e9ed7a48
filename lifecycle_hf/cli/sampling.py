"""What recipes do that sample several completions of a prompt: draw them, tell what N buys, train on the best."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset
from trl import get_quantization_config

from lifecycle_hf.cli.arguments import (
    RecipeArguments,
    adapter_config,
    load_splits,
    model_init_kwargs,
    resolve_model,
    resolve_reward,
)
from lifecycle_hf.cli.running import check_merge, finish, monitor_tax
from lifecycle_hf.completions.best_of_n import SAMPLES, BestOfN, best_of_n, kl_bound
from lifecycle_hf.data.json_lines import read_samples
from lifecycle_hf.evaluation.bootstrap import Measurement, bootstrap_interval
from lifecycle_hf.evaluation.pictures import plot_overoptimization
from lifecycle_hf.evaluation.report import write_report
from lifecycle_hf.models.loading import load_causal_lm, load_tokenizer
from lifecycle_hf.scaling.tables import markdown_table
from lifecycle_hf.trainers.supervised.sft import SFTTrainer


@dataclass
class BestOfNArguments(RecipeArguments):
    """Hold the prompts, the rewards and the sampling of the run."""

    reward_funcs: list[str] = field(
        default_factory=list, metadata={"help": "Reward models by name or path, and functions as MODULE:FUNCTION."}
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each; 1 by default. One of weight 0 is measured, not chosen by."}
    )
    num_generations: int = field(default=8, metadata={"help": "Completions N of each prompt."})
    rows: int | None = field(default=None, metadata={"help": "Prompts of each round; all, by default."})
    max_prompt_length: int = field(default=512, metadata={"help": "Drop prompts with more tokens than this."})
    max_completion_length: int = field(default=256, metadata={"help": "Maximum number of tokens in a completion."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature."})
    missing_eos_penalty: float = field(
        default=0.0, metadata={"help": "Subtracted from the score of a completion without a stop token."}
    )
    generation_batch_size: int = field(default=8, metadata={"help": "Prompts decoded together, each N times."})
    train: bool = field(default=False, metadata={"help": "Fine-tune on the winners: rejection sampling."})
    measure_rows: int = field(
        default=128, metadata={"help": "With --train: held-out prompts and texts measured before and after."}
    )
    rounds: int = field(default=1, metadata={"help": "With --train: how often to sample and fine-tune."})


def sample_and_train(script_args: BestOfNArguments, args, model_args) -> None:
    """Sample the best of N, tell what N buys, and with `train` fine-tune on the winners, `rounds` times.

    Each round has other prompts, and samples from the model of the round before. A round that is complete is not made
    again. The last model is in `output_dir`, each round's samples in `output_dir/round_R`.
    """
    folder, rounds = Path(args.output_dir), script_args.rounds if script_args.train else 1
    if script_args.rounds > 1 and not script_args.train:
        raise ValueError(f"rounds={script_args.rounds} has no effect without --train: set it, or leave rounds out.")
    train, _ = load_splits(script_args, "ppo")
    size = min(script_args.rows or len(train), len(train) // rounds)
    model = resolve_model(model_args.model_name_or_path, "sft")
    for number in range(rounds):
        rows, where = train.select(range(number * size, (number + 1) * size)), folder / f"round_{number + 1}"
        found = sample_best(script_args, model_args, model, rows, where, args.seed + number)
        if not script_args.train:
            return
        last = number == rounds - 1
        model = tune_on_winners(script_args, args, model_args, model, found, folder if last else where / "model")


def sample_best(script_args, model_args, model: str, rows: Dataset, folder: Path, seed: int) -> BestOfN:
    """Sample N completions of each row on all processes, write them with their curves to `folder`, return them all."""
    state, names = PartialState(), [resolve_reward(name) for name in script_args.reward_funcs]
    quantization = get_quantization_config(model_args)
    policy = load_causal_lm(model, quantization_config=quantization, init_kwargs=model_init_kwargs(model_args))
    policy = (policy if quantization else policy.to(state.device)).eval()
    found = best_of_n(
        policy, load_tokenizer(model), rows, names, output_dir=folder, n=script_args.num_generations,
        reward_weights=script_args.reward_weights, max_prompt_length=script_args.max_prompt_length,
        max_completion_length=script_args.max_completion_length, temperature=script_args.temperature,
        missing_eos_penalty=script_args.missing_eos_penalty, batch_size=script_args.generation_batch_size, seed=seed,
        rank=state.process_index, world_size=state.num_processes,
    )  # fmt: skip
    state.wait_for_everyone()
    files = [folder / SAMPLES.format(rank=rank) for rank in range(state.num_processes)]
    parts = [row for file in files for row in read_samples(file)]
    everything = BestOfN(sorted(parts, key=lambda row: row["index"]), found.weights)
    if state.is_main_process:
        print(report_best(everything, folder))
    return everything


def report_best(found: BestOfN, folder: Path) -> str:
    """Write report.json and best_of_n.png of the curves, and return them as a table with 95 % intervals."""
    curves, n = found.curves(), found.total.shape[1]
    shown = sorted({2**k for k in range(n.bit_length()) if 2**k < n} | {n})
    measured = {name: [Measurement(curve[:, k - 1].tolist()) for k in shown] for name, curve in curves.items()}
    cells = [
        [str(k), f"{kl_bound(k):.2f}", *(_with_interval(values[i]) for values in measured.values())]
        for i, k in enumerate(shown)
    ]
    bounds = [kl_bound(k) for k in range(1, n + 1)]
    means = {name: curve.mean(0).tolist() for name, curve in curves.items()}
    write_report({"kl_bound": bounds} | means, folder)
    plot_overoptimization(bounds, means, folder / "best_of_n.png", title=f"Best of n, {len(found.rows)} prompts")
    headings = ["n", "KL at most (nats)", *(f"{name} ↑" for name in measured)]
    return f"{markdown_table(headings, cells)}\nThe samples, report.json and best_of_n.png are in {folder}"


def _with_interval(value: Measurement) -> str:
    if len(value.columns) < 2:
        return f"{float(value):.3f}"
    return f"{float(value):.3f} ({' to '.join(f'{end:.3f}' for end in bootstrap_interval(value))})"


def tune_on_winners(script_args, args, model_args, model: str, found: BestOfN, folder: Path) -> str:
    """Fine-tune a model on the winners, unless `folder` has the result already, and return its folder."""
    if (folder / "README.md").exists():  # which is written last
        return str(folder)
    winners = found.winners()
    if len(winners) < 2:
        raise ValueError(
            f"{len(winners)} of {len(found.rows)} winners end with a stop token, too few to train on: raise "
            f"max_completion_length (now {script_args.max_completion_length}) or missing_eos_penalty (now "
            f"{script_args.missing_eos_penalty}), or take more prompts."
        )
    held_out = max(1, len(winners) // 20)
    args = replace(args, output_dir=str(folder))
    trainer = SFTTrainer(
        model, args, winners.select(range(held_out, len(winners))), eval_dataset=winners.select(range(held_out)),
        peft_config=adapter_config(script_args, model_args), quantization_config=get_quantization_config(model_args),
    )  # fmt: skip
    check_merge(trainer, script_args)
    trainer.dataset_name = script_args.dataset_name
    monitor_tax(trainer, script_args, 0, {"loss of held-out winners": ("eval_loss", False)})
    trainer.train()
    tax = trainer.tax_report
    finish(trainer, script_args, tax.to_json())
    trainer.accelerator.print(f"{tax.to_terminal()}\nThe model is in {folder}")
    return str(folder)
