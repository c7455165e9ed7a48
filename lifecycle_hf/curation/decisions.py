"""What a block of curation decides about a document, and the two kinds of blocks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol


@dataclass(frozen=True, slots=True)
class Decision:
    """Hold what a block decides about one document: it is kept as it is, kept with another text, or removed.

    Args:
        reason: why the document is removed, as a short name such as "blocked_domain"; "" where it is kept.
        text: the new text where the block changes it, else None.
        spans: (start, end, reason) of the parts of the given text that were cut out or replaced, in characters.
        scores: what the block measured, by name; it is kept beside the text.
    """

    reason: str = ""
    text: str | None = None
    spans: tuple[tuple[int, int, str], ...] = ()
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def kept(self) -> bool:
        return not self.reason


class Block(Protocol):
    """Decide about each document on its own, so that a corpus streams through it."""

    name: str

    def __call__(
        self, texts: Sequence[str], *, urls: Sequence[str | None] | None = None,
        domains: Sequence[str | None] | None = None,
    ) -> list[Decision]:  # fmt: skip
        """Return one decision for each text. A block that reads no URLs or domains takes no notice of them."""


class Pass(NamedTuple):
    """Hold one pass over the shards: so many tasks of these datatrove steps."""

    tasks: int
    steps: list[Any]


class CorpusBlock(Protocol):
    """Decide about each document by all documents of the corpus, as deduplication does.

    `block(texts)` decides in memory. A corpus larger than memory is a folder of shards `00000.jsonl`, … with one
    document of datatrove ("text", "id", "metadata") in each line; task r of a pass reads shard r.
    """

    name: str

    def __call__(self, texts: Sequence[str]) -> list[Decision]:
        """Return one decision for each text."""

    def passes(self, shards: Path, work: Path, tasks: int) -> list[Pass]:
        """Return the passes over the shards, in the order in which they run; they write into the folder `work`."""

    def decisions(self, work: Path, rank: int) -> Iterator[Decision]:
        """Return the decisions about the documents of shard `rank`, in their order, after all passes."""
