"""A corpus as one stream of tokens, cut to rows that fill the context: in memory (map style) or streaming."""

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, count, islice, repeat
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from datasets import IterableDataset as StreamedDataset
from torch.utils.data import Dataset as MapDataset
from torch.utils.data import IterableDataset, get_worker_info

from lifecycle_hf.data.denoising import IGNORED, example_rng
from lifecycle_hf.data.rows import RowPlan, check_context

_DOCUMENTS_AT_ONCE = 1000


def read_text(path: str | Path, *, separator: str | None = None, strict: bool = False) -> list[str]:
    """The documents of a UTF-8 text file: what stands between separators, or the whole file; blank ones left out.

    Documents with other bytes are dropped with one warning.

    Raises:
        ValueError: under `strict`, bytes that are no UTF-8; the message names the file and the offset.
    """
    data = Path(path).read_bytes()
    pieces = data.split(separator.encode()) if separator else [data]
    texts, problems, offset = [], [], 0
    for piece in pieces:
        try:
            texts.append(piece.decode("utf-8"))
        except UnicodeDecodeError as error:
            problems.append(f"byte 0x{piece[error.start]:02x} at offset {offset + error.start}")
        offset += len(piece) + len((separator or "").encode())
    if problems:
        told = f"{path}: {len(problems)} of {len(pieces)} documents are not UTF-8; the first fault is {problems[0]}"
        if strict:
            raise ValueError(f"{told}. strict_data is on: convert the file to UTF-8, or turn it off to drop them.")
        warnings.warn(f"{told}. They are dropped.", UserWarning, stacklevel=2)
    return [text for text in texts if text.strip()]


@dataclass(frozen=True, eq=False)
class TokenStream:
    """Token ids [N] of a corpus, one document behind the other, and where documents start [D].

    Both may be memory-mapped, e.g. ``np.load(path, mmap_mode="r")``. Errors call the corpus `where`.
    """

    ids: np.ndarray
    starts: np.ndarray
    where: str = "train_dataset"

    @classmethod
    def from_documents(cls, documents: Dataset | Iterable, eos_id: int, where: str = "train_dataset") -> "TokenStream":
        """Join documents (a dataset with a column "input_ids", or lists of ids) by EOS.

        EOS is appended to documents that don't end with it; empty ones are left out.

        Raises:
            ValueError: no token at all, or a dataset without the column "input_ids".
        """
        joined = list(_joined(documents, eos_id, where))
        if not joined:
            raise ValueError(f"{where}: the corpus has no token. Check the split, its filters and its text column.")
        starts = np.cumsum(np.concatenate([[0], *(lengths for _, lengths in joined)]))[:-1]
        return cls(np.concatenate([ids for ids, _ in joined]), starts, where)

    def __len__(self):
        return len(self.ids)


def _joined(documents, eos_id: int, where: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ids of many documents at a time, each ended by EOS, and their lengths."""
    for ids, lengths in _batches(documents, where):
        lengths = lengths[lengths > 0]
        if len(lengths):
            ends = np.cumsum(lengths)
            unfinished = ids[ends - 1] != eos_id
            yield np.insert(ids, ends[unfinished], eos_id), lengths + unfinished


def _batches(documents, where: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ids of many documents at a time, and their lengths."""
    if isinstance(documents, Dataset | StreamedDataset):
        columns = documents.column_names or list(next(documents.iter(1), {"input_ids": None}))
        if "input_ids" not in columns:
            raise ValueError(
                f"{where}: packing reads the column 'input_ids'; columns found: {columns}. Tokenise first."
            )
        documents = documents.select_columns("input_ids")
    if isinstance(documents, Dataset):
        for table in documents.with_format("arrow").iter(_DOCUMENTS_AT_ONCE):
            column = table["input_ids"].combine_chunks()
            lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
            yield column.flatten().to_numpy(zero_copy_only=False).astype(np.int32, copy=False), lengths
        return
    if isinstance(documents, StreamedDataset):
        # Unlike iter(documents), its `iter` doesn't share out the rows among the workers of a DataLoader.
        documents = chain.from_iterable(batch["input_ids"] for batch in documents.iter(_DOCUMENTS_AT_ONCE))
    rows = iter(documents)
    while batch := [() if row is None else row for row in islice(rows, _DOCUMENTS_AT_ONCE)]:
        if isinstance(batch[0], str | dict):
            found = type(batch[0]).__name__
            raise ValueError(f"{where}: packing reads lists of token ids, not {found}. Tokenise first.")
        lengths = np.fromiter(map(len, batch), dtype=np.int64, count=len(batch))
        yield np.fromiter(chain.from_iterable(batch), dtype=np.int32, count=int(lengths.sum())), lengths


class PackedDataset(MapDataset):
    """Rows of `context_length` tokens of the stream, in order, for causal LM: `input_ids` and `labels`.

    With ``across_documents=False`` documents don't see each other: `position_ids` restart at each document, by which
    transformers' attention tells them apart (give it no attention mask), and the label of each document's first
    token is -100, as the token before it is another document's. `dropped_tokens` counts those of the last, incomplete
    row, unless `keep_last`.

    Raises:
        ValueError: a context of less than two tokens, or a stream shorter than one row.
    """

    def __init__(
        self, stream: TokenStream, context_length: int, *, across_documents: bool = True, keep_last: bool = False
    ):
        check_context(context_length)
        _check_corpus(len(stream), 2 if keep_last else context_length, stream.where)
        self.stream, self.context_length, self.across_documents = stream, context_length, across_documents
        rest = len(stream) % context_length
        # A single token has nothing to predict.
        self.dropped_tokens = 0 if keep_last and rest != 1 else rest
        self._rows = (len(stream) - self.dropped_tokens + context_length - 1) // context_length

    def __len__(self):
        return self._rows

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        first = index * self.context_length
        ids = self.stream.ids[first : first + self.context_length].astype(np.int64)
        if self.across_documents:
            return {"input_ids": ids, "labels": ids}
        low, high = np.searchsorted(self.stream.starts, (first + 1, first + len(ids)))
        starts = self.stream.starts[low:high] - first
        labels = ids.copy()
        labels[starts] = IGNORED
        bounds = np.concatenate(([0], starts, [len(ids)]))
        return {
            "input_ids": ids,
            "labels": labels,
            "position_ids": np.arange(len(ids)) - np.repeat(bounds[:-1], np.diff(bounds)),
        }


def _check_corpus(tokens: int, least: int, where: str) -> None:
    if tokens < least:
        raise ValueError(
            f"{where}: the corpus has {tokens} tokens, fewer than the {least} of one row. Add text or shorten the "
            "context."
        )


class _Epoch:
    """An epoch number in shared memory, so that persistent DataLoader workers see it change."""

    def __init__(self):
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, on which the noise depends.

        accelerate calls it, but not where it shards a seeded sampler over processes: call it as each epoch begins.
        """
        self._epoch.fill_(epoch)

    @property
    def epoch(self) -> int:
        return int(self._epoch)


class RowDataset(_Epoch, MapDataset):
    """Rows of `plan` from a stream, each with noise from (seed, epoch, index).

    The kinds of rows are drawn once from `seed`, so the length is the same in each epoch. In each epoch the stream is
    rotated by a random offset, so that text meets other denoisers; `dropped_tokens` at its end are left out.

    Raises:
        ValueError: a stream shorter than the longest row.
    """

    def __init__(self, stream: TokenStream, plan: RowPlan, *, seed: int):
        super().__init__()
        _check_corpus(len(stream), plan.lengths.max(), stream.where)
        self.stream, self.plan, self.seed = stream, plan, seed
        kinds = plan.draw(example_rng(seed, 0, len(stream)), len(stream) // plan.lengths.min())
        ends = np.cumsum(plan.lengths[kinds])
        rows = np.searchsorted(ends, len(stream), side="right")
        self._kinds, self._ends = kinds[:rows], ends[:rows]
        self.dropped_tokens = len(stream) - int(self._ends[-1])
        self._rotation = (None, 0)

    def __len__(self):
        return len(self._kinds)

    def __getitem__(self, index: int) -> dict[str, np.ndarray | int]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        kind, epoch = self._kinds[index], self.epoch
        if self._rotation[0] != epoch:
            # No row has this index, so the draw is no row's.
            offset = example_rng(self.seed, epoch, len(self.stream) + 1).integers(len(self.stream))
            self._rotation = (epoch, int(offset))
        length = self.plan.lengths[kind]
        first = (self._ends[index] - length + self._rotation[1]) % len(self.stream)
        ids = self.stream.ids[first : first + length]
        if len(ids) < length:
            ids = np.concatenate((ids, self.stream.ids[: length - len(ids)]))
        return self.plan.row(kind, ids, example_rng(self.seed, epoch, index))


def cut_stream(
    documents: Iterable,
    lengths: Iterable[int],
    eos_id: int,
    *,
    keep_last: bool = False,
    where: str = "train_dataset",
) -> Iterator[np.ndarray]:
    """Documents joined by EOS and cut to pieces of the given lengths; the last, incomplete one only if `keep_last`.

    Raises:
        ValueError: fewer tokens than one piece has, or none.
    """
    batches, buffer = _joined(documents, eos_id, where), np.empty(0, dtype=np.int32)
    for number, length in enumerate(lengths):
        while len(buffer) < length:
            batch = next(batches, None)
            if batch is None:
                if not number:
                    _check_corpus(len(buffer), 1 if keep_last else length, where)
                if keep_last and len(buffer):
                    yield buffer
                return
            buffer = np.concatenate((buffer, batch[0]))
        yield buffer[:length]
        buffer = buffer[length:]


def pack_stream(
    documents: Iterable, context_length: int, eos_id: int, *, keep_last: bool = False
) -> Iterator[np.ndarray]:
    """Documents of a stream joined by EOS and cut to rows [context_length]; see `cut_stream`."""
    check_context(context_length)
    return cut_stream(documents, repeat(context_length), eos_id, keep_last=keep_last)


class RowStream(_Epoch, IterableDataset):
    """Rows of `plan` from a stream of documents, kind and noise of each from (seed, epoch, index).

    `documents` is read anew in each epoch: a streamed dataset with a column "input_ids", or an iterable of lists of
    ids. Every process reads the whole stream and makes the rows that are its own, so the rows are the same for any
    number of workers and ranks and none comes twice. Leave `rank` and `world_size` alone under Trainer and accelerate,
    which share out batches themselves.

    Raises:
        ValueError: a rank outside the world, or documents that can be read only once.
    """

    def __init__(
        self,
        documents: Iterable,
        plan: RowPlan,
        eos_id: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        where: str = "train_dataset",
    ):
        super().__init__()
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} must lie between 0 and world_size - 1 = {world_size - 1}.")
        if iter(documents) is documents:
            raise ValueError(
                f"documents is a {type(documents).__name__}, which can be read only once: pass a list, a dataset "
                "(IterableDataset.from_generator(your_function)) or an object whose __iter__ starts anew."
            )
        self.documents, self.plan, self.eos_id, self.seed = documents, plan, eos_id, seed
        self.rank, self.world_size, self.where = rank, world_size, where

    def __iter__(self) -> Iterator[dict[str, np.ndarray | int]]:
        worker, epoch = get_worker_info(), self.epoch
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        shard, shards = self.rank * workers + number, self.world_size * workers
        if isinstance(self.documents, StreamedDataset):
            self.documents.set_epoch(epoch)  # by which it shuffles
        drawn = []

        def lengths():
            for index in count():
                rng = example_rng(self.seed, epoch, index)
                drawn[:] = [index, int(self.plan.draw(rng)), rng]
                yield self.plan.lengths[drawn[1]]

        for ids in cut_stream(self.documents, lengths(), self.eos_id, where=self.where):
            index, kind, rng = drawn
            if index % shards == shard:
                yield self.plan.row(kind, ids, rng)
