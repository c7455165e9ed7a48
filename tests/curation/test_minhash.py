"""MinHash: probabilities on pairs of known Jaccard similarity, and clusters against brute force."""

import random
from itertools import combinations

import numpy as np
import pytest

from lifecycle_hf.curation.minhash import candidate_pairs, clusters, jaccard, shingles, signatures


def pairs_of_texts(count, shared, own):
    """Texts 2i and 2i + 1 share `shared` words, and have `own` others each: J = shared / (shared + 2·own)."""
    for i in range(count):
        common = [f"c{i}x{j}" for j in range(shared)]
        for side in "ab":
            yield " ".join([*common, *(f"{side}{i}x{j}" for j in range(own))])


def within(share, p, n):
    """Whether the share of n draws is within 4 standard errors of the probability p."""
    return abs(share - p) <= 4 * (p * (1 - p) / n) ** 0.5


@pytest.mark.parametrize(("shared", "own"), [(20, 20), (30, 15), (40, 10), (40, 5)])
def test_columns_and_bands_agree_as_often_as_the_formulas_say(shared, own):
    s, count, bands, rows = shared / (shared + 2 * own), 600, 10, 4
    signed = signatures(list(pairs_of_texts(count, shared, own)), 1, bands * rows, seed=3)
    assert within((signed[::2] == signed[1::2]).mean(), s, count * bands * rows)
    found = {tuple(pair) for pair in candidate_pairs(signed, bands).tolist()}
    own_pairs = {(2 * i, 2 * i + 1) for i in range(count)}
    assert within(len(found & own_pairs) / count, 1 - (1 - s**rows) ** bands, count)
    assert not found - own_pairs  # pairs of similarity 0


def test_shingles_are_runs_of_words_without_case():
    text = "The cat sat, the cat sat!"  # the cat, cat sat, sat the: 3 different runs of two words
    assert len(shingles(text, 2)) == 3
    assert jaccard(shingles(text, 2), shingles("THE CAT: sat", 2)) == pytest.approx(2 / 3)
    assert len(shingles("one two", 5)) == 1 == jaccard(shingles("one two", 5), shingles("One... two", 5))
    assert jaccard(shingles("one two", 5), shingles("two one", 5)) == 0
    assert jaccard(shingles("?!", 5), shingles(" ?! ", 5)) == 1 and jaccard(shingles("?!", 5), shingles("", 5)) == 0


def brute_force(texts, threshold, n):
    """Connected components of the pairs whose Jaccard similarity, by sets of tuples, is at least the threshold."""
    sets = []
    for words in (text.split() for text in texts):
        sets.append({tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))})
    labels = list(range(len(texts)))
    for i, j in combinations(range(len(texts)), 2):
        if len(sets[i] & sets[j]) >= threshold * len(sets[i] | sets[j]):
            first, second = sorted((labels[i], labels[j]))
            labels = [first if label == second else label for label in labels]
    return labels


@pytest.mark.parametrize("seed", range(4))
def test_clusters_are_those_of_brute_force(seed):
    """40 bands of 2 rows miss a pair at s = 0.5 with a chance of 0.75⁴⁰ = 1e-5."""
    draw = random.Random(seed)
    texts = []
    for _ in range(12):
        words = [draw.choice("abcdefghij") for _ in range(draw.randrange(1, 30))]
        for _ in range(draw.randrange(1, 5)):
            changed = [word if draw.random() < 0.93 else draw.choice("xyz") for word in words]
            texts.append(" ".join(changed))
    draw.shuffle(texts)
    found = clusters(texts, 0.5, n=2, bands=40, rows=2).tolist()
    assert found == brute_force(texts, 0.5, 2)
    assert 12 <= len(set(found)) < len(texts)


def test_clusters_do_not_depend_on_the_order_and_empty_texts_are_alike():
    texts = ["one two three four", "one two three four five", "six seven", "", "  ", "six seven"]
    assert clusters(texts, 0.6, n=2, bands=20, rows=2).tolist() == [0, 0, 2, 3, 3, 2]  # J of the first two: 3 / 4
    assert clusters(texts[::-1], 0.6, n=2, bands=20, rows=2).tolist() == [0, 1, 1, 0, 4, 4]
    assert candidate_pairs(signatures([]), 14).shape == (0, 2)
    assert clusters([]).tolist() == [] and clusters(["alone"]).tolist() == [0]


def test_a_candidate_below_the_threshold_joins_nothing():
    """J = 1/3: a candidate in one band of 64 of one row almost surely, (2/3)⁶⁴ = 5e-12, and never an edge at 0.5."""
    texts = ["a b c d", "a b x y"]  # 2 of 6 words
    assert candidate_pairs(signatures(texts, 1, 64), 64).tolist() == [[0, 1]]
    assert clusters(texts, 0.5, n=1, bands=64, rows=1).tolist() == [0, 1]
    assert clusters(texts, 1 / 3, n=1, bands=64, rows=1).tolist() == [0, 0]


def test_a_long_text_is_hashed_in_parts():
    """10,000 shingles in three parts: the minimum is that of all, so half of them give half of the columns."""
    words = [f"w{i}" for i in range(10_000)]
    signed = signatures([" ".join(words), " ".join(words[:5000])], 1, 400)
    assert within((signed[0] == signed[1]).mean(), 0.5, 400)
    assert np.array_equal(signed[:1], signatures([" ".join(words[::-1])], 1, 400))


def test_a_full_bucket_makes_few_pairs():
    """Of 5 equal texts each is paired with the next 2: (0 1) (0 2) (1 2) (1 3) (2 3) (2 4) (3 4); all bands agree."""
    signed = signatures(["one two"] * 5, 1, 8)
    expected = [[0, 1], [0, 2], [1, 2], [1, 3], [2, 3], [2, 4], [3, 4]]
    assert candidate_pairs(signed, 4, most=2).tolist() == expected
    assert len(candidate_pairs(signed, 4)) == 10


def test_bands_divide_the_permutations():
    with pytest.raises(ValueError, match="10 permutations are no multiple of bands=3"):
        candidate_pairs(signatures(["a"], 1, 10), 3)
