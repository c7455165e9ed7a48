"""Does a model that says 70 % turn out right 70 % of the time? ECE and the reliability diagram."""

from pathlib import Path

import numpy as np


def reliability_bins(confidence, correct, *, bins: int = 10) -> dict[str, np.ndarray]:
    """Confidence and accuracy in `bins` equal-width bins ((b−1)/bins, b/bins] of [0, 1]; 0 goes to the first.

    Args:
        confidence: [N], probabilities.
        correct: [N], whether each prediction was right.

    Returns:
        {"edges": [bins + 1], "count", "confidence", "accuracy": [bins]}; the means of an empty bin are NaN.

    Raises:
        ValueError: no prediction, unequal lengths, or a confidence outside [0, 1].
    """
    confidence, correct = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if confidence.shape != correct.shape or confidence.ndim != 1 or len(confidence) == 0:
        raise ValueError(
            f"confidence {confidence.shape} and correct {correct.shape} must be two lists of one length above 0."
        )
    if not ((confidence >= 0) & (confidence <= 1)).all():
        raise ValueError(f"confidence must lie in [0, 1]; got values from {confidence.min()} to {confidence.max()}.")
    edges = np.linspace(0.0, 1.0, bins + 1)
    index = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    count = np.bincount(index, minlength=bins)
    sums = [np.bincount(index, weights=values, minlength=bins) for values in (confidence, correct)]
    with np.errstate(invalid="ignore"):
        means = [values / count for values in sums]
    return {"edges": edges, "count": count, "confidence": means[0], "accuracy": means[1]}


def expected_calibration_error(confidence, correct, *, bins: int = 10) -> float:
    """ECE = Σ_b n_b/N · |accuracy_b − confidence_b| over equal-width bins; 0 is perfect, lower is better.

    Arguments and errors as `reliability_bins`.

    Reference: Naeini et al. 2015; Guo et al., https://arxiv.org/abs/1706.04599, Eq. 3.
    """
    table = reliability_bins(confidence, correct, bins=bins)
    full = table["count"] > 0
    gap = np.abs(table["accuracy"][full] - table["confidence"][full])
    return float((table["count"][full] * gap).sum() / table["count"].sum())


def plot_reliability(confidence, correct, path: str | Path, *, bins: int = 10, title: str = "Calibration") -> None:
    """Draw the reliability diagram to `path`: accuracy against confidence, and the number of predictions per bin."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    table = reliability_bins(confidence, correct, bins=bins)
    full, width = table["count"] > 0, 1.0 / bins
    middle = (table["edges"][:-1] + table["edges"][1:]) / 2
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(5, 6), height_ratios=(3, 1), layout="constrained")
    top.bar(middle[full], table["accuracy"][full], width=width * 0.95, label="accuracy")
    top.plot([0, 1], [0, 1], "k--", linewidth=1, label="perfect")
    top.plot(table["confidence"][full], table["accuracy"][full], "o", color="tab:red", label="mean confidence")
    ece = expected_calibration_error(confidence, correct, bins=bins)
    top.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy", title=f"{title}: ECE {ece:.3f}, n = {table['count'].sum()}")
    top.legend(loc="upper left")
    bottom.bar(middle, table["count"], width=width * 0.95, color="tab:gray")
    bottom.set(xlabel="confidence", ylabel="count")
    figure.savefig(path, dpi=120)
    plt.close(figure)
