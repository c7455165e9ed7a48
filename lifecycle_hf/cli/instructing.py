"""What the recipe of instruction tuning does: build the mixture, tell what it holds, train, and measure the tasks."""

import copy
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path

from trl import get_quantization_config

from lifecycle_hf.cli.arguments import RecipeArguments, adapter_config, model_init_kwargs, resolve_model
from lifecycle_hf.cli.running import train_and_report
from lifecycle_hf.data.collators import shuffled
from lifecycle_hf.data.instruction_tasks import InstructionTask
from lifecycle_hf.data.mixing import InstructionMixture
from lifecycle_hf.evaluation.instructions import evaluate_tasks
from lifecycle_hf.evaluation.pictures import plot_mixture
from lifecycle_hf.evaluation.report import mixture_table
from lifecycle_hf.models.loading import load_tokenizer
from lifecycle_hf.toyworld import instructions
from lifecycle_hf.trainers.base.callbacks import TaxMonitor
from lifecycle_hf.trainers.supervised.sft import SFTTrainer


@dataclass
class InstructArguments(RecipeArguments):
    """Hold the mixture of tasks, and what is measured of them."""

    temperature: float | None = field(
        default=None, metadata={"help": "τ: tasks are drawn with shares ∝ min(rows, cap)^(1/τ); `inf` is uniform."}
    )
    cap: int | None = field(default=None, metadata={"help": "Most rows of a task that count for its share."})
    cot_ratio: float | None = field(
        default=None, metadata={"help": "Probability of a chain of thought where a row has one."}
    )
    templates: bool | None = field(default=None, metadata={"help": "False: no task is worded by templates."})
    system_prompt: str | None = field(default=None, metadata={"help": "System message of all chats without one."})
    held_out: list[str] | None = field(
        default=None, metadata={"help": "Families of tasks that are measured and never trained on."}
    )
    shots: list[int] = field(
        default_factory=lambda: [0, 2], metadata={"help": "Examples shown before a question when tasks are measured."}
    )
    measure_steps: int = field(
        default=0, metadata={"help": "Measure the tasks every X optimizer steps beside both ends; 0: ends alone."}
    )
    measure_rows: int = field(default=32, metadata={"help": "Held-out rows of each task that are asked."})
    max_new_tokens: int = field(default=64, metadata={"help": "Most tokens of an answer that is measured."})


def instruct(script_args: InstructArguments, args, model_args) -> None:
    """Train on a mixture of instruction tasks, and measure held-out rows of its tasks and of held-out families."""
    model = resolve_model(model_args.model_name_or_path, "sft")
    options = ("temperature", "cap", "cot_ratio", "templates", "system_prompt", "held_out")
    options = {name: getattr(script_args, name) for name in options if getattr(script_args, name) is not None}
    mixture, tests = load_mixture(script_args.dataset_name, script_args.measure_rows, options | {"seed": args.seed})
    if args.max_steps <= 0:
        raise ValueError("max_steps is missing: a mixture has no end, so give the number of optimizer steps.")
    draws = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    tokenizer = load_tokenizer(model)
    report = mixture.report(draws, tokenizer)
    args.model_init_kwargs = model_init_kwargs(model_args) | (args.model_init_kwargs or {})
    trainer = SFTTrainer(
        model, args, mixture.dataset(draws) if args.packing else mixture.stream(draws),
        peft_config=adapter_config(script_args, model_args), quantization_config=get_quantization_config(model_args),
    )  # fmt: skip
    if trainer.is_world_process_zero():
        print(mixture_table(report, terminal=True, title="The mixture"))
        plot_mixture(report, Path(args.output_dir) / "mixture.png")
    measured = {"shots": script_args.shots, "rows": script_args.measure_rows}
    measured |= {"max_new_tokens": script_args.max_new_tokens, "batch_size": args.per_device_eval_batch_size}
    names = {task.name for task in mixture.held_out}

    def metrics(model, tokenizer):
        found = {}
        for kind in ("held out", "trained"):
            asked = [task for task in tests if (task["name"] in names) == (kind == "held out")]
            values = evaluate_tasks(model, tokenizer, asked, **measured).values() if asked else {}
            found |= {row_name(kind, name): value for name, value in values.items() if not name.startswith("task/")}
        return found

    rows = {("held out" if task["name"] in names else "trained", task["family"]) for task in tests}
    rows = sorted({(kind, f"family/{family}") for kind, family in rows} | {(kind, "mean") for kind, _ in rows})
    shown = {row_name(kind, f"{row}/{k}-shot"): True for kind, row in rows for k in script_args.shots}
    TaxMonitor(metrics, script_args.measure_steps or None, shown).attach(trainer)
    train_and_report(trainer, script_args, dict, title="Tasks by instruction: means of families")


def row_name(kind: str, name: str) -> str:
    """Return the label of a score of [`evaluate_tasks`]: "held out: animals, 0-shot" of "family/animals/0-shot"."""
    return f"{kind}: {name.removeprefix('family/').replace('/', ', ')}"


def load_mixture(name: str | None, rows: int, options: dict) -> tuple[InstructionMixture, list[dict]]:
    """Return a mixture without its held-out rows, and what [`evaluate_tasks`] asks: of each task `rows` held-out rows.

    Args:
        name: `toyworld`, or a YAML file of [`InstructionMixture.from_yaml`].
        options: of the mixture, which replace those of the file.

    Raises:
        ValueError: there is no such file, or one of its options is not valid.
    """
    if name == "toyworld":
        tasks = list(map(instructions.instruction_task, instructions.TASKS))
        mixture = InstructionMixture(tasks, **{"held_out": instructions.HELD_OUT} | options)
        held = {task: instructions.instruction_rows(task, held_out=True) for task in instructions.TASKS}
    elif name and Path(name).suffix in (".yaml", ".yml"):
        whole = InstructionMixture.from_yaml(name, **options)
        used = [task for task in whole.tasks if len(task)]
        parts = {task.name: split_rows(task, rows) for task in used}
        held = {name: test for name, (_, test) in parts.items()}
        held |= {task.name: task.rows for task in whole.held_out}
        kept = [with_rows(task, parts[task.name][0]) for task in used] + whole.held_out
        chains = whole.cot_ratio if any(row["chains"] for row in whole.report(1)) else None
        families = sorted({task.family for task in whole.held_out})
        with warnings.catch_warnings():  # dropped rows have been told
            warnings.simplefilter("ignore")
            mixture = replace(whole, tasks=kept, held_out=families, cot_ratio=chains)
    else:
        raise ValueError(f"dataset_name={name!r}: give the YAML file of a mixture (docs/instruction_tuning.md).")
    return mixture, [_as_test(task, held[task.name]) for task in (*mixture.tasks, *mixture.held_out)]


def split_rows(task: InstructionTask, most: int):
    """Return (rows to train on, held-out rows) of a task: of these `most`, or a fifth of its rows if that is fewer."""
    order = shuffled(len(task.rows), 0)
    size = min(most, len(task.rows) // 5)
    return task.rows.select(sorted(order[size:])), task.rows.select(sorted(order[:size]))


def with_rows(task: InstructionTask, rows) -> InstructionTask:
    """Return the task with other rows."""
    other = copy.copy(task)
    other.rows = rows
    vars(other).pop("checked", None)
    return other


def _as_test(task: InstructionTask, rows) -> dict:
    """Return the rows of a task in the first of its templates, for [`evaluate_tasks`]."""
    asked = with_rows(task, rows)
    return {"name": task.name, "family": task.family, "rows": [asked.example(i) for i in range(len(asked))]}
