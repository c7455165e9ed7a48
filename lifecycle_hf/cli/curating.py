"""What the recipe of curation does: make the blocks, train what they need, curate, and tell what was found."""

import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from lifecycle_hf.curation import (
    LanguageFilter,
    MinHashDedup,
    PerplexityFilter,
    PIIRemover,
    QualityClassifier,
    QualityRules,
    SubstringDedup,
    ToxicityFilter,
    UrlFilter,
    curate,
    funnel_table,
)
from lifecycle_hf.curation.reading import COLUMNS, Fault, input_files, read_documents
from lifecycle_hf.data.corpora import train_tokenizer
from lifecycle_hf.data.json_lines import check_settings, read_samples, write_samples, write_whole
from lifecycle_hf.data.loading import find_splits
from lifecycle_hf.scaling.tables import terminal_table
from lifecycle_hf.toyworld import crawl
from lifecycle_hf.trainers.supervised.pretraining import PretrainingConfig, PretrainingTrainer, new_model

GROUPS = ("gopher_quality", "gopher_repetition", "c4")
SMALL = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 344}  # fmt: skip
"""Sizes of a new reference model."""


LEARNT_FROM = (
    "dataset_name", "trusted_dataset", "untrusted_dataset", "sample_size", "reference_model", "reference_steps",
    "perplexity_upper", "seed",
)  # fmt: skip
"""Options that decide what blocks learn."""


@dataclass
class CurationArguments:
    """Hold the input, the steps and their options, and the folder of the results."""

    dataset_name: str = field(
        default="python",
        metadata={
            "help": "Input, also as the first argument: a file or folder of JSON lines, CSV, Parquet, WARC or text, "
            "also with .gz or .zst; `python` is a small crawl with known faults."
        },
    )
    output_dir: str = field(default="output/curate", metadata={"help": "Folder of the clean corpus and the report."})
    steps: list[str] = field(
        default_factory=lambda: ["url", "rules", "pii", "quality", "minhash", "substring"],
        metadata={
            "help": "Steps in their order: url rules pii quality minhash substring perplexity toxicity language."
        },
    )
    workers: int = field(default=1, metadata={"help": "Local processes."})
    tasks: int = field(default=8, metadata={"help": "Parts that the corpus is cut into."})
    executor: str | None = field(
        default=None, metadata={"help": "MODULE:FUNCTION that makes datatrove's executor, as for Slurm or Ray."}
    )
    output_format: str = field(default="parquet", metadata={"help": "Of the data.", "choices": ("parquet", "jsonl")})
    text_column: str = field(default="text", metadata={"help": "Column of the text."})
    id_column: str = field(default="id", metadata={"help": "Column of the id, if there is one."})
    url_column: str = field(default="url", metadata={"help": "Column of the URL, if there is one."})
    domain_column: str = field(default="domain", metadata={"help": "Column of the domain, if there is one."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Counts tokens; else words and signs count."})
    strict_data: bool = field(default=False, metadata={"help": "Stop at the first row that can't be used."})
    blocked_domains: str | None = field(default=None, metadata={"help": "url: file with more domains, one in a line."})
    rules: list[str] = field(
        default_factory=lambda: list(GROUPS[:2]), metadata={"help": f"rules: groups of {', '.join(GROUPS)}."}
    )
    trusted_dataset: str | None = field(
        default=None, metadata={"help": "quality, perplexity: text to learn from; a file, folder or Hub name."}
    )
    untrusted_dataset: str | None = field(
        default=None, metadata={"help": "quality: text to tell it from; a sample of the input by default."}
    )
    quality_model: str | None = field(
        default=None, metadata={"help": "quality: a sequence classifier or a saved one, instead of a trained one."}
    )
    quality_threshold: float = field(default=0.5, metadata={"help": "quality: lowest probability that is kept."})
    quality_pareto: float | None = field(
        default=None, metadata={"help": "quality: α of GPT-3's sampling, instead of the threshold."}
    )
    similarity: float = field(default=0.8, metadata={"help": "minhash: Jaccard similarity of near duplicates."})
    run_length: int = field(default=50, metadata={"help": "substring: words of the shortest run that is cut."})
    reference_model: str | None = field(
        default=None, metadata={"help": "perplexity: a causal LM, instead of a small one trained on the trusted text."}
    )
    reference_steps: int = field(default=300, metadata={"help": "perplexity: optimizer steps of the small one."})
    perplexity_upper: float = field(default=0.9, metadata={"help": "perplexity: quantile of a domain that is kept."})
    toxicity_model: str | None = field(default=None, metadata={"help": "toxicity: a sequence classifier."})
    toxicity_label: str = field(default="toxic", metadata={"help": "toxicity: its name of the toxic class."})
    toxicity_threshold: float = field(default=0.5, metadata={"help": "toxicity: probability that is removed."})
    language_model: str | None = field(default=None, metadata={"help": "language: file of a fastText model."})
    languages: list[str] = field(default_factory=lambda: ["en"], metadata={"help": "language: those to keep."})
    sample_size: int = field(default=2000, metadata={"help": "Documents of the input that blocks learn from."})
    seed: int = field(default=0, metadata={"help": "Seed of draws and training."})


def curate_and_report(args: CurationArguments) -> dict:
    """Curate the input, print what is left after each step and in the embedded crawl what was found, and return it."""
    folder, embedded = Path(args.output_dir), args.dataset_name == "python"
    source = _write_crawl(folder, args.seed) if embedded else Path(args.dataset_name)
    columns = {name: getattr(args, f"{name}_column") for name in COLUMNS}
    blocks = Blocks(args, source, columns).make()
    report = curate(
        source, folder, blocks, workers=args.workers, tasks=args.tasks, columns=columns,
        output_format=args.output_format, tokenizer=args.tokenizer_name, strict_data=args.strict_data,
        executor=_imported(args.executor) if args.executor else None,
    )  # fmt: skip
    print(funnel_table(report))
    if embedded:
        print(_planted_table(folder, source, [block.name for block in blocks]))
    print(f"The corpus is in {folder}/data, what was removed with its reasons in {folder}/removed. Train on it by\n"
          f"  python recipes/pretrain.py --dataset_name {folder}")  # fmt: skip
    return report


class Blocks:
    """Make the blocks of a recipe, and train what they need; what is trained is kept in `output_dir/models`.

    Args:
        source: the input.
        columns: names of its columns.
    """

    def __init__(self, args: CurationArguments, source: Path, columns: dict[str, str]):
        self.args, self.source, self.columns = args, source, columns
        self.models = Path(args.output_dir) / "models"

    def make(self) -> list:
        """Return the blocks of the steps.

        Raises:
            ValueError: a step is unknown, or lacks its model or trusted text.
        """
        args = self.args
        makers = {
            "url": lambda: UrlFilter(domains=args.blocked_domains or ()),
            "rules": lambda: QualityRules(**{group: group in args.rules for group in GROUPS}),
            "pii": PIIRemover,
            "quality": self._quality,
            "minhash": lambda: MinHashDedup(threshold=args.similarity),
            "substring": lambda: SubstringDedup(args.run_length),
            "perplexity": self._perplexity,
            "toxicity": lambda: ToxicityFilter(
                self._needed("toxicity_model"), args.toxicity_threshold, label=args.toxicity_label
            ),
            "language": lambda: LanguageFilter(self._needed("language_model"), args.languages),
        }
        for option, given, known in (("steps", args.steps, makers), ("rules", args.rules, GROUPS)):
            if unknown := [name for name in given if name not in known]:
                raise ValueError(f"{option}: {unknown[0]!r} is unknown, known are {', '.join(known)}.")
        if {"quality", "perplexity"} & set(args.steps):
            check_settings(self.models / "settings.json", {name: getattr(args, name) for name in LEARNT_FROM})
        return [makers[name]() for name in args.steps]

    def _needed(self, option: str) -> str:
        value = getattr(self.args, option)
        if not value:
            step = option.partition("_")[0]
            raise ValueError(f"The step {step!r} needs {option}: give it, or leave the step out of steps.")
        return value

    def _trusted(self) -> list[str]:
        if self.args.dataset_name == "python":
            return crawl.trusted()
        if not self.args.trusted_dataset:
            raise ValueError(
                "The steps quality and perplexity need trusted_dataset, such as articles of an encyclopedia: give it, "
                "or leave them out of steps."
            )
        return _texts(self.args.trusted_dataset)

    def _untrusted(self) -> list[str]:
        if self.args.dataset_name == "python":
            return crawl.junk()
        return _texts(self.args.untrusted_dataset) if self.args.untrusted_dataset else self._sample()[0]

    def _sample(self) -> tuple[list[str], list[str | None]]:
        """Return the texts and domains of documents of the input, taken evenly from its files."""
        files, root = input_files(self.source)[0], self.source if self.source.is_dir() else self.source.parent
        found = read_documents(files, root, 0, min(8, 2 * len(files)), self.columns)
        rows = list(islice((row for _, row in found if not isinstance(row, Fault)), self.args.sample_size))
        return [row["text"] for row in rows], [row["domain"] for row in rows]

    def _quality(self) -> QualityClassifier:
        args, folder = self.args, self.models / "quality"
        options = {"threshold": args.quality_threshold, "pareto": args.quality_pareto, "seed": args.seed}
        if args.quality_model:
            return QualityClassifier(args.quality_model, **options)
        if not (folder / "quality.json").exists():
            sides = self._trusted(), self._untrusted()
            size = min(map(len, sides))  # as many of each, so that P = 1/2 means as likely in one as in the other
            sides = [[side[i * len(side) // size] for i in range(size)] for side in sides]
            QualityClassifier.train(*sides, seed=args.seed).save(folder)
        block = QualityClassifier(folder, **options)
        print("Quality classifier on held-out text: AUC {auc:.3f}, ECE {ece:.3f}".format(**block.report))
        return block

    def _perplexity(self) -> PerplexityFilter:
        folder = self.args.reference_model or str(self.models / "reference")
        if not self.args.reference_model and not (Path(folder) / "README.md").exists():
            train_reference(self._trusted(), folder, self.args.reference_steps, self.args.seed)
        kept = self.models / "thresholds.json"
        if not kept.exists():
            block = PerplexityFilter(folder, upper=self.args.perplexity_upper).fit(*self._sample())
            write_whole(kept, json.dumps(block.thresholds).encode())
        thresholds = json.loads(kept.read_text())
        return PerplexityFilter(folder, upper=self.args.perplexity_upper, thresholds=thresholds)


def train_reference(texts: list[str], folder: str, steps: int, seed: int) -> None:
    """Train a small causal LM and its tokenizer on texts, and save both."""
    from datasets import Dataset

    tokenizer = train_tokenizer(texts, 4096)
    args = PretrainingConfig(
        folder, objective="causal", max_length=256, max_steps=steps, per_device_train_batch_size=16, seed=seed,
        learning_rate=2e-3, warmup_steps=20, save_strategy="no", report_to="none", logging_steps=50,
    )  # fmt: skip
    trainer = PretrainingTrainer(
        new_model(args, tokenizer, **SMALL), args, Dataset.from_dict({"text": texts}), None, tokenizer
    )
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()


def _texts(name: str) -> list[str]:
    """Return the texts of a dataset."""
    rows = next(iter(find_splits(name, "pretrain").values()))
    if "text" not in rows.column_names:
        raise ValueError(f"{name} has the columns {rows.column_names}, and needs text. Rename the column.")
    return list(rows["text"])


def _write_crawl(folder: Path, seed: int) -> Path:
    path = folder / "crawl.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_samples(path, crawl.crawl(seed))
    return path


def _planted_table(folder: Path, source: Path, steps: list[str]) -> str:
    def rows(pattern):
        return [json.loads(line) for path in folder.glob(pattern) for line in path.open(encoding="utf-8")]

    kept = find_splits(str(folder), "")["train"]
    removed = {step: {row["id"] for row in rows(f"removed/{step}/*.jsonl") if "start" not in row} for step in steps}
    table = crawl.found(read_samples(source), dict(zip(kept["id"], kept["text"])), removed)
    headings = ["planted", "step", "number", "found", "clean documents removed by the step"]
    cells = [[str(cell) for cell in row] for row in table]
    return terminal_table(headings, cells, left=headings[1:2], title="What was planted, and what was found")


def _imported(name: str) -> Callable:
    module, _, function = name.partition(":")
    sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"executor: {name!r} can't be imported ({error}): give MODULE:FUNCTION.") from error
