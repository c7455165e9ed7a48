"""What the recipe of constitutional AI does: revise answers, learn them, label pairs, and train on the labels."""

import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset

from lifecycle_hf import toyworld
from lifecycle_hf.cli.arguments import resolve_model
from lifecycle_hf.completions.judges import LanguageModelJudge, ServerJudge
from lifecycle_hf.completions.server import ChatServer
from lifecycle_hf.data.json_lines import write_samples
from lifecycle_hf.data.loading import load_splits
from lifecycle_hf.data.schemas import to_prompts
from lifecycle_hf.evaluation.report import write_report
from lifecycle_hf.models.loading import load_causal_lm, load_tokenizer
from lifecycle_hf.scaling.tables import terminal_table
from lifecycle_hf.synthesis import LocalWriter, Recorded, ServerWriter, label, load_constitution, revise
from lifecycle_hf.toyworld.critic import ToyCritic, judge_with_errors

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
STAGES = {"none": (), "sft": ("sft",), "reward": ("sft", "reward"), "dpo": ("sft", "dpo"),
          "ppo": ("sft", "reward", "ppo")}  # fmt: skip


@dataclass
class ConstitutionArguments:
    """Hold the model, the prompts, the principles and what is trained on the data."""

    model_name_or_path: str = field(default="toyworld", metadata={"help": "Model that answers, and that is trained."})
    dataset_name: str = field(default="toyworld", metadata={"help": "Prompts: a file, a folder or a Hub name."})
    output_dir: str = field(default="output/constitution", metadata={"help": "Folder of data, models and report."})
    principles: str | None = field(
        default=None, metadata={"help": "YAML file of principles; a default set otherwise."}
    )
    rows: int = field(default=512, metadata={"help": "Prompts whose answers are revised, and as many for the pairs."})
    rounds: int = field(default=1, metadata={"help": "Critiques and revisions of each answer."})
    max_tokens: int = field(default=128, metadata={"help": "Most tokens of an answer, a critique or a revision."})
    temperature: float = field(default=0.7, metadata={"help": "Sampling temperature."})
    batch_size: int = field(default=8, metadata={"help": "Chats that a local model answers together."})
    server_url: str | None = field(
        default=None, metadata={"help": "OpenAI-compatible server that criticises, revises and judges, up to /v1."}
    )
    server_model: str | None = field(default=None, metadata={"help": "Name of the server's model."})
    error_rate: float = field(
        default=0.2, metadata={"help": "Toy world: share of the pairs that the judge gets wrong."}
    )
    train: str = field(
        default="dpo",
        metadata={"help": "Train up to this stage by the recipes of its name.", "choices": tuple(STAGES)},
    )
    stage_options: list[str] = field(
        default_factory=list, metadata={"help": "Options of the stages, each as STAGE:OPTION=VALUE."}
    )
    launcher: str = field(
        default="", metadata={"help": "Command that starts the stages, such as 'accelerate launch'; Python otherwise."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of draws and sampling."})


def constitute(args: ConstitutionArguments) -> None:
    """Write SFT data by critique and revision, train on it, label pairs of the new model, and train on the labels.

    Whatever is complete in `output_dir` is not made again. Each stage of training is a command of another recipe; it
    is printed.
    """
    folder, stages = Path(args.output_dir), STAGES[args.train]
    options = stage_options(args.stage_options)
    principles = load_constitution(args.principles)
    if args.dataset_name == "toyworld":
        principles = [principle for principle in principles if principle.name in ("harmless", "helpful", "polite")]
    prompts = to_prompts(load_splits(args.dataset_name, "ppo")[0], "dataset_name").select_columns(["prompt"])
    if len(prompts) < 2:
        raise ValueError(f"{args.dataset_name} has {len(prompts)} prompts: one half is for revisions, one for pairs.")
    size = min(args.rows, len(prompts) // 2)
    model = resolve_model(args.model_name_or_path, "sft")
    given = {"max_tokens": args.max_tokens, "temperature": args.temperature}
    writer, judge = writer_and_judge(args, model, principles)
    found = revise(
        writer, prompts.select(range(size)), principles, output_dir=folder, rounds=args.rounds, seed=args.seed, **given
    )
    write_samples(folder / "sft.jsonl", found.sft_rows().to_list())
    report = {"prompts": size, "revised": len(found.rows), "dropped": dict(found.dropped)}
    report["changed"] = sum(row["answers"][0] != row["answers"][-1] for row in found.rows)
    if stages:
        train_stage("sft", args, model, folder / "sft.jsonl", folder / "sft", options)
        model = str(folder / "sft")
    rows = prompts.select(range(size, 2 * size))
    pairs = sample_pairs(LocalWriter(model, batch_size=args.batch_size), rows, folder, args.seed, given)
    preferences, dropped = label(judge, rows, pairs, principles, output_dir=folder, seed=args.seed)
    write_samples(folder / "preferences.jsonl", preferences.to_list())
    report |= {"pairs": len(pairs), "labelled": len(preferences), "no_pair": dict(dropped)}
    write_report(report, folder)
    print_report(report, found, folder)
    for stage in stages[1:]:
        data = args.dataset_name if stage == "ppo" else folder / "preferences.jsonl"
        rewards = {"reward_funcs": folder / "reward"} if stage == "ppo" else {}
        train_stage(stage, args, model, data, folder / stage, options, rewards)
    if args.dataset_name == "toyworld":
        measure_stages({"start": resolve_model(args.model_name_or_path, "sft")} | {s: folder / s for s in stages})


def measure_stages(models: dict[str, str | Path]) -> None:
    """Print what each model of the toy world does on 256 held-out requests."""
    rows = []
    for stage, name in models.items():
        if stage != "reward":
            found = toyworld.measure(load_causal_lm(str(name)).eval(), load_tokenizer(str(name)), n=256)
            rows.append([stage, *(f"{float(found[metric]):.3f}" for metric in toyworld.HIGHER_IS_BETTER)])
    headings = [f"{name.replace('_', ' ')} {'↑' if up else '↓'}" for name, up in toyworld.HIGHER_IS_BETTER.items()]
    print(terminal_table(["stage", *headings], rows, title="The toy world's truth", caption=""))


def writer_and_judge(args: ConstitutionArguments, model: str, principles):
    """Return who criticises and revises, and who judges: the server, the model, or in the toy world the truth."""
    if (args.server_url is None) != (args.server_model is None):
        raise ValueError("server_url and server_model belong together: give both, or neither.")
    if args.server_url:
        server = ChatServer(args.server_url, args.server_model, cache=Path(args.output_dir) / "server.jsonl")
        return ServerWriter(server), ServerJudge(server)
    writer = LocalWriter(model, batch_size=args.batch_size)
    if args.dataset_name == "toyworld":
        return ToyCritic(writer, principles), judge_with_errors(args.error_rate)
    return writer, LanguageModelJudge(load_causal_lm(model).eval(), load_tokenizer(model))


def sample_pairs(writer, rows: Dataset, folder: Path, seed: int, options: dict) -> list[tuple[str, str]]:
    """Return two answers to each prompt, kept in `folder/pairs.jsonl` as they come."""
    write = Recorded(writer, folder / "pairs.jsonl")
    chats = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in rows["prompt"]]
    texts = write([chat for chat in chats for _ in range(2)], seed=seed, **options)
    return list(zip(texts[::2], texts[1::2], strict=True))


def stage_options(given: list[str]) -> dict[str, list[str]]:
    """Return {stage: words of its command line} of options as STAGE:OPTION=VALUE; a stage may be one that is not run.

    Raises:
        ValueError: one is written otherwise, or its stage is unknown.
    """
    words = {stage: [] for stages in STAGES.values() for stage in stages}
    for text in given:
        stage, _, rest = text.partition(":")
        name, equals, value = rest.partition("=")
        if stage not in words or not equals:
            raise ValueError(
                f"stage_options: {text!r} is not STAGE:OPTION=VALUE with one of the stages {', '.join(words)}."
            )
        words[stage] += [f"--{name}", value]
    return words


def train_stage(stage: str, args: ConstitutionArguments, model, data, output: Path, options, more=None) -> None:
    """Run the recipe of a stage, unless its folder is complete; the command is printed.

    Raises:
        RuntimeError: the recipe failed.
    """
    if (output / "README.md").exists():  # which is written last
        return
    given = {"model_name_or_path": model, "dataset_name": data, "output_dir": output, "seed": args.seed} | (more or {})
    words = [str(word) for name, value in given.items() for word in (f"--{name}", value)] + options[stage]
    command = [*(shlex.split(args.launcher) or [sys.executable]), str(RECIPES / f"{stage}.py"), *words]
    print(f"\n$ {shlex.join(command)}", flush=True)
    if subprocess.run(command).returncode:
        raise RuntimeError(f"The stage {stage} failed; its command stands above. The data is in {args.output_dir}.")


def print_report(report: dict, found, folder: Path) -> None:
    """Print what was written and dropped, and two answers before and after."""
    for name, value in report.items():
        told = ", ".join(f"{count} {what}" for what, count in value.items()) if isinstance(value, dict) else value
        print(f"{name.replace('_', ' ')}: {told or 'none'}")
    for row in [row for row in found.rows if row["answers"][0] != row["answers"][-1]][:2]:
        asked = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        print(f"\n{asked}\n  before: {row['answers'][0]}\n  {row['principles'][-1]}: {row['critiques'][-1]}")
        print(f"  after: {row['answers'][-1]}")
    print(f"\nThe data is in {folder}: sft.jsonl, preferences.jsonl, revised.jsonl with all texts, report.json")
