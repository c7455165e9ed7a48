"""Find near duplicates by MinHash: signatures of texts, candidate pairs by bands of them, and clusters of the pairs.

Two texts are compared by the Jaccard similarity of their shingles, which are their runs of n words. Words are runs of
letters and digits without case, so a script that writes no spaces between words has too few of them.
"""

import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

_WORD = re.compile(r"\w+")
_ODD = 0x9E3779B97F4A7C15
_MIX = (30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)


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
        runs = runs * np.uint64(_ODD) + hashes[offset : len(hashes) - width + 1 + offset]
    return np.unique(_mixed(runs) >> np.uint64(32))


@lru_cache(maxsize=1 << 18)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest(), "little")


def _mixed(values: np.ndarray) -> np.ndarray:
    """Return the values after splitmix64's last step, in which each bit of a value changes half of all bits."""
    for shift, factor in _MIX:
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(factor)
    return values


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


def candidate_pairs(signatures: np.ndarray, bands: int, most: int = 32) -> np.ndarray:
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
    pairs = [np.empty((2, 0), dtype=np.int64)]
    for band in np.split(signatures.astype(np.uint64), bands, axis=1):
        key = np.zeros(len(band), dtype=np.uint64)
        for column in band.T:
            key = _mixed(key * np.uint64(_ODD) + column)
        order = np.argsort(key, kind="stable")
        for step in range(1, most + 1):
            same = np.flatnonzero(key[order[step:]] == key[order[:-step]])
            if not len(same):
                break
            pairs.append(np.stack([order[same], order[same + step]]))
    return np.unique(np.hstack(pairs), axis=1).T


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
    same: dict[bytes, int] = {}
    parent = [same.setdefault(own.tobytes(), i) for i, own in enumerate(sets)]

    def root(i):
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    unique = [same[own] for own in sorted(same)]  # in an order that does not depend on that of the texts
    signed = _signatures([sets[i] for i in unique], bands * rows, seed)
    for i, j in candidate_pairs(signed, bands).tolist():
        i, j = unique[i], unique[j]
        first, second = sorted((root(i), root(j)))
        if first != second and jaccard(sets[i], sets[j]) >= threshold:
            parent[second] = first
    return np.array([root(i) for i in range(len(sets))], dtype=np.int64)
