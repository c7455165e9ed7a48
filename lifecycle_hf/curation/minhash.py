"""Find near duplicates by MinHash: signatures of texts, candidate pairs by bands of them, and clusters of the pairs.

Two texts are compared by the Jaccard similarity of their shingles, which are their runs of n words. Words are runs of
letters and digits without case, so a script that writes no spaces between words has too few of them.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path

import numpy as np

from lifecycle_hf.curation.decisions import Decision, Pass
from lifecycle_hf.curation.hashing import ODD, digest, mixed
from lifecycle_hf.curation.shards import read_texts, save_array
from lifecycle_hf.data.json_lines import whole_file

_WORD = re.compile(r"\w+")
MOST_PAIRS = 32
"""Documents of a bucket that each one of it is compared with."""
_BATCH = 64
_FACTS = np.dtype([("digest", "u8"), ("size", "i8"), ("mark", "u8"), ("shingles", "i8")])
"""Of a document: hash of its shingles, characters, hash of the text, number of shingles."""


def shingles(text: str, n: int) -> np.ndarray:
    """Return 32-bit hashes of the different runs of `n` words of a text, sorted, as uint64 [S], S ≥ 1.

    A text of fewer than n words has one shingle, all its words; without a word it is the text without blanks at its
    ends.
    """
    words = _WORD.findall(text.lower()) or [text.strip()]
    hashes = np.array([_word_hash(word) for word in words], dtype=np.uint64)
    width = min(n, len(hashes))
    runs = hashes[: len(hashes) - width + 1].copy()
    for offset in range(1, width):
        runs = runs * np.uint64(ODD) + hashes[offset : len(hashes) - width + 1 + offset]
    return np.unique(mixed(runs) >> np.uint64(32))


@lru_cache(maxsize=1 << 18)
def _word_hash(word: str) -> int:
    return digest(word.encode("utf-8", "replace"))


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """Return |A ∩ B| / |A ∪ B| of two texts by their `shingles`."""
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / (len(first) + len(second) - shared)


def signatures(texts: Sequence[str], n: int = 5, permutations: int = 112, seed: int = 0) -> np.ndarray:
    """Return the MinHash signatures of texts, [N, permutations] of uint32: column k is min over shingles x of h_k(x).

    h_k(x) = ((a_k·x + b_k) mod 2⁶⁴) >> 32 with random a_k, b_k. P(two columns are equal) is the Jaccard similarity s.

    Reference: Broder 1997, "On the resemblance and containment of documents"; h_k: Dietzfelbinger 1996.
    """
    return _signatures([shingles(text, n) for text in texts], permutations, seed)


def _signatures(sets: Sequence[np.ndarray], permutations: int, seed: int) -> np.ndarray:
    factors, terms = np.random.default_rng(seed).integers(0, 1 << 64, (2, permutations), dtype=np.uint64)
    signed = np.empty((len(sets), permutations), dtype=np.uint32)
    for row, own in zip(signed, sets):
        parts = np.array_split(own, len(own) // 4096 + 1)  # so that a long text takes no more memory
        row[:] = np.min([(part[:, None] * factors + terms).min(0) for part in parts], 0) >> np.uint64(32)
    return signed


def candidate_pairs(signatures: np.ndarray, bands: int, most: int = MOST_PAIRS) -> np.ndarray:
    """Return the pairs of texts i < j that agree in all r = K / bands columns of one band or more, sorted, [M, 2].

    P(candidate) = 1 − (1 − s^r)^bands at Jaccard similarity s. Of more than `most` texts that agree in a band, as
    those of one template do, each is paired with the next `most` of them only, so that the pairs do not grow as N².

    Raises:
        ValueError: the K columns are no multiple of `bands`.

    Reference: Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, section 3.4.2.
    """
    if bands < 1 or signatures.shape[1] % bands:
        raise ValueError(
            f"candidate_pairs: {signatures.shape[1]} permutations are no multiple of {bands=}. Give bands that are."
        )
    pairs = [pairs for key in _band_keys(signatures, bands) for pairs in _pairs(key, most)]
    return np.unique(np.hstack([np.empty((2, 0), dtype=np.int64), *pairs]), axis=1).T


def _band_keys(signatures: np.ndarray, bands: int) -> np.ndarray:
    """Return the hash of each band of columns, [bands, N] of uint64."""
    columns = signatures.astype(np.uint64).reshape(len(signatures), bands, signatures.shape[1] // bands)
    keys = np.zeros((bands, len(signatures)), dtype=np.uint64)
    for row in range(columns.shape[2]):
        keys = mixed(keys * np.uint64(ODD) + columns[:, :, row].T)
    return keys


def _pairs(key: np.ndarray, most: int) -> Iterator[np.ndarray]:
    """Yield the pairs i < j of equal keys, [2, M]; of a bucket each with the next `most` of it."""
    order = np.argsort(key, kind="stable")
    for step in range(1, most + 1):
        same = np.flatnonzero(key[order[step:]] == key[order[:-step]])
        if not len(same):
            break
        yield np.stack([order[same], order[same + step]])


def clusters(
    texts: Sequence[str], threshold: float = 0.8, *, n: int = 5, bands: int = 14, rows: int = 8, seed: int = 0
) -> np.ndarray:
    """Return for each text the index of the first text of its cluster, [N].

    Candidate pairs whose true Jaccard similarity is at least `threshold` are joined by union-find, so that each text
    of a cluster is similar to another one of it. The clusters do not depend on the order of the texts.

    Args:
        n: words of a shingle.
        bands, rows: of the signature, bands · rows columns, see `candidate_pairs`. The defaults find a pair of
            similarity 0.8 with a chance of 0.92, and one of 0.9 with 0.9996.
    """
    sets = [shingles(text, n) for text in texts]
    keys = _band_keys(_signatures(sets, bands * rows, seed), bands)
    labels = _labels(np.array([digest(own) for own in sets], dtype=np.uint64), keys, sets.__getitem__, threshold)
    _, first, own = np.unique(labels, return_index=True, return_inverse=True)
    return first[own]


def _labels(
    digests: np.ndarray, keys: Iterable[np.ndarray], read: Callable[[int], np.ndarray], threshold: float
) -> np.ndarray:
    """Return the number of the cluster of each document, [N].

    Args:
        digests: of the shingles of each document, [N]; documents with equal ones are equal.
        keys: the key of each document, [N], for one band after the other.
        read: returns the shingles of a document.
    """
    _, first, same = np.unique(digests, return_index=True, return_inverse=True)  # in an order that is not the texts'
    parent = list(range(len(first)))

    def root(i):
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    for key in keys:
        for pairs in _pairs(key[first], MOST_PAIRS):
            for i, j in pairs.T.tolist():
                low, high = sorted((root(i), root(j)))
                if low != high and jaccard(read(first[i]), read(first[j])) >= threshold:
                    parent[high] = low
    return np.array([root(i) for i in range(len(first))], dtype=np.int64)[same]


class MinHashDedup:
    """Remove near duplicates: of each cluster of documents, see [`clusters`], the longest text is kept.

    Of equally long texts that with the lowest hash is kept, and of equal texts the first. So the texts that are kept
    do not depend on the order of the documents. The reason is "near_duplicate"; the scores are "duplicate_of", the
    number in the corpus of the document that is kept in its place, and their Jaccard "similarity". It can be below the
    threshold where other documents link the two.

    The passes over shards hold 8 · bands bytes for each document of a shard, or about 150 bytes for each document of
    the corpus, and 64 documents. `work` gets 4 bytes for each word of the corpus.

    Args:
        n: words of a shingle.
        bands, rows: of the signature; a pair of similarity s is found with a chance of 1 − (1 − s^rows)^bands.
        threshold: lowest Jaccard similarity of two documents that joins their clusters.
        seed: of the hash functions.

    References: Broder 1997, "On the resemblance and containment of documents"; the defaults of n, bands and rows are
    those of FineWeb, https://arxiv.org/abs/2406.17557.
    """

    name = "minhash"

    def __init__(self, *, n: int = 5, bands: int = 14, rows: int = 8, threshold: float = 0.8, seed: int = 0):
        if min(n, bands, rows) < 1 or not 0 < threshold <= 1:
            raise ValueError(
                f"MinHashDedup: {n=}, {bands=} and {rows=} must be at least 1, and {threshold=} above 0 and at most 1."
            )
        self.n, self.bands, self.rows, self.threshold, self.seed = n, bands, rows, threshold, seed

    def __call__(self, texts: Sequence[str]) -> list[Decision]:
        """Return one decision for each text."""
        sets = [shingles(text, self.n) for text in texts]
        facts = np.array(list(map(_facts, texts, sets)), dtype=_FACTS)
        return [_decision(*pair) for pair in zip(*self._choose(facts, self._keys(sets), sets.__getitem__))]

    def passes(self, shards: Path, work: Path, tasks: int) -> list[Pass]:
        """Return the two passes: signatures of each shard, and clusters, which one task finds."""
        return [Pass(tasks, [partial(self._sign, shards, work)]), Pass(1, [partial(self._cluster, work, tasks)])]

    def decisions(self, work: Path, rank: int) -> Iterator[Decision]:
        """Return the decisions about the documents of shard `rank`."""
        return map(_decision, *np.load(work / f"{rank:05d}.kept.npy"))

    def _keys(self, sets: Sequence[np.ndarray]) -> np.ndarray:
        return _band_keys(_signatures(sets, self.bands * self.rows, self.seed), self.bands)

    def _sign(self, shards: Path, work: Path, data=None, rank: int = 0, world_size: int = 1) -> None:
        """Write what is known of each document of a shard: its facts, its keys, and its shingles."""
        facts, keys, texts = [], [self._keys([])], read_texts(shards, rank)
        with whole_file(work / f"{rank:05d}.shingles") as file:
            while batch := list(islice(texts, _BATCH)):
                sets = [shingles(text, self.n) for text in batch]
                facts += map(_facts, batch, sets)
                keys.append(self._keys(sets))
                file.writelines(own.astype(np.uint32).tobytes() for own in sets)
        save_array(work / f"{rank:05d}.keys.npy", np.hstack(keys))
        save_array(work / f"{rank:05d}.facts.npy", np.array(facts, dtype=_FACTS))

    def _cluster(self, work: Path, tasks: int, data=None, rank: int = 0, world_size: int = 1) -> None:
        """Write for each shard which document stands for each of its documents, and their similarity."""
        known = [np.load(work / f"{task:05d}.facts.npy") for task in range(tasks)]
        ends, facts = np.cumsum([len(own) for own in known]), np.concatenate(known)
        starts = np.concatenate([np.cumsum(own["shingles"]) - own["shingles"] for own in known])

        def read(i):
            path, count = work / f"{np.searchsorted(ends, i, 'right'):05d}.shingles", facts["shingles"][i]
            return np.fromfile(path, np.uint32, count, offset=4 * int(starts[i]))

        def keys():
            for band in range(self.bands):
                files = [work / f"{task:05d}.keys.npy" for task in range(tasks)]
                yield np.concatenate([np.load(file, mmap_mode="r")[band] for file in files])

        kept = np.split(self._choose(facts, keys(), read), ends[:-1], axis=1)
        for task, own in enumerate(kept):
            save_array(work / f"{task:05d}.kept.npy", own)

    def _choose(self, facts: np.ndarray, keys: Iterable[np.ndarray], read: Callable[[int], np.ndarray]) -> np.ndarray:
        """Return for each document the one that is kept in its place, −1 for itself, and their similarity, [2, N]."""
        labels = _labels(facts["digest"], keys, read, self.threshold)
        order = np.lexsort((facts["mark"], -facts["size"], labels))
        new = np.diff(labels[order], prepend=-1) != 0
        chosen = np.full((2, len(facts)), -1.0)
        for i, kept in zip(order[~new].tolist(), order[new][np.cumsum(new) - 1][~new].tolist()):
            chosen[:, i] = kept, jaccard(read(i), read(kept))
        return chosen


def _facts(text: str, own: np.ndarray) -> tuple[int, int, int, int]:
    return digest(own), len(text), digest(text.encode("utf-8", "surrogatepass")), len(own)


def _decision(kept: float, similarity: float) -> Decision:
    if kept < 0:
        return Decision()
    return Decision("near_duplicate", scores={"duplicate_of": float(kept), "similarity": float(similarity)})
