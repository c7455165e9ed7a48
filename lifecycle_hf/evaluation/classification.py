"""Metrics of classifiers and of regression: accuracy, F1, and correlation, with the rows that they come from."""

import numpy as np

from lifecycle_hf.evaluation.bootstrap import Measurement


def _f1(hits: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """Return 2·TP / (2·TP + FP + FN), NaN where there is nothing to find and nothing was found."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return 2 * hits / (2 * hits + wrong)


def _macro(means: np.ndarray) -> np.ndarray:
    f1 = _f1(*np.split(means, 2, axis=-1))
    known = ~np.isnan(f1)
    return np.where(known, f1, 0).sum(-1) / np.maximum(known.sum(-1), 1)


def _micro(means: np.ndarray) -> np.ndarray:
    return np.nan_to_num(_f1(*(part.sum(-1) for part in np.split(means, 2, axis=-1))))


def f1_score(predicted, labels, *, average: str = "macro") -> Measurement:
    """Return F1, in [0, 1]: F1_c = 2·TP_c / (2·TP_c + FP_c + FN_c) of each class, or of all classes together.

    Args:
        predicted, labels: [N, C], whether each class was predicted, and whether it holds. Of single labels give the
            one-hot rows.
        average: "macro" for the mean over the classes that occur in labels or predictions, "micro" for the F1 of the
            counts summed over all classes.

    Raises:
        ValueError: unequal shapes, no row, or an unknown `average`.

    Reference: Opitz and Burst, https://arxiv.org/abs/1911.03347, Eq. 2 (macro).
    """
    predicted, labels = np.asarray(predicted, dtype=bool), np.asarray(labels, dtype=bool)
    if predicted.shape != labels.shape or predicted.ndim != 2 or average not in ("macro", "micro"):
        raise ValueError(
            f"f1_score: predicted {predicted.shape} and labels {labels.shape} must be two tables [N, C] of one shape, "
            f"and {average=} 'macro' or 'micro'."
        )
    counts = np.hstack([predicted & labels, predicted ^ labels])
    return Measurement(counts, _macro if average == "macro" else _micro)


def _correlation(means: np.ndarray) -> np.ndarray:
    x, y, xx, yy, xy = np.moveaxis(means, -1, 0)
    spread = np.sqrt(np.maximum(xx - x * x, 0) * np.maximum(yy - y * y, 0))
    return np.divide(xy - x * y, spread, out=np.zeros_like(spread), where=spread > 1e-12)


def pearson_correlation(predicted, targets) -> Measurement:
    """Return the correlation of two lists of numbers, in [−1, 1]; 0 if one of them is constant.

    Raises:
        ValueError: lists of unequal lengths, or no number.
    """
    columns = [np.asarray(values, dtype=np.float64) for values in (predicted, targets)]
    if columns[0].shape != columns[1].shape or columns[0].ndim != 1 or not columns[0].size:
        shapes = " and ".join(str(column.shape) for column in columns)
        raise ValueError(f"pearson_correlation: {shapes} must be two lists of one length above 0.")
    x, y = ((column - column.mean()) / (column.std() or 1) for column in columns)
    return Measurement(np.stack([x, y, x * x, y * y, x * y], axis=1), _correlation)


def spearman_correlation(predicted, targets) -> Measurement:
    """Return the correlation of the ranks of two lists of numbers; equal numbers share the mean of their ranks.

    A resample of its bootstrap interval keeps the ranks that the rows have in the whole list. Errors are those of
    [`pearson_correlation`].
    """
    from scipy.stats import rankdata  # slow to import, and few processes need it

    return pearson_correlation(rankdata(predicted), rankdata(targets))
