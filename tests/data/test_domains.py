"""Domains of a corpus: shares from weights and files, rows drawn by them, and bad input."""

from collections import Counter

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st

from lifecycle_hf import InstructionMixture, InstructionTask
from lifecycle_hf.data.domains import DomainRows, join_domains, shares_of, split_domains


class Numbers(torch.utils.data.Dataset):
    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        assert 0 <= index < self.size
        return {"place": index}


def rows(sizes, shares, seed=0):
    return DomainRows({f"d{k}": Numbers(size) for k, size in enumerate(sizes)}, np.array(shares), seed=seed)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(0, 10**6), st.data())
def test_domains_have_their_shares_in_every_window_and_rows_come_once_in_a_pass(sizes, seed, data):
    parts = data.draw(st.lists(st.integers(0, 5), min_size=len(sizes), max_size=len(sizes)).filter(any))
    shares = np.array(parts) / sum(parts)
    found = rows(sizes, shares, seed)
    drawn = {k: [] for k in range(len(sizes))}
    for epoch in range(2):
        found.set_epoch(epoch)
        for i in range(len(found)):
            row = found[i]
            drawn[row["domain"]].append(row["place"])
    for k, places in drawn.items():
        for first in range(0, len(places), sizes[k]):
            lap = places[first : first + sizes[k]]
            assert len(set(lap)) == len(lap)
    window = min(20, len(found))
    for first in range(len(found) - window + 1):
        counts = np.bincount(found.domains[first : first + window], minlength=len(sizes))
        assert np.abs(counts - window * shares).max() < 4
        assert not counts[shares == 0].any()


def test_rows_depend_on_seed_epoch_and_index_alone():
    shares, sizes = [0.25, 0.75], (30, 50)
    one, other = rows(sizes, shares, 3), rows(sizes, shares, 3)
    whole = [one[i] for i in range(80)]
    other.set_epoch(1)
    assert [other[i] for i in range(80)] != whole
    other.set_epoch(0)
    assert [other[i] for i in reversed(range(80))] == whole[::-1] != [rows(sizes, shares, 4)[i] for i in range(80)]
    assert abs(Counter(row["domain"] for row in whole)[1] - 0.75 * 80) <= 1
    with pytest.raises(IndexError, match="row 80 of 80"):
        one[80]


def test_domains_are_joined_and_split():
    data = join_domains({"b": ["one", "two"], "a": iter(["three"])})
    assert data.to_dict() == {"text": ["one", "two", "three"], "domain": ["b", "b", "a"]}
    parts = split_domains(data, "corpus")
    assert {name: list(part["text"]) for name, part in parts.items()} == {"a": ["three"], "b": ["one", "two"]}
    with pytest.raises(ValueError, match="domain 'empty' has no row"):
        join_domains({"full": ["text"], "empty": []})


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (Dataset.from_dict({"text": ["a"]}), r"corpus has the columns \['text'\]: add 'domain'"),
        (Dataset.from_dict({"text": ["a", "b"], "domain": ["x", None]}), "corpus: 1 rows have no domain.* is row 1"),
        (IterableDataset.from_generator(lambda: iter([{}])), "corpus is a IterableDataset"),
        (None, "corpus is a NoneType"),
    ],
)
def test_a_corpus_without_domains(data, problem):
    with pytest.raises(ValueError, match=problem):
        split_domains(data, "corpus")


def test_shares_from_a_mapping_and_from_a_file(tmp_path):
    assert shares_of({"a": 1, "b": 3}, ["b", "a"], "w").tolist() == [0.75, 0.25]
    (tmp_path / "w.yaml").write_text(yaml.safe_dump({"weights": {"a": 2, 7: 6}, "steps": 3}))
    for path in (tmp_path / "w.yaml", str(tmp_path / "w.yaml")):
        assert shares_of(path, ["a", "7"], "w").tolist() == [0.25, 0.75]


@pytest.mark.parametrize(
    ("weights", "problem"),
    [
        ({"a": 1, "c": 1, "d": 1}, "w needs a weight.*; missing: b; unknown: c, d"),
        ({"a": 1}, "w needs a weight, and nothing else has one; missing: b"),
        ({"a": 1, "b": -1}, "w needs a number.*none may be negative"),
        ({"a": 0, "b": 0}, "their sum must be positive"),
        ({"a": 1, "b": "much"}, "w needs a number, not .*'b': 'much'"),
    ],
)
def test_weights_that_do_not_fit(weights, problem):
    with pytest.raises(ValueError, match=problem):
        shares_of(weights, ["a", "b"], "w")


def test_a_file_without_weights(tmp_path):
    (tmp_path / "w.yaml").write_text("a: 1\nb: 2\n")
    with pytest.raises(ValueError, match=r"w: .*w.yaml must hold a mapping 'weights'"):
        shares_of(tmp_path / "w.yaml", ["a", "b"], "w")


def test_a_mixture_reads_the_file(tmp_path):
    (tmp_path / "found.yaml").write_text(yaml.safe_dump({"weights": {"a": 0.2, "b": 0.8}}))
    given = [{"name": name, "rows": f"{name}.jsonl"} for name in "ab"]
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text('{"instruction": "say", "output": "yes"}\n')
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump({"tasks": given, "weights": "found.yaml"}))
    mixture = InstructionMixture.from_yaml(tmp_path / "mixture.yaml")
    assert mixture.rates.tolist() == pytest.approx([0.2, 0.8])
    again = InstructionMixture(mixture.tasks, weights=tmp_path / "found.yaml")
    assert isinstance(again.tasks[0], InstructionTask) and again.rates.tolist() == pytest.approx([0.2, 0.8])
