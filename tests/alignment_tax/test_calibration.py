import numpy as np
import pytest
import torch

from lifecycle_hf.alignment_tax.calibration import expected_calibration_error, plot_reliability, reliability_bins


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


def test_plot(tmp_path):
    plot_reliability([0.6, 0.9], [True, False], tmp_path / "calibration.png")
    assert (tmp_path / "calibration.png").read_bytes()[1:4] == b"PNG"
