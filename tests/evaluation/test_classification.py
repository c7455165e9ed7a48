"""Metrics of classifiers by hand and against scipy, with intervals."""

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr

from lifecycle_hf.evaluation.bootstrap import bootstrap_interval
from lifecycle_hf.evaluation.classification import f1_score, pearson_correlation, spearman_correlation


def one_hot(classes, count):
    return np.array(classes)[:, None] == np.arange(count)


def test_macro_f1_is_the_mean_over_classes_that_occur():
    """Class 0: TP 2, FP 1, FN 0, F1 4/5. Class 1: TP 1, FP 0, FN 1, F1 2/3. Class 2: FP 0, FN 0: it does not occur."""
    predicted, labels = one_hot([0, 0, 0, 1], 3), one_hot([0, 0, 1, 1], 3)
    assert f1_score(predicted, labels) == pytest.approx((4 / 5 + 2 / 3) / 2)
    # 3 hits, one false positive and one false negative
    assert f1_score(predicted, labels, average="micro") == pytest.approx(6 / 8)


def test_f1_of_several_labels():
    """Class 0: TP 1, FP 1, FN 0, F1 2/3. Class 1: TP 0, FP 0, FN 2, F1 0. Together TP 1, FP 1, FN 2, F1 2/5."""
    predicted, labels = [[1, 0], [1, 0]], [[1, 1], [0, 1]]
    assert f1_score(predicted, labels) == pytest.approx(1 / 3)
    assert f1_score(predicted, labels, average="micro") == pytest.approx(2 / 5)
    nothing = np.zeros((3, 2))
    assert f1_score(nothing, nothing, average="micro") == f1_score(nothing, nothing) == 0


def test_intervals_hold_the_value():
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=200)
    predicted = np.where(rng.random(200) < 0.7, labels, rng.integers(3, size=200))
    for average in ("macro", "micro"):
        value = f1_score(one_hot(predicted, 3), one_hot(labels, 3), average=average)
        low, high = bootstrap_interval(value)
        assert low < value < high and 0.05 < high - low < 0.3


def test_correlations_are_scipys():
    rng = np.random.default_rng(1)
    x = np.round(rng.normal(size=50) * 3)  # with ties
    y = x + rng.normal(size=50) * 2 + 1000
    assert pearson_correlation(x, y) == pytest.approx(pearsonr(x, y).statistic, abs=1e-12)
    assert spearman_correlation(x, y) == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)
    low, high = bootstrap_interval(pearson_correlation(x, y))
    assert low < pearsonr(x, y).statistic < high
    assert pearson_correlation(x, np.ones(50)) == 0


@pytest.mark.parametrize("call", [lambda: f1_score([0, 1], [0, 1]), lambda: f1_score([[1]], [[1]], average="mean"),
                                  lambda: pearson_correlation([1], [1, 2])])  # fmt: skip
def test_what_does_not_fit(call):
    with pytest.raises(ValueError, match="must be two"):
        call()
