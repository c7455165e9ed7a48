import math

import numpy as np
import pytest
import torch

from lifecycle_hf.evaluation.calibration import (
    brier_score,
    expected_calibration_error,
    negative_log_likelihood,
    reliability_bins,
)


def test_ece_by_hand():
    """Bin (.5, .6]: 2 rows, accuracy 1/2, confidence .55; bin (.8, .9]: 2 rows, accuracy 1, confidence .85.

    ECE = 2/4·|.5 − .55| + 2/4·|1 − .85| = .025 + .075 = .1
    """
    confidence, correct = [0.52, 0.58, 0.84, 0.86], [True, False, True, True]
    assert expected_calibration_error(confidence, correct) == pytest.approx(0.1, abs=1e-12)
    assert expected_calibration_error(torch.tensor(confidence), torch.tensor(correct)) == pytest.approx(0.1, abs=1e-6)
    table = reliability_bins(confidence, correct)
    assert table["count"].tolist() == [0, 0, 0, 0, 0, 2, 0, 0, 2, 0]
    assert table["accuracy"][[5, 8]].tolist() == [0.5, 1.0]
    assert np.isnan(table["accuracy"][0])


def test_one_bin_is_the_gap_of_the_means():
    """|mean accuracy − mean confidence| = |2/3 − .7|."""
    assert expected_calibration_error([0.9, 0.7, 0.5], [1, 1, 0], bins=1) == pytest.approx(0.7 - 2 / 3)


def test_edges_belong_to_the_lower_bin_and_zero_to_the_first():
    assert reliability_bins([0.0, 0.5, 1.0], [0, 1, 1], bins=2)["count"].tolist() == [2, 1]


def test_calibrated_predictions_have_no_error():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1, 200_000)
    assert expected_calibration_error(confidence, rng.uniform(size=200_000) < confidence) < 0.01


@pytest.mark.parametrize(
    ("confidence", "correct", "words"),
    [
        ([], [], "above 0"),
        ([0.5], [1, 0], "one length"),
        ([1.2], [1], r"\[0, 1\]"),
        ([float("nan")], [1], r"\[0, 1\]"),
    ],
)
def test_bad_input(confidence, correct, words):
    with pytest.raises(ValueError, match=words):
        reliability_bins(confidence, correct)


PROBABILITIES, LABELS = [[0.5, 0.25, 0.25], [0.1, 0.9, 0.0]], [0, 0]


def test_brier_and_nll_by_hand():
    """Brier: (1/4 + 1/16 + 1/16 + .81 + .81) / 2. NLL: (log 2 + log 10) / 2."""
    assert brier_score(PROBABILITIES, LABELS) == pytest.approx((0.375 + 1.62) / 2)
    assert negative_log_likelihood(PROBABILITIES, LABELS) == pytest.approx(math.log(20) / 2)
    assert brier_score([[0.0, 1.0]], [1]) == 0 and negative_log_likelihood([[0.0, 1.0]], [0]) < 700


@pytest.mark.parametrize(("probabilities", "labels"), [([0.5], [0]), ([[0.5, 0.6]], [0]), ([[0.5, 0.5]], [0, 1])])
def test_what_is_no_distribution(probabilities, labels):
    for score in (brier_score, negative_log_likelihood):
        with pytest.raises(ValueError, match="probabilities"):
            score(probabilities, labels)


@pytest.mark.parametrize("bins", [10, 15])
def test_against_torchmetrics(bins):
    """Top-label ECE, and the Brier score as C times the mean squared error against one-hot labels."""
    torchmetrics = pytest.importorskip("torchmetrics")
    rng = np.random.default_rng(0)
    probabilities, labels = rng.dirichlet([0.5] * 4, size=500), rng.integers(4, size=500)
    p, y = torch.tensor(probabilities), torch.tensor(labels)
    theirs = torchmetrics.classification.MulticlassCalibrationError(4, n_bins=bins).set_dtype(torch.float64)(p, y)
    ours = expected_calibration_error(probabilities.max(1), probabilities.argmax(1) == labels, bins=bins)
    assert ours == pytest.approx(theirs.item(), abs=1e-6)
    one_hot = torch.nn.functional.one_hot(y, 4).double()
    squared = torchmetrics.MeanSquaredError().set_dtype(torch.float64)(p.contiguous(), one_hot)
    assert brier_score(probabilities, labels) == pytest.approx(4 * squared.item(), abs=1e-6)
    assert negative_log_likelihood(probabilities, labels) == pytest.approx(
        torch.nn.functional.nll_loss(p.log(), y).item(), abs=1e-9
    )
