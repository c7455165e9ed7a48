"""Remove runs of tokens that stand twice in a corpus, but once, through suffix arrays.

Tokens are words and single other signs, or those of a tokenizer. Blanks between them do not count. A scan of hashes
first leaves out all text that stands once; suffix arrays over the rest then decide what is equal.

Reference: Lee et al. 2021, "Deduplicating Training Data Makes Language Models Better",
https://arxiv.org/abs/2107.06499, which removes all copies of a run. Here the first one stays.
"""

import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from pydivsufsort import divsufsort, kasai
from transformers import PreTrainedTokenizerBase

from lifecycle_hf.curation.decisions import Decision, Pass
from lifecycle_hf.curation.hashing import mixed, range_hashes
from lifecycle_hf.curation.shards import read_texts, save_array
from lifecycle_hf.data.json_lines import whole_file
from lifecycle_hf.models.loading import load_tokenizer

LEAST_MEMORY = 1 << 20
_PIECE = 1 << 18
"""Characters of a text that are read into words at a time."""
_BREAK = re.compile(r"\W")
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+")
"""Scripts without blanks between words (Thai, Lao, Burmese, Khmer, Japanese, Chinese): each sign is a token."""
_WORD, _ALONE = 1, 2
_REPEATED = 2
"""The flag of a token is 0 where it is cut, 1 where it is kept, and 3 where moreover a repeated run begins."""


class SubstringDedup:
    """Cut out each run of at least `length` tokens that stands before in the corpus, so that one copy is left.

    The order is that of the shards and of the documents in them. A window of `length` tokens is repeated if an equal
    one begins before it; all its tokens that do not belong to the first such window are cut, with the blanks after
    them. This is done again with the text that is left, until no window stands twice in it. A run never spans two
    documents. The reason of a span is "duplicate_run"; a document of which nothing is left is removed as "duplicate".

    Of passes over shards the first and the last hold a document at a time. The second holds at most `max_memory`: it
    looks at the hashes in as many parts, and at the repeated text in as many pairs of parts, as that takes. Its time
    grows with the square of the repeated text where that has more than max_memory / 256 tokens. `work` gets 9 bytes
    for each token, and 16 for each of the repeated text.

    Args:
        length: tokens of the shortest run.
        on: "span", or "document": instead of cutting, remove each document with a run of a document before it that is
            kept, as "duplicate_run". A run that stands twice in one document alone does not count then.
        tokenizer: a fast tokenizer or its name or path, whose tokens count instead of words.
        max_memory: most bytes of the arrays of the second pass, or beside the tokens when called.

    Raises:
        ValueError: an option has no such value, or the tokenizer is not a fast one.
    """

    name = "substring"

    def __init__(
        self, length: int = 50, *, on: str = "span", tokenizer: PreTrainedTokenizerBase | str | None = None,
        max_memory: int = 1 << 30,
    ):  # fmt: skip
        if length < 1 or on not in ("span", "document") or max_memory < LEAST_MEMORY:
            raise ValueError(
                f"SubstringDedup: {length=} must be at least 1, {on=} 'span' or 'document', and {max_memory=} at "
                f"least {LEAST_MEMORY} bytes."
            )
        tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        if tokenizer is not None and not tokenizer.is_fast:
            raise ValueError(
                f"SubstringDedup: {type(tokenizer).__name__} does not tell the places of its tokens. Give a fast one."
            )
        self.length, self.on, self.tokenizer, self.max_memory = length, on, tokenizer, max_memory

    def __call__(self, texts: Sequence[str]) -> list[Decision]:
        """Return one decision for each text."""
        scanned = [self._tokens(text) for text in texts]
        tokens = np.concatenate([_END, *(part for values, *_ in scanned for part in (values, _END))])
        flags = np.ones(len(tokens), dtype=np.uint8)
        self._flag(_Corpus([(tokens, flags)], self.length, self.max_memory))
        kept = np.split(flags[tokens != 0], np.cumsum([len(values) for values, *_ in scanned])[:-1])
        return [self._decision(*given) for given in zip(texts, kept, scanned)]

    def passes(self, shards: Path, work: Path, tasks: int) -> list[Pass]:
        """Return the three passes: tokens of each shard, which tokens are cut, and decisions about each shard."""
        steps = [(tasks, partial(self._scan, shards, work)), (1, partial(self._find, work, tasks)),
                 (tasks, partial(self._decide, shards, work))]  # fmt: skip
        return [Pass(count, [step]) for count, step in steps]

    def decisions(self, work: Path, rank: int) -> Iterator[Decision]:
        """Return the decisions about the documents of shard `rank`."""
        with (work / f"{rank:05d}.decisions").open("rb") as file:
            for line in file:
                reason, text, spans = json.loads(line)
                yield Decision(reason, text, tuple(map(tuple, spans)))

    def _scan(self, shards: Path, work: Path, data=None, rank: int = 0, world_size: int = 1) -> None:
        counts = []
        with whole_file(work / f"{rank:05d}.tokens") as file:
            file.write(_END.tobytes())
            for text in read_texts(shards, rank):
                tokens = self._tokens(text)[0]
                file.write(tokens.tobytes() + _END.tobytes())
                counts.append(len(tokens))
        save_array(work / f"{rank:05d}.counts.npy", np.array(counts, dtype=np.int64))

    def _find(self, work: Path, tasks: int, data=None, rank: int = 0, world_size: int = 1) -> None:
        files = [(work / f"{task:05d}.tokens", work / f"{task:05d}.flags") for task in range(tasks)]
        for tokens, flags in files:
            size = tokens.stat().st_size // 8
            with whole_file(flags) as file:
                file.writelines(b"\1" * min(_PIECE, size - at) for at in range(0, size, _PIECE))
        self._flag(_Corpus(files, self.length, self.max_memory, work))

    def _decide(self, shards: Path, work: Path, data=None, rank: int = 0, world_size: int = 1) -> None:
        flags, at = np.memmap(work / f"{rank:05d}.flags", np.uint8, "r"), 1
        counts = np.load(work / f"{rank:05d}.counts.npy").tolist()
        with whole_file(work / f"{rank:05d}.decisions") as file:
            for text, count in zip(read_texts(shards, rank), counts, strict=True):
                found = self._decision(text, flags[at : at + count])
                file.write(json.dumps([found.reason, found.text, found.spans]).encode() + b"\n")
                at += count + 1

    def _flag(self, corpus: "_Corpus") -> None:
        while len(spans := corpus.spans(self.on == "document")):
            corpus.cut(spans)

    def _tokens(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the hashes of the tokens of a text, and where each begins and ends."""
        if self.tokenizer is None:
            return word_tokens(text)
        said = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
        )
        places = np.array(said["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        return mixed(np.array(said["input_ids"], dtype=np.uint64) + np.uint64(1)), places[:, 0], places[:, 1]

    def _decision(self, text: str, kept: np.ndarray, scanned: tuple | None = None) -> Decision:
        if kept.all():
            return Decision()
        if not kept.any():
            return Decision("duplicate" if self.on == "span" else "duplicate_run")
        _, starts, ends = scanned or self._tokens(text)
        first, stop = np.flatnonzero(np.diff(kept > 0, prepend=True, append=True)).reshape(-1, 2).T
        first = np.maximum(starts[first], np.concatenate([[0], ends])[first])  # no sign of a token that is kept
        stop = np.append(starts, len(text))[stop]
        spans = np.stack([first, stop], 1)[first < stop].tolist()
        edges = [0, *(place for span in spans for place in span), len(text)]
        left = "".join(text[a:b] for a, b in zip(edges[::2], edges[1::2]))
        return Decision("", left, tuple((a, b, "duplicate_run") for a, b in spans))


def word_tokens(text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the hashes of the words and other signs of a text, and the characters where each begins and ends, [T].

    A word is a run of letters, digits and underscores. A blank is no token.
    """
    kinds, numbers = _signs()
    found, at = [(np.empty(0, np.uint64), *np.empty((2, 0), np.int64))], 0
    while at < len(text):
        end = match.start() if (match := _BREAK.search(text, at + _PIECE)) else len(text)
        points = np.frombuffer(text[at:end].encode("utf-32-le", "surrogatepass"), np.uint32)
        kind = np.zeros(len(points) + 2, dtype=np.uint8)
        kind[1:-1] = kinds[points]
        edge = (kind[1:] != kind[:-1]) | (kind[1:] == _ALONE)  # between two signs
        starts, ends = np.flatnonzero(edge[:-1] & (kind[1:-1] > 0)), np.flatnonzero(edge[1:] & (kind[1:-1] > 0)) + 1
        found.append((range_hashes(numbers[points], starts, ends), starts + at, ends + at))
        at = end
    return tuple(map(np.concatenate, zip(*found)))


@lru_cache(maxsize=1)
def _signs() -> tuple[np.ndarray, np.ndarray]:
    """Return of each code point whether it is part of a word, alone or a blank, and a random number."""
    everything, kinds = "".join(map(chr, range(0x110000))), np.full(0x110000, _ALONE, dtype=np.uint8)
    for pattern, kind in ((re.compile(r"\w+"), _WORD), (_UNSPACED, _ALONE), (re.compile(r"\s+"), 0)):
        for match in pattern.finditer(everything):
            kinds[match.start() : match.end()] = kind
    return kinds, mixed(np.arange(1, 0x110001, dtype=np.uint64))


_END = np.zeros(1, dtype=np.uint64)
"""Stands before the first and after each document of a shard."""


class _Corpus:
    """Hold the tokens of all shards and their flags, as pairs of arrays or of files, and find what is repeated.

    Args:
        length: tokens of a window.
        memory: most bytes of the arrays at a time; a block takes a quarter of it.
        folder: gets the repeated text; it stays in memory without one.
    """

    def __init__(self, shards: Sequence[tuple], length: int, memory: int, folder: Path | None = None):
        self.shards, self.length, self.memory, self.folder = shards, length, memory, folder
        self.block = min(memory // 512, 1 << 20)

    def spans(self, documents: bool) -> np.ndarray:
        """Return the spans of tokens to cut, [M, 2], sorted; places are those among the tokens that are kept.

        With `documents` they are those documents with a window of a document before it that has none itself. What the
        others do is not known before these are cut.
        """
        if not self._mark():
            return np.empty((0, 2), dtype=np.int64)
        if not documents:
            return merged(np.concatenate([
                merged(np.stack([np.maximum(later, first + self.length), later + self.length], 1))
                for later, first in self._repeats()
            ]))  # fmt: skip
        ends = np.concatenate([at + np.flatnonzero(values == 0) for _, at, _, values in self._blocks()])
        ends = np.unique(ends)
        pairs = [np.unique(np.searchsorted(ends, pair), axis=1) for pair in self._repeats()]
        later, first = np.concatenate([pair[:, pair[0] != pair[1]] for pair in pairs], 1)
        gone = np.unique(later[~np.isin(first, later)])
        return np.stack([ends[gone - 1] + 1, ends[gone]], 1)

    def cut(self, spans: np.ndarray) -> None:
        """Set the flags of spans to 0, and those of the other tokens that are kept to 1."""
        edges = spans.ravel()
        for shard, at, places, _ in self._blocks():
            inside = np.searchsorted(edges, np.arange(at, at + len(places)), side="right") % 2
            self._open(shard, "r+")[1][places] = 1 - inside

    def _open(self, shard: int, mode: str = "r") -> tuple[np.ndarray, np.ndarray]:
        tokens, flags = self.shards[shard]
        if isinstance(tokens, np.ndarray):
            return tokens, flags
        return np.memmap(tokens, np.uint64, "r"), np.memmap(flags, np.uint8, mode)

    def _blocks(self) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
        """Yield the tokens that are kept in blocks: shard, place of the first among all that are kept, places, values.

        A block begins with the last length − 1 tokens of the one before it, so that each window is in one block. The
        files are opened anew for each, so that the pages of the blocks before do not stay in memory.
        """
        seen, size = 0, self.block
        for shard in range(len(self.shards)):
            places, values = np.empty(0, np.int64), np.empty(0, np.uint64)
            for start in range(0, len(self._open(shard)[0]), size):
                tokens, flags = (column[start : start + size] for column in self._open(shard))
                kept, shared = np.flatnonzero(flags), min(len(places), self.length - 1)
                places = np.concatenate([places[len(places) - shared :], start + kept])
                values = np.concatenate([values[len(values) - shared :], tokens[kept]])
                yield shard, seen - shared, places, values
                seen += len(kept)

    def _mark(self) -> bool:
        """Flag where windows begin whose hash stands twice, and return whether there are any."""
        count = sum(len(self._open(shard)[0]) for shard in range(len(self.shards)))
        parts, found = -(-32 * count // self.memory), False
        for part in range(parts):
            hashes = np.sort(np.concatenate([own for *_, own in self._windows(part, parts)]))
            repeated = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
            del hashes
            for shard, places, own in self._windows(part, parts) if len(repeated) else ():
                hit = repeated[np.searchsorted(repeated[:-1], own)] == own
                self._open(shard, "r+")[1][places[hit]] |= _REPEATED
            found |= len(repeated) > 0
        return found

    def _windows(self, part: int, parts: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield shard, places and hashes of the windows inside documents whose hash falls into a part."""
        for shard, _, places, values in self._blocks():
            count = max(len(values) - self.length + 1, 0)
            hashes = range_hashes(values, slice(0, count), slice(self.length, None))
            own = _inside(values, self.length) & (
                (hashes >> np.uint64(32)) * np.uint64(parts) >> np.uint64(32) == part
            )
            yield shard, places[:count][own], hashes[own]

    def _repeats(self) -> Iterator[np.ndarray]:
        """Yield, for parts of the repeated text, the windows with an equal one before, and the first of these, [2, M].

        A part is compared with each one before it.
        """
        chunks = list(self._chunks())
        for number, chunk in enumerate(chunks):
            values, places = self._read(chunk)
            first = places.copy()
            for before in chunks[:number] or [None]:
                earlier, its = (values[:0], places[:0]) if before is None else self._read(before)
                all_places = np.concatenate([its, places])
                lowest = first_equal(np.concatenate([earlier, values]), self.length)[len(its) :]
                first = np.minimum(first, all_places[lowest])
            count = max(len(values) - self.length + 1, 0)
            own = np.flatnonzero(_inside(values, self.length) & (first < places)[:count])
            yield np.stack([places[own], first[own]])

    def _read(self, chunk: np.ndarray | Path) -> tuple[np.ndarray, np.ndarray]:
        values, places = chunk if isinstance(chunk, np.ndarray) else np.load(chunk)
        return values, places.view(np.int64)

    def _chunks(self) -> Iterator[np.ndarray | Path]:
        """Yield the repeated text in parts of which two fit into memory: tokens and their places, [2, T]."""
        held, size, number = [], 0, 0
        for piece in self._pieces():
            if held and size + piece.shape[1] > self.memory // 256:
                yield self._chunk(held, number)
                held, size, number = [], 0, number + 1
            held.append(piece)
            size += piece.shape[1]
        yield self._chunk(held, number)

    def _chunk(self, held: list[np.ndarray], number: int) -> np.ndarray | Path:
        chunk = np.concatenate(held, axis=1)
        return chunk if self.folder is None else save_array(self.folder / f"{number:05d}.repeated.npy", chunk)

    def _pieces(self) -> Iterator[np.ndarray]:
        """Yield the tokens of the flagged windows of each block and their places, with an end after each run."""
        for shard, at, places, values in self._blocks():
            starts = np.flatnonzero(self._open(shard)[1][places[: max(len(values) - self.length + 1, 0)]] & _REPEATED)
            for start, end in merged(np.stack([starts, starts + self.length], 1)):
                run = np.stack([values[start:end], np.arange(at + start, at + end).astype(np.uint64)])
                yield np.concatenate([run, np.zeros((2, 1), np.uint64)], 1)


def first_equal(tokens: np.ndarray, length: int) -> np.ndarray:
    """Return for each place the first place whose next `length` tokens are equal to its own, [T], by a suffix array.

    Places with fewer tokens after them are their own first ones.
    """
    ids = np.unique(tokens, return_inverse=True)[1].astype(np.uint32)
    order = divsufsort(ids)
    shared = kasai(ids, order)  # tokens that a suffix shares with the next one in order
    starts = np.concatenate([[0], 1 + np.flatnonzero(shared[:-1] < length)])
    first = np.empty_like(order)
    first[order] = np.repeat(np.minimum.reduceat(order, starts), np.diff(starts, append=len(order)))
    return first


def merged(spans: np.ndarray) -> np.ndarray:
    """Return the union of spans [M, 2] as sorted spans that do not touch."""
    starts, ends = spans[np.argsort(spans[:, 0], kind="stable")].T
    ends = np.maximum.accumulate(ends)
    new = np.ones(len(starts), dtype=bool)
    new[1:] = starts[1:] > ends[:-1]
    return np.stack([starts[new], ends[np.roll(new, -1)]], 1)


def _inside(values: np.ndarray, length: int) -> np.ndarray:
    """Return of each window of tokens whether no end of a document is in it."""
    ends = np.concatenate([[0], np.cumsum(values == 0)])
    return ends[length:] == ends[:-length]
