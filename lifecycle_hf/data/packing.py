"""Join a corpus to one stream of tokens and cut it to rows that fill the context, in memory or streamed."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, count, islice

import numpy as np
import torch
from datasets import Dataset
from datasets import IterableDataset as StreamedDataset
from torch.utils.data import Dataset as MapDataset
from torch.utils.data import IterableDataset, get_worker_info

from lifecycle_hf.data.denoising import IGNORED, example_rng
from lifecycle_hf.data.rows import RowPlan, check_context

_DOCUMENTS_AT_ONCE = 1000


@dataclass(frozen=True, eq=False)
class TokenStream:
    """Hold the token ids [N] of a corpus, document after document, and the place where each document starts [D].

    Both arrays may be memory-mapped, e.g. ``np.load(path, mmap_mode="r")``. Errors name the corpus by `where`.
    """

    ids: np.ndarray
    starts: np.ndarray
    where: str = "train_dataset"

    @classmethod
    def from_documents(cls, documents: Dataset | Iterable, eos_id: int, where: str = "train_dataset") -> "TokenStream":
        """Join documents (a dataset with a column "input_ids", or lists of ids) by EOS.

        EOS is appended to documents that don't end with it. Empty documents are left out.

        Raises:
            ValueError: there is no token, or the dataset has no column "input_ids".
        """
        joined = list(_joined(documents, eos_id, where))
        if not joined:
            raise ValueError(f"{where}: the corpus has no token. Check the split, its filters and its text column.")
        starts = np.cumsum(np.concatenate([[0], *(lengths for _, lengths in joined)]))[:-1]
        return cls(np.concatenate([ids for ids, _ in joined]), starts, where)

    def __len__(self):
        return len(self.ids)


def _joined(documents, eos_id: int, where: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield, for many documents at a time, their ids, each document with EOS at its end, and their lengths."""
    for ids, lengths in _batches(documents, where):
        lengths = lengths[lengths > 0]
        if len(lengths):
            ends = np.cumsum(lengths)
            unfinished = ids[ends - 1] != eos_id
            yield np.insert(ids, ends[unfinished], eos_id), lengths + unfinished


def _batches(documents, where: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield, for many documents at a time, their ids and their lengths."""
    if isinstance(documents, Dataset | StreamedDataset):
        columns = documents.column_names or list(next(documents.iter(1), {"input_ids": None}))
        if "input_ids" not in columns:
            raise ValueError(f"{where}: packing reads the column 'input_ids', not {columns}. Tokenise first.")
        documents = documents.select_columns("input_ids")
    if isinstance(documents, Dataset):
        for table in documents.with_format("arrow").iter(_DOCUMENTS_AT_ONCE):
            column = table["input_ids"].combine_chunks()
            lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
            yield column.flatten().to_numpy(zero_copy_only=False).astype(np.int32, copy=False), lengths
        return
    if isinstance(documents, StreamedDataset):
        # iter(documents) would divide the rows among the workers of a DataLoader; documents.iter does not.
        documents = chain.from_iterable(batch["input_ids"] for batch in documents.iter(_DOCUMENTS_AT_ONCE))
    rows = iter(documents)
    while batch := [() if row is None else row for row in islice(rows, _DOCUMENTS_AT_ONCE)]:
        if isinstance(batch[0], str | dict):
            raise ValueError(
                f"{where}: packing reads lists of token ids, not {type(batch[0]).__name__}. Tokenise first."
            )
        lengths = np.fromiter(map(len, batch), dtype=np.int64, count=len(batch))
        yield np.fromiter(chain.from_iterable(batch), dtype=np.int32, count=int(lengths.sum())), lengths


class PackedDataset(MapDataset):
    """Cut a stream, in order, to rows of `context_length` tokens for causal LM: `input_ids` and `labels`.

    With ``across_documents=False``, tokens do not attend to other documents. `position_ids` restart at each document,
    and transformers' attention recognises documents by that (pass no attention mask). The label of each document's
    first token is -100, because the token before it belongs to another document. `dropped_tokens` is the number of
    tokens in the last, incomplete row, which is left out.

    Raises:
        ValueError: the context is shorter than two tokens, or the stream is shorter than one row.
    """

    def __init__(self, stream: TokenStream, context_length: int, *, across_documents: bool = True):
        check_context(context_length)
        _check_corpus(len(stream), context_length, stream.where)
        self.stream, self.context_length, self.across_documents = stream, context_length, across_documents
        self.dropped_tokens = len(stream) % context_length

    def __len__(self):
        return len(self.stream) // self.context_length

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
        positions = np.arange(len(ids)) - np.repeat(bounds[:-1], np.diff(bounds))
        return {"input_ids": ids, "labels": labels, "position_ids": positions}


def _check_corpus(tokens: int, least: int, where: str) -> None:
    if tokens < least:
        raise ValueError(
            f"{where}: the corpus has {tokens} tokens, fewer than the {least} of one row. Add text or shorten rows."
        )


class Epoch:
    """Hold the epoch number in shared memory, so that persistent DataLoader workers see when it changes."""

    def __init__(self):
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, on which the noise depends.

        accelerate calls this method, except where it shards a seeded sampler over processes. Call it there at the
        start of each epoch.
        """
        self._epoch.fill_(epoch)

    @property
    def epoch(self) -> int:
        return int(self._epoch)


class RowDataset(Epoch, MapDataset):
    """Cut a stream to the rows of `plan`. The noise of each row depends on (seed, epoch, index) alone.

    The kinds of rows are drawn once from `seed`, so the number of rows is the same in each epoch. In each epoch the
    stream is rotated by a random offset, so that the same text gets other denoisers. The last `dropped_tokens` tokens
    do not fill a row and are left out.

    Raises:
        ValueError: the stream is shorter than the longest row.
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
            # No row has this index, so no row draws the same numbers.
            offset = example_rng(self.seed, epoch, len(self.stream) + 1).integers(len(self.stream))
            self._rotation = (epoch, int(offset))
        length = self.plan.lengths[kind]
        first = (self._ends[index] - length + self._rotation[1]) % len(self.stream)
        ids = self.stream.ids[first : first + length]
        if len(ids) < length:
            ids = np.concatenate((ids, self.stream.ids[: length - len(ids)]))
        return self.plan.row(kind, ids, example_rng(self.seed, epoch, index))


class RowStream(Epoch, IterableDataset):
    """Cut streamed documents to the rows of `plan`. Kind and noise of a row depend on (seed, epoch, index) alone.

    `documents` is a streamed dataset with a column "input_ids", or an iterable of lists of ids. It is read again in
    each epoch. Every process reads all documents and returns its own rows only, so the rows are the same for any
    number of workers and ranks, and no row is returned twice. Do not set `rank` and `world_size` with Trainer or
    accelerate, which divide the batches among the processes themselves.

    Raises:
        ValueError: `rank` is not below `world_size`, or `documents` can be read only once.
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
            self.documents.set_epoch(epoch)  # The order in which it shuffles depends on the epoch.
        batches, buffer = _joined(self.documents, self.eos_id, self.where), np.empty(0, dtype=np.int32)
        for index in count():
            rng = example_rng(self.seed, epoch, index)
            kind = int(self.plan.draw(rng))
            length = self.plan.lengths[kind]
            while len(buffer) < length:
                batch = next(batches, None)
                if batch is None:
                    if index == 0:
                        _check_corpus(len(buffer), length, self.where)
                    return
                buffer = np.concatenate((buffer, batch[0]))
            ids, buffer = buffer[:length], buffer[length:]
            if index % shards == shard:
                yield self.plan.row(kind, ids, rng)
