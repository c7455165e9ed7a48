"""MinHash: probabilities on pairs of known Jaccard similarity, and clusters against brute force."""

import random
from itertools import combinations

import numpy as np
import pytest
from corpus_setting import local_runner, through_passes

from lifecycle_hf.curation import MinHashDedup, SubstringDedup
from lifecycle_hf.curation.hashing import digest
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


def random_texts(count, size, draw):
    """Texts of random words, so many of them that no two texts share a run of 5."""
    return [" ".join(f"w{draw.randrange(5000)}" for _ in range(size)) for _ in range(count)]


def test_planted_near_duplicates_are_found_and_nothing_else():
    """A text of 99 words has 95 shingles of 5. Another word inside it changes 5 of them: J = 90 / 100."""
    draw = random.Random(0)
    texts = random_texts(3000, 99, draw)
    planted = draw.sample(range(3000), 60)
    for number, i in enumerate(planted):
        words = texts[i].split()
        words[draw.randrange(4, 95)] = f"new{number}"
        texts.append(" ".join(words))
    assert jaccard(shingles(texts[planted[0]], 5), shingles(texts[3000], 5)) == 0.9
    decisions = MinHashDedup()(texts)
    found = {frozenset((i, int(d.scores["duplicate_of"]))) for i, d in enumerate(decisions) if not d.kept}
    pairs = {frozenset((i, 3000 + number)) for number, i in enumerate(planted)}
    assert len(found & pairs) >= 0.98 * len(pairs) and len(found & pairs) >= 0.99 * len(found)
    assert {d.scores["similarity"] for d in decisions if not d.kept} == {0.9}


def test_the_longest_text_of_a_cluster_is_kept():
    texts = ["a b c d e f", "a b c d e f", "other words", "a b c d e f g", "a b c d e f h", "Other words"]
    decisions = MinHashDedup(n=1, bands=40, rows=1, threshold=0.7)(texts)  # J = 6/7, and 6/8 of g and h
    longest = min((3, 4), key=lambda i: digest(texts[i].encode()))
    words = min((2, 5), key=lambda i: digest(texts[i].encode()))
    assert [i for i, decision in enumerate(decisions) if decision.kept] == sorted([longest, words])
    assert decisions[0].reason == "near_duplicate"
    assert decisions[0].scores == {"duplicate_of": longest, "similarity": 6 / 7}
    assert decisions[7 - longest].scores == {"duplicate_of": longest, "similarity": 0.75}
    assert [decision.kept for decision in MinHashDedup()(["same text", "same text", "", ""])] == [True, False] * 2


def test_weak_links_do_not_join_a_chain():
    """Neighbours in the chain share 9 of 15 words, J = 0.6; 64 bands of one row miss that with a chance of 0.4⁶⁴."""
    texts = [" ".join(f"w{j}" for j in range(3 * i, 3 * i + 12)) for i in range(20)]
    weak, strong = (MinHashDedup(n=1, bands=64, rows=1, threshold=t)(texts) for t in (0.61, 0.6))
    assert all(decision.kept for decision in weak)
    assert sum(decision.kept for decision in strong) == 1


def texts_with_copies(draw):
    texts = random_texts(60, 40, draw)
    for text in draw.sample(texts, 20):
        words = text.split()
        words[draw.randrange(len(words))] = "new"
        texts.append(" ".join(words))
    return [*texts, *texts[:5], "", " ", "short"]


def test_shards_in_any_order_keep_the_same_texts_as_memory_does(tmp_path):
    draw, block = random.Random(1), MinHashDedup(n=2, bands=20, rows=2, threshold=0.7)
    texts, kept = texts_with_copies(draw), []
    for number, borders in enumerate([(), (30,), (0, 10, 10, 70)]):  # the last has empty shards
        decisions = through_passes(block, texts, tmp_path / str(number), borders)
        assert decisions == block(texts)
        kept.append(sorted(text for text, decision in zip(texts, decisions) if decision.kept))
        draw.shuffle(texts)
    assert kept[0] == kept[1] == kept[2] and len(kept[0]) == 62
    assert through_passes(block, [], tmp_path / "empty") == block([]) == []


@pytest.mark.parametrize("block", [MinHashDedup(), SubstringDedup(30)], ids=lambda block: block.name)
def test_workers_do_not_change_the_decisions(block, tmp_path):
    texts, expected = texts_with_copies(random.Random(2)), None
    for workers in (1, 2, 4):
        runner = local_runner(tmp_path / f"logs{workers}", workers)
        found = through_passes(block, texts, tmp_path / str(workers), (20, 40, 60), runner)
        expected = expected or block(texts)
        assert found == expected and not all(decision.kept for decision in found)


@pytest.mark.parametrize("options", [{"n": 0}, {"bands": 0}, {"threshold": 0}, {"threshold": 1.1}])
def test_options_have_bounds(options):
    with pytest.raises(ValueError, match="must be at least 1, and threshold="):
        MinHashDedup(**options)
