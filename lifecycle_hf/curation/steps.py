"""The steps of curation for datatrove: read documents, apply blocks, keep shards, and write the clean data."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from lifecycle_hf.curation.decisions import Block, CorpusBlock, Decision
from lifecycle_hf.curation.reading import Fault, input_files, read_documents
from lifecycle_hf.data.json_lines import whole_file, write_whole
from lifecycle_hf.models.loading import load_tokenizer

BATCH, BATCH_CHARACTERS = 1000, 1 << 24
"""Most documents and characters that blocks get at a time; one document may be longer."""
SHARD = "{:05d}.jsonl"
_WORD_OR_SIGN = re.compile(r"\w+|[^\w\s]")


class Step(PipelineStep):
    """A step of curation, which holds no state of a task."""

    type = "curation"

    @property
    def name(self):
        return type(self).__name__


class ReadInput(Step):
    """Read the documents of files, count their tokens, and tell what can't be read.

    Args:
        source: the file or folder.
        folder: `removed/read` below it gets the faults, `counts/read` the counts.
        columns: {"text", "id", "url", "domain": name of the column}.
        strict: raise on the first fault.
    """

    def __init__(self, source: Path, folder: Path, columns: Mapping[str, str], tokenizer: str | None, strict: bool):
        super().__init__()
        self.source, self.folder, self.columns, self.strict = source, folder, columns, strict
        self.tokenizer = tokenizer

    def run(self, data=None, rank=0, world_size=1):
        files, root = input_files(self.source)[0], self.source if self.source.is_dir() else self.source.parent
        count, counts = token_counter(self.tokenizer), new_counts()
        with whole_file(self.folder / "removed" / "read" / SHARD.format(rank)) as file:
            for place, row in read_documents(files, root, rank, world_size, self.columns):
                if isinstance(row, Fault):
                    if self.strict:
                        told = f"{root / place}: {row.reason} ({row.detail})"
                        raise ValueError(f"{told}. Mend it, or leave out strict_data.")
                    file.write(json_line({"id": place, "reason": row.reason, "detail": row.detail}))
                    counts["removed"][row.reason] += 1
                    continue
                document = Document(row.pop("text"), row.pop("id"), metadata=row)
                add_document(counts, document, count)
                yield document
        write_counts(self.folder, ["read"], rank, {"read": counts})


class ReadShard(Step):
    """Read the documents of shard `rank` of a folder."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def run(self, data=None, rank=0, world_size=1):
        with (self.folder / SHARD.format(rank)).open("rb") as file:
            for line in file:
                yield Document(**orjson.loads(line))


class WriteShard(Step):
    """Write the documents to shard `rank` of a folder."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def run(self, data, rank=0, world_size=1):
        with whole_file(self.folder / SHARD.format(rank)) as file:
            for document in data:
                file.write(json_line({"text": document.text, "id": document.id, "metadata": document.metadata}))
        yield from ()


class ApplyBlocks(Step):
    """Let blocks decide about the documents that stream through, one block after the other, and keep what they remove.

    A document that has no text after a block is removed by it as "empty". Scores are kept in the metadata.

    Args:
        blocks: blocks with different names.
        folder: `removed/NAME` below it gets what a block removes, `counts/NAME` its counts.
        decided: (block, folder of its passes): a block of the whole corpus, whose decisions come first.
    """

    def __init__(
        self, blocks: Sequence[Block], folder: str | Path, tokenizer: str | None = None,
        decided: tuple[CorpusBlock, Path] | None = None,
    ):  # fmt: skip
        super().__init__()
        self.blocks, self.folder, self.tokenizer, self.decided = list(blocks), Path(folder), tokenizer, decided

    def run(self, data, rank=0, world_size=1):
        names = [block.name for block in ([self.decided[0]] if self.decided else []) + self.blocks]
        recorded = self.decided[0].decisions(self.decided[1], rank) if self.decided else None
        count, counts = token_counter(self.tokenizer), {name: new_counts() for name in names}
        with ExitStack() as stack:
            files = {
                name: stack.enter_context(whole_file(self.folder / "removed" / name / SHARD.format(rank)))
                for name in names
            }
            for batch in batches(data):
                decisions = list(islice(recorded, len(batch))) if self.decided else None
                for name, block in zip(names, [None] * (len(names) - len(self.blocks)) + self.blocks):
                    if block is not None:
                        decisions = decide(block, batch)
                    if len(decisions) != len(batch):
                        raise ValueError(f"{name} returned {len(decisions)} decisions for {len(batch)} documents.")
                    batch = list(apply(batch, decisions, files[name], counts[name], count))
                yield from batch
            if self.decided and next(recorded, None) is not None:
                raise ValueError(f"{names[0]} returned more decisions than shard {rank} has documents.")
        write_counts(self.folder, names, rank, counts)


class WriteData(Step):
    """Write the documents to file `rank` of the clean data, as Parquet or JSON lines.

    Args:
        scores: names of the scores, which become columns.
    """

    def __init__(self, folder: Path, suffix: str, scores: Sequence[str]):
        super().__init__()
        self.folder, self.suffix, self.scores = folder, suffix, list(scores)

    def run(self, data, rank=0, world_size=1):
        with whole_file(self.folder / f"train-{rank:05d}-of-{world_size:05d}.{self.suffix}") as file:
            if self.suffix == "jsonl":
                file.writelines(map(json_line, map(self._row, data)))
            else:
                fields = dict.fromkeys(("id", "text", "url", "domain"), pa.string())
                schema = pa.schema(fields | dict.fromkeys(self.scores, pa.float64()))
                with pq.ParquetWriter(file, schema, compression="zstd") as writer:
                    for batch in batches(data):
                        writer.write_batch(pa.RecordBatch.from_pylist(list(map(self._row, batch)), schema))
        yield from ()

    def _row(self, document):
        known = {"id": document.id, "text": document.text} | {k: document.metadata[k] for k in ("url", "domain")}
        return known | {name: document.metadata.get("scores", {}).get(name) for name in self.scores}


def token_counter(tokenizer: str | None) -> Callable[[str], int]:
    """Return a function that counts the tokens of a text: by a tokenizer, or words and other signs without one."""
    if tokenizer is None:
        return lambda text: sum(1 for _ in _WORD_OR_SIGN.finditer(text))
    loaded = load_tokenizer(tokenizer)
    return lambda text: len(loaded(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Yield the documents in lists of at most [`BATCH`] documents and [`BATCH_CHARACTERS`] characters."""
    batch, characters = [], 0
    for document in documents:
        if batch and (len(batch) == BATCH or characters + len(document.text) > BATCH_CHARACTERS):
            yield batch
            batch, characters = [], 0
        batch.append(document)
        characters += len(document.text)
    if batch:
        yield batch


def decide(block: Block, batch: Sequence[Document]) -> list[Decision]:
    """Return what a block decides about documents."""
    columns = {f"{name}s": [document.metadata.get(name) for document in batch] for name in ("url", "domain")}
    try:
        return block([document.text for document in batch], **columns) if batch else []
    except Exception as error:
        error.add_note(f"The block {block.name!r} failed on the documents {batch[0].id} to {batch[-1].id}.")
        raise


def apply(
    batch: Sequence[Document], decisions: Sequence[Decision], file: BinaryIO, counts: dict, count: Callable[[str], int]
) -> Iterator[Document]:
    """Yield the documents that are kept, with their new texts and scores, and write the others and all spans."""
    for document, decision in zip(batch, decisions, strict=True):
        reason = decision.reason
        if decision.text is not None and not reason:
            reason = "" if decision.text.strip() else "empty"
        if reason:
            row = {"id": document.id, "reason": reason, "text": document.text, "scores": decision.scores}
            file.write(json_line(row))
            counts["removed"][reason] += 1
            continue
        for start, end, why in decision.spans:
            file.write(json_line({"id": document.id, "reason": why, "start": start, "end": end}))
            counts["spans"][why] += 1
        if decision.text is not None and decision.text != document.text:
            document.text = decision.text
            document.metadata.pop("tokens", None)
        if decision.scores:
            document.metadata["scores"] = document.metadata.get("scores", {}) | decision.scores
        counts["scores"].update(decision.scores.keys())
        add_document(counts, document, count)
        yield document


def new_counts() -> dict:
    """Return the counts of a step: what is left after it, and what it removed by reason."""
    return {"documents": 0, "bytes": 0, "tokens": 0} | {name: Counter() for name in ("removed", "spans", "scores")}


def add_document(counts: dict, document: Document, count: Callable[[str], int]) -> None:
    """Add a document to what is left; its size is measured only where its text is new."""
    size = document.metadata
    if "tokens" not in size:
        size |= {"bytes": len(document.text.encode()), "tokens": count(document.text)}
    counts["documents"] += 1
    counts["bytes"] += size["bytes"]
    counts["tokens"] += size["tokens"]


def write_counts(folder: Path, names: Iterable[str], rank: int, counts: Mapping[str, dict]) -> None:
    """Write the counts of a task for each step."""
    for name in names:
        path = folder / "counts" / name / f"{rank:05d}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, orjson.dumps(counts[name]))


def read_counts(folder: Path, name: str) -> dict:
    """Return the sums of the counts of all tasks for a step."""
    total = new_counts()
    for path in sorted((folder / "counts" / name).glob("*.json")):
        for key, value in orjson.loads(path.read_bytes()).items():
            total[key] += Counter(value) if isinstance(value, dict) else value
    return {key: dict(sorted(value.items())) if isinstance(value, Counter) else value for key, value in total.items()}


def json_line(row: dict) -> bytes:
    """Return a row as a line of JSON."""
    return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY)
