"""What recipes share in which a model writes data: the writer, the tasks to start from, and the closing table."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from trl import get_quantization_config

from lifecycle_hf.cli.arguments import model_init_kwargs
from lifecycle_hf.completions.server import ChatServer
from lifecycle_hf.data.loading import load_test
from lifecycle_hf.models.loading import load_causal_lm, load_tokenizer
from lifecycle_hf.scaling.tables import markdown_table
from lifecycle_hf.synthesis import LocalWriter, ServerWriter, Writer


@dataclass
class WriterArguments:
    """Hold the writer, the tasks to start from, and the folder of the results."""

    output_dir: str = field(default="output/written", metadata={"help": "Folder of the results."})
    server_url: str | None = field(default=None, metadata={"help": "OpenAI-compatible server, up to and with /v1."})
    server_model: str | None = field(default=None, metadata={"help": "Name that the server knows the model by."})
    server_timeout: float = field(default=60.0, metadata={"help": "Seconds that a request may take."})
    batch_size: int = field(default=8, metadata={"help": "Texts that a local model writes together."})
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Tasks to start from (instruction, input, output, or instances): a file or a Hub name."},
    )
    rows: int | None = field(default=None, metadata={"help": "Use the first so many tasks; all, by default."})
    max_tokens: int = field(default=512, metadata={"help": "Most tokens of a text."})
    temperature: float = field(default=0.7, metadata={"help": "Sampling temperature."})
    seed: int = field(default=0, metadata={"help": "Seed of what is drawn and sampled."})
    strict_data: bool = field(default=False, metadata={"help": "Stop at a task that can't be used."})


def load_writer(args: WriterArguments, model_args, script: Writer) -> Writer:
    """Return the server's writer if there is a server, `script` for the model `toyworld`, or else the model's writer.

    Raises:
        ValueError: there is no model and no server, or the server's model is missing.
    """
    name = model_args.model_name_or_path
    if args.server_url:
        if not args.server_model:
            raise ValueError(f"server_url={args.server_url} needs server_model, the name that it knows the model by.")
        cache = Path(args.output_dir) / "answers.jsonl"
        return ServerWriter(ChatServer(args.server_url, args.server_model, timeout=args.server_timeout, cache=cache))
    if not name:
        raise ValueError("There is no writer: give model_name_or_path, or server_url and server_model.")
    if name == "toyworld":
        return script
    quantization = get_quantization_config(model_args)
    model = load_causal_lm(name, quantization_config=quantization, init_kwargs=model_init_kwargs(model_args))
    model = model if quantization else model.to(PartialState().device)
    return LocalWriter(model, load_tokenizer(name), batch_size=args.batch_size)


def load_tasks(args: WriterArguments, default: list[dict]) -> list[dict]:
    """Return the tasks of `dataset_name`, or `default`; the first `rows` of them."""
    rows = load_test(args.dataset_name, "sft").to_list() if args.dataset_name else default
    return rows[: args.rows]


def tell_written(report: dict, tallies: Mapping[str, Mapping[str, int]], folder: str) -> str:
    """Return the closing table: what was written, dropped by each filter and kept, with the tokens spent.

    Args:
        tallies: for each column how often each filter dropped something, and "kept".
    """
    filters = [name for name in dict.fromkeys(name for tally in tallies.values() for name in tally) if name != "kept"]
    cells = [["written", *(str(sum(tally.values())) for tally in tallies.values())]]
    cells += [[name, *(str(tally.get(name, 0)) for tally in tallies.values())] for name in [*sorted(filters), "kept"]]
    spent = "{prompt:,} tokens read and {completion:,} written".format(**report["tokens"])
    return f"{markdown_table(['', *tallies], cells)}\n{spent}. generated.jsonl and report.json are in {folder}"
