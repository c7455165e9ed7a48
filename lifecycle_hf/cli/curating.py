"""What the recipe of curation does: make the blocks of the steps, run them, and tell what was found."""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import load_dataset

from lifecycle_hf.curation import (
    ClassifierScorer,
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
from lifecycle_hf.scaling.tables import terminal_table
from lifecycle_hf.toyworld.crawl import measure_curation, planted_crawl

STEPS = ("url", "language", "rules", "pii", "quality", "toxicity", "perplexity", "minhash", "substring")
SAMPLE = 20_000
"""Most documents of each side that the classifier of quality is trained on, and that thresholds are fitted on."""


@dataclass
class CurateArguments:
    """Hold the crawl, the steps, and what the steps need."""

    source: str = field(
        default="python", metadata={"help": "File or folder of the crawl; `python` is the embedded one."}
    )
    output_dir: str = field(default="output/curated", metadata={"help": "Folder of the clean corpus and the report."})
    steps: list[str] = field(
        default_factory=lambda: ["url", "rules", "pii", "minhash", "substring"],
        metadata={"help": f"Steps in their order: {', '.join(STEPS)}."},
    )
    workers: int = field(default=1, metadata={"help": "Processes; they do not change the result."})
    tasks: int = field(default=8, metadata={"help": "Parts that the corpus is cut into."})
    output_format: str = field(default="parquet", metadata={"help": "Files of data.", "choices": ("parquet", "jsonl")})
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer that counts tokens; words and signs without one."}
    )
    text_column: str = field(default="text", metadata={"help": "Column of the text."})
    id_column: str = field(default="id", metadata={"help": "Column of the id, if there is one."})
    url_column: str = field(default="url", metadata={"help": "Column of the URL, if there is one."})
    domain_column: str = field(default="domain", metadata={"help": "Column of the domain, if there is one."})
    strict_data: bool = field(default=False, metadata={"help": "Stop at a row that can't be used."})
    blocklist: bool = field(
        default=True, metadata={"help": "url: use datatrove's lists of blocked domains, pages and words."}
    )
    blocked_domains: str | None = field(default=None, metadata={"help": "url: file of more domains, one a line."})
    c4: bool = field(default=False, metadata={"help": "rules: the rules of C4, too; they leave no code."})
    trusted: str | None = field(
        default=None,
        metadata={"help": "quality: file or folder of trusted text, for a classifier."},
    )
    quality_threshold: float | None = field(
        default=None, metadata={"help": "quality: lowest P(trusted); sampling by Pareto's distribution if unset."}
    )
    reference_model: str | None = field(
        default=None, metadata={"help": "perplexity: causal LM that recipes/pretrain.py trained on trusted text."}
    )
    perplexity_upper: float = field(
        default=0.9, metadata={"help": "perplexity: quantile of a domain's losses up to which documents are kept."}
    )
    language_model: str | None = field(default=None, metadata={"help": "language: a fastText model, lid.176.bin."})
    languages: list[str] = field(default_factory=lambda: ["en"], metadata={"help": "language: those that are kept."})
    toxicity_model: str | None = field(default=None, metadata={"help": "toxicity: a sequence classifier."})
    toxicity_label: str = field(default="toxic", metadata={"help": "toxicity: the label of toxic text."})
    toxicity_threshold: float = field(default=0.5, metadata={"help": "toxicity: least P(toxic) to be removed."})
    duplicate_length: int = field(default=50, metadata={"help": "substring: tokens of the shortest run."})
    duplicate_on: str = field(
        default="span", metadata={"help": "substring: cut the run, or the document.", "choices": ("span", "document")}
    )
    similarity: float = field(default=0.8, metadata={"help": "minhash: least Jaccard similarity of near duplicates."})
    max_memory: int = field(default=1 << 30, metadata={"help": "substring: bytes of a task."})
    seed: int = field(default=0, metadata={"help": "Seed of samples, signatures and draws."})

    @property
    def columns(self) -> dict[str, str]:
        return {name: getattr(self, f"{name}_column") for name in COLUMNS}


def curate_and_report(args: CurateArguments, executor=None) -> dict:
    """Run the steps over the crawl, print what each left and removed, and return the report."""
    planted = args.source == "python"
    source = planted_crawl(Path(f"{args.output_dir}_crawl"), args.seed) if planted else Path(args.source)
    report = curate(
        source, args.output_dir, make_blocks(args, source), workers=args.workers, tasks=args.tasks,
        columns=args.columns, output_format=args.output_format, tokenizer=args.tokenizer_name,
        strict_data=args.strict_data, executor=executor,
    )  # fmt: skip
    print(funnel_table(report))
    if planted:
        kinds = {"parquet": "parquet", "jsonl": "json"}
        files = str(Path(args.output_dir) / "data" / f"*.{args.output_format}")
        data = load_dataset(kinds[args.output_format], data_files=files, split="train")
        cells = [[kind, *map(str, counts)] for kind, *counts in measure_curation(source, data)]
        print(terminal_table(["planted", "count", "found or removed"], cells, title="What was planted", caption=""))
    print(f"The clean corpus is in {args.output_dir}/data; removed, report.json and funnel.png are beside it.")
    return report


def make_blocks(args: CurateArguments, source: Path) -> list:
    """Return the blocks of the steps.

    Raises:
        ValueError: a step is unknown, stands twice, or lacks what it needs.
    """
    needed = {"quality": "trusted", "perplexity": "reference_model", "language": "language_model",
              "toxicity": "toxicity_model"}  # fmt: skip
    for step in args.steps:
        if step not in STEPS or args.steps.count(step) > 1:
            told = "stands twice" if step in STEPS else f"is none of {', '.join(STEPS)}"
            raise ValueError(f"steps: {step!r} {told}.")
        if (option := needed.get(step)) and getattr(args, option) is None:
            raise ValueError(f"steps: {step!r} needs {option}. Set --{option}, or leave the step out.")
    for step, option in needed.items():
        if step not in args.steps and getattr(args, option) is not None:
            raise ValueError(f"{option} has no effect without the step {step!r}: add it to --steps.")
    makers = {
        "url": lambda: UrlFilter(integrated=args.blocklist, domains=args.blocked_domains or ()),
        "language": lambda: LanguageFilter(args.language_model, args.languages),
        "rules": lambda: QualityRules(c4=args.c4),
        "pii": PIIRemover,
        "quality": lambda: trained_quality(args, source),
        "toxicity": lambda: ToxicityFilter(
            ClassifierScorer(args.toxicity_model, args.toxicity_label), args.toxicity_threshold
        ),
        "perplexity": lambda: fitted_perplexity(args, source),
        "minhash": lambda: MinHashDedup(threshold=args.similarity, seed=args.seed),
        "substring": lambda: SubstringDedup(
            length=args.duplicate_length, on=args.duplicate_on, max_memory=args.max_memory
        ),
    }
    return [makers[step]() for step in args.steps]


def trained_quality(args: CurateArguments, source: Path) -> QualityClassifier:
    """Return the classifier that tells trusted text from the crawl, trained once; OUTPUT_DIR_quality keeps it."""
    folder = Path(f"{args.output_dir}_quality")
    cut = {"pareto": 9.0} if args.quality_threshold is None else {"threshold": args.quality_threshold}
    options = {"seed": args.seed} | cut
    if not folder.exists():
        sides = (sample_documents(Path(path), args.columns)[0] for path in (args.trusted, source))
        QualityClassifier.train(*sides, **options).save(folder)
    return QualityClassifier(str(folder), **options)


def fitted_perplexity(args: CurateArguments, source: Path) -> PerplexityFilter:
    """Return the filter with the thresholds of each domain of the crawl."""
    block = PerplexityFilter(args.reference_model, upper=args.perplexity_upper)
    return block.fit(*sample_documents(source, args.columns))


def sample_documents(source: Path, columns: dict[str, str]) -> tuple[list[str], list[str | None]]:
    """Return the texts and domains of some documents from all parts of the source."""
    files, root = input_files(source)[0], source if source.is_dir() else source.parent
    texts, domains = [], []
    for _, row in read_documents(files, root, 0, 1, columns):
        if not isinstance(row, Fault):
            texts.append(row["text"])
            domains.append(row["domain"])
    step = -(-len(texts) // SAMPLE) or 1
    return texts[::step], domains[::step]
