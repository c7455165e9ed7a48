"""Runs that stand twice: against brute force over small alphabets, and what is kept."""

import random
import re
import tracemalloc
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from corpus_setting import through_passes
from hypothesis import given, settings
from hypothesis import strategies as st

from lifecycle_hf.curation import SubstringDedup
from lifecycle_hf.curation.substring import LEAST_MEMORY, first_equal, merged, word_tokens

CORPORA = st.integers(1, 4).flatmap(
    lambda size: st.lists(st.lists(st.sampled_from("abcd"[:size]), max_size=24), max_size=5)
)


def left_by_brute_force(documents, length):
    """What is left of lists of tokens: all windows compared, those that stand before cut, until there are none.

    The tokens of a window that belong to its first copy too stay.
    """
    while True:
        first, cut, start = {}, [set() for _ in documents], 0
        for tokens, gone in zip(documents, cut):
            for i in range(start, start + len(tokens) - length + 1):
                j = first.setdefault(tuple(tokens[i - start : i - start + length]), i)
                if j < i:
                    gone.update(p - start for p in range(max(i, j + length), i + length))
            start += len(tokens) + 1
        if not any(cut):
            return documents
        documents = [[t for p, t in enumerate(tokens) if p not in gone] for tokens, gone in zip(documents, cut)]


def kept_by_brute_force(documents, length):
    """Whether each document is kept where those with a window of a document that is kept before are removed."""
    seen, kept = set(), []
    for tokens in documents:
        own = {tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1)}
        kept.append(not own & seen)
        seen |= own if kept[-1] else set()
    return kept


def texts_left(texts, decisions):
    return [
        (text if decision.text is None else decision.text) if decision.kept else ""
        for text, decision in zip(texts, decisions, strict=True)
    ]


def words(text):
    return re.findall(r"\w+|[^\w\s]", text)


@given(CORPORA, st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_spans_are_those_of_brute_force(documents, length):
    texts = [" ".join(tokens) for tokens in documents]
    decisions = SubstringDedup(length)(texts)
    left = [words(text) for text in texts_left(texts, decisions)]
    assert left == left_by_brute_force(documents, length)
    runs = Counter(tuple(tokens[i : i + length]) for tokens in left for i in range(len(tokens) - length + 1))
    assert set(runs.values()) <= {1}
    for text, decision in zip(texts, decisions):
        if decision.text is not None:  # what is left is the text without the spans
            edges = [0, *(place for start, end, _ in decision.spans for place in (start, end)), len(text)]
            assert edges == sorted(edges)
            assert decision.text == "".join(text[a:b] for a, b in zip(edges[::2], edges[1::2]))
        assert {reason for *_, reason in decision.spans} <= {"duplicate_run"}
        assert decision.reason == ("duplicate" if text and decision.text is None and not decision.kept else "")


@given(CORPORA, st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_documents_are_those_of_brute_force(documents, length):
    decisions = SubstringDedup(length, on="document")([" ".join(tokens) for tokens in documents])
    assert [decision.kept for decision in decisions] == kept_by_brute_force(documents, length)
    assert {decision.reason for decision in decisions} <= {"", "duplicate_run"}
    assert all(decision.text is None and not decision.spans for decision in decisions)


@given(st.text("ab", min_size=1, max_size=30), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_a_suffix_array_finds_the_first_equal_places(tokens, length):
    found = first_equal(np.array([ord(token) for token in tokens], dtype=np.uint64), length).tolist()
    windows = [tokens[i : i + length] for i in range(len(tokens))]
    assert found == [windows.index(w) if len(w) == length else i for i, w in enumerate(windows)]


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 5)), max_size=8))
@settings(max_examples=60, deadline=None)
def test_spans_are_merged(spans):
    found = merged(np.array([(start, start + size) for start, size in spans], dtype=int).reshape(-1, 2)).tolist()
    assert [p for span in found for p in range(*span)] == sorted({p for a, n in spans for p in range(a, a + n)})
    assert all(end < start for (_, end), (start, _) in pairwise(found))


@given(st.text(max_size=40))
@settings(max_examples=80, deadline=None)
def test_tokens_are_words_and_other_signs(text):
    """The scripts without blanks are left out: there, each sign is a token."""
    text = re.sub("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]", "", text)
    hashes, starts, ends = word_tokens(text)
    assert [text[a:b] for a, b in zip(starts, ends)] == words(text)
    assert len(set(hashes.tolist())) == len(set(words(text)))


def test_words_of_a_long_text_and_of_scripts_without_blanks():
    text = "one, two " * 70_000 + "three" * 60_000 + " end"  # more than two pieces, and a word of a piece's size
    hashes, starts, ends = word_tokens(text)
    assert len(hashes) == 3 * 70_000 + 2 and len(set(hashes.tolist())) == 5
    assert [text[a:b] for a, b in zip(starts[-1:], ends[-1:])] == ["end"]
    _, starts, ends = word_tokens("これは本 two")
    assert list(zip(starts, ends)) == [(0, 1), (1, 2), (2, 3), (3, 4), (5, 8)]


def test_a_text_that_repeats_itself_keeps_one_copy():
    """The first 50 tokens stay of "a" 200 times, and of "b a" 100 times, which has two different windows."""
    decisions = SubstringDedup()(["a " * 200, "b a " * 100])
    assert [len(text.split()) for text in texts_left(["", ""], decisions)] == [50, 50]
    assert decisions[0].spans == ((100, 400, "duplicate_run"),)


def planted(draw, sizes):
    """Texts of words that stand once, and runs of so many words, each in two of them."""
    texts = [[f"d{i}w{j}" for j in range(draw.randrange(20, 120))] for i in range(60)]
    runs = [[f"r{number}w{j}" for j in range(size)] for number, size in enumerate(sizes)]
    for run in runs:
        for document in draw.sample(texts, 2):
            at = draw.randrange(len(document) + 1)
            document[at:at] = ["(", *run, ")"] if draw.random() < 0.5 else run
    return [" ".join(document) for document in texts]


def test_all_planted_runs_from_50_tokens_are_found_and_no_shorter_ones():
    """Each run stands in two texts, with other words around it."""
    sizes = [*range(30, 50), *range(50, 70)]
    texts = planted(random.Random(0), [])
    for number, size in enumerate(sizes):
        run = " ".join(f"r{number}w{j}" for j in range(size))
        texts += [f"before{number} {run} {number}after", f"<{number}> {run}, then {number}"]
    decisions = SubstringDedup()(texts)
    assert not any(decision.spans for decision in decisions[:60])
    for number, size in enumerate(sizes):
        first, second = decisions[60 + 2 * number : 62 + 2 * number]
        assert first.spans == () and first.text is None
        assert second.text == (f"<{number}> , then {number}" if size >= 50 else None)


def test_a_run_stays_inside_a_document_and_blanks_do_not_count():
    run = [f"w{i}" for i in range(60)]
    halves = [" ".join(run[:30]), " ".join(run[30:])]
    decisions = SubstringDedup()([*halves, *halves, " ".join(run), "\n\t ".join(run)])
    assert [decision.kept for decision in decisions] == [True] * 5 + [False]
    assert decisions[5].reason == "duplicate" and decisions[4].text is None


def test_what_is_left_is_joined_and_looked_at_again():
    """The third text without its run is the first one."""
    own, run = (" ".join(f"{name}{i}" for i in range(60)) for name in "or")
    half = " ".join(own.split()[:30]), " ".join(own.split()[30:])
    decisions = SubstringDedup()([own, run, f"{half[0]} {run} {half[1]}"])
    assert [decision.kept for decision in decisions] == [True, True, False]


@pytest.mark.parametrize("on", ["span", "document"])
@pytest.mark.parametrize("memory", [LEAST_MEMORY, 1 << 30])
def test_shards_and_little_memory_do_not_change_the_decisions(on, memory, tmp_path):
    """35,000 tokens make two parts of the hashes at 1 MiB, and the repeated text of several runs two chunks."""
    draw = random.Random(1)
    texts = planted(draw, [draw.randrange(20, 400) for _ in range(60)])
    texts += ["", "  ", "aa " * 2000, texts[3], texts[5] + " more", texts[5] + " other", "é ü" * 30]
    expected = SubstringDedup(30, on=on)(texts)
    assert sum(len(decision.spans) for decision in expected) > 30 or on == "document"
    for number, borders in enumerate([(), (20,), (0, 7, 7, 64)]):
        block = SubstringDedup(30, on=on, max_memory=memory)
        assert through_passes(block, texts, tmp_path / str(number), borders) == expected
    assert memory > LEAST_MEMORY or len(list((tmp_path / "0" / "work").glob("*.repeated.npy"))) > 1
    assert through_passes(block, [], tmp_path / "empty") == block([]) == []


def test_memory_of_the_passes_is_bounded(tmp_path):
    """At once 160,000 windows would take 32 bytes each, 5 MB, and as many repeated tokens 128 bytes each, 20 MB."""
    draw = random.Random(2)
    texts = [" ".join(f"w{draw.randrange(20_000)}" for _ in range(1000)) for _ in range(80)]
    block = SubstringDedup(max_memory=4 << 20)
    peaks = []

    def run(one):
        for rank in range(one.tasks):
            tracemalloc.start()
            one.steps[0](None, rank, one.tasks)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()

    through_passes(block, texts[:2], tmp_path / "first", (1,))  # imports what the steps need
    decisions = through_passes(block, [*texts, *texts], tmp_path / "all", (50, 100), run)
    assert [decision.kept for decision in decisions] == [True] * 80 + [False] * 80
    assert max(peaks) < 4 << 20


def test_tokens_of_a_tokenizer(tiny_llama):
    """The run has 12 words, but more than 20 tokens of the tokenizer."""
    _, tokenizer = tiny_llama
    run = "zq xj vk wy qz jx kv yw zj qx vy wk"
    texts = [f"Please tell me: {run} and more", f"Paris is {run}, and seven"]
    assert [decision.text for decision in SubstringDedup(20)(texts)] == [None, None]
    first, second = SubstringDedup(20, tokenizer=tokenizer)(texts)
    assert first.text is None
    assert second.text in ("Paris is, and seven", "Paris is , and seven")  # the blank may belong to the run


def test_a_sign_of_several_tokens_is_cut_whole_or_not_at_all(tiny_llama):
    """The tokenizer has one token for each byte of "€"; windows of 4 tokens end inside of its 3."""
    text = "€" * 8
    (decision,) = SubstringDedup(4, tokenizer=tiny_llama[1])([text])
    assert decision.text == text[: len(decision.text)] and 2 <= len(decision.text) < 8


def test_options_have_bounds():
    for options in ({"length": 0}, {"on": "sentence"}, {"max_memory": 1000}):
        with pytest.raises(ValueError, match="must be at least 1, on="):
            SubstringDedup(**options)
    with pytest.raises(ValueError, match="does not tell the places of its tokens. Give a fast one"):
        SubstringDedup(tokenizer=type("Slow", (), {"is_fast": False})())
