"""The best spans equal a search of all pairs; SQuAD's scores equal those worked out by hand."""

import pytest
import torch

from lifecycle_hf.evaluation.spans import best_spans, squad_scores


@pytest.mark.parametrize(("length", "longest", "n"), [(9, 3, 4), (6, 10, 50), (1, 1, 3), (20, 5, 1)])
def test_best_spans_are_those_of_all_pairs(length, longest, n):
    starts, ends = torch.randn(3, length), torch.randn(3, length)
    allowed = torch.rand(3, length) > 0.3
    allowed[:, 0] = True
    scores, first, last = best_spans(starts, ends, allowed, n=n, max_length=longest)
    assert scores.shape == first.shape == last.shape == (3, n)
    for row in range(3):
        pairs = [
            ((starts[row, i] + ends[row, j]).item(), i, j)
            for i in range(length)
            for j in range(i, length)
            if j - i < longest and allowed[row, i] and allowed[row, j]
        ]
        found = list(zip(scores[row].tolist(), first[row].tolist(), last[row].tolist()))
        found = [pair for pair in found if pair[0] > -torch.inf]
        assert found == sorted(pairs, reverse=True)[:n]


CASES = [
    # prediction, right answers, exact match, F1
    ("Paris", ["Paris"], 1, 1),
    ("paris", ["Paris"], 1, 1),
    ("Paris.", ["Paris"], 1, 1),
    ("the Paris", ["Paris"], 1, 1),
    ("The Eiffel Tower", ["Eiffel Tower"], 1, 1),
    ("an apple", ["a apple"], 1, 1),
    ("theatre", ["the atre"], 0, 0),  # "the" is taken away as a word only
    ("New  York", ["New York"], 1, 1),
    (" New York ", ["New York"], 1, 1),
    ("New York", ["York"], 0, 2 / 3),  # P = 1/2, R = 1
    ("York", ["New York City"], 0, 1 / 2),  # P = 1, R = 1/3
    ("a b c d", ["b c e"], 0, 2 / 3),  # of b c d and b c e both have b and c
    ("Rome", ["Paris"], 0, 0),
    ("Rome", ["Paris", "Rome"], 1, 1),
    ("New York", ["York", "New York City"], 0, 4 / 5),  # the better of 2/3 and 4/5
    ("go go go", ["go"], 0, 1 / 2),  # one "go" in common: P = 1/3, R = 1
    ("go go", ["go go go"], 0, 4 / 5),
    ("U.S.A.", ["USA"], 1, 1),
    ("twenty-one", ["twenty one"], 0, 0),  # the hyphen joins the two
    ("$1.50", ["150"], 1, 1),
    ("", [], 1, 1),
    ("Paris", [], 0, 0),
    ("", ["Paris"], 0, 0),
    ("the", [], 1, 1),  # nothing is left of it
    ("", ["the"], 1, 1),  # nor of this right answer
    ("Paris", ["the", "Paris"], 1, 1),
    ("", ["...", "Paris"], 0, 0),  # answers that become empty do not count beside others
    ("Größe", ["größe"], 1, 1),
]


@pytest.mark.parametrize(("prediction", "answers", "exact", "f1"), CASES)
def test_squad_scores_by_hand(prediction, answers, exact, f1):
    assert squad_scores(prediction, answers) == (exact, pytest.approx(f1))
