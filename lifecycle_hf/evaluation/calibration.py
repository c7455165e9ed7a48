"""Calibration: whether a model that gives 70 % is right 70 % of the time (ECE, Brier score, NLL)."""

import numpy as np

from lifecycle_hf.evaluation.bootstrap import Measurement


def reliability_bins(confidence, correct, *, bins: int = 10) -> dict[str, np.ndarray]:
    """Return confidence and accuracy in `bins` equal-width bins ((b−1)/bins, b/bins] of [0, 1]; 0 is in the first.

    Args:
        confidence: [N], probabilities.
        correct: [N], whether each prediction was right.

    Returns:
        {"edges": [bins + 1], "count", "confidence", "accuracy": [bins]}; the means of an empty bin are NaN.

    Raises:
        ValueError: no prediction, unequal lengths, or a confidence outside [0, 1].
    """
    confidence, correct, index = _binned(confidence, correct, bins)
    count = np.bincount(index, minlength=bins)
    sums = [np.bincount(index, weights=values, minlength=bins) for values in (confidence, correct)]
    with np.errstate(invalid="ignore"):
        means = [values / count for values in sums]
    return {"edges": np.linspace(0.0, 1.0, bins + 1), "count": count, "confidence": means[0], "accuracy": means[1]}


def _binned(confidence, correct, bins):
    """Both as arrays [N], and the bin of each prediction."""
    confidence, correct = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if confidence.shape != correct.shape or confidence.ndim != 1 or len(confidence) == 0:
        raise ValueError(
            f"confidence {confidence.shape} and correct {correct.shape} must be two lists of one length above 0."
        )
    if not ((confidence >= 0) & (confidence <= 1)).all():
        raise ValueError(f"confidence must lie in [0, 1]; got values from {confidence.min()} to {confidence.max()}.")
    index = np.searchsorted(np.linspace(0.0, 1.0, bins + 1), confidence, side="left") - 1
    return confidence, correct, np.clip(index, 0, bins - 1)


def _sum_of_gaps(means):
    return np.abs(means).sum(-1)


def expected_calibration_error(confidence, correct, *, bins: int = 10) -> Measurement:
    """Return ECE = Σ_b n_b/N · |accuracy_b − confidence_b| over equal-width bins; 0 is perfect.

    Arguments and errors as `reliability_bins`. The items are the gaps correct_i − confidence_i, each in the column of
    its bin. The noise of few predictions per bin biases it upwards: a calibrated model's is above 0.

    Reference: Naeini et al. 2015; Guo et al., https://arxiv.org/abs/1706.04599, Eq. 3.
    """
    confidence, correct, index = _binned(confidence, correct, bins)
    gaps = np.zeros((len(index), bins))
    gaps[np.arange(len(index)), index] = correct - confidence
    return Measurement(gaps, _sum_of_gaps)


def brier_score(probabilities, labels) -> Measurement:
    """Return the mean over N of Σ_c (p_c − [c = label])², in [0, 2]; 0 is perfect.

    Args:
        probabilities: [N, C], of each class.
        labels: [N], the right classes.

    Raises:
        ValueError: shapes that do not fit, or rows that are no probabilities.

    Reference: Brier 1950, Eq. 2.
    """
    probabilities, labels = _checked(probabilities, labels)
    return Measurement(np.square(probabilities - np.eye(probabilities.shape[1])[labels]).sum(1))


def negative_log_likelihood(probabilities, labels) -> Measurement:
    """Return the mean over N of −log p_label, nats; lower is better. Arguments and errors as `brier_score`.

    Probabilities below 1e-300 count as that, so that the mean stays finite.

    Reference: Guo et al., https://arxiv.org/abs/1706.04599, Eq. 4.
    """
    probabilities, labels = _checked(probabilities, labels)
    return Measurement(-np.log(np.maximum(probabilities[np.arange(len(labels)), labels], 1e-300)))


def _checked(probabilities, labels):
    probabilities, labels = np.asarray(probabilities, dtype=np.float64), np.asarray(labels)
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or not len(labels):
        raise ValueError(f"probabilities {probabilities.shape} must be [N, C] and labels {labels.shape} [N], N > 0.")
    if not (probabilities >= 0).all() or not np.allclose(probabilities.sum(1), 1, atol=1e-4):
        raise ValueError("every row of probabilities must be at least 0 and sum to 1.")
    return probabilities, labels
