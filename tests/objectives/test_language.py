"""Losses of language models by hand: label smoothing."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from lifecycle_hf.objectives import masked_lm_loss


def test_label_smoothing_by_hand():
    """p = (½, ¼, ¼): −log p of the first is ln 2; the mean of −log p is (ln 2 + 2·ln 4) / 3 = 5/3·ln 2."""
    logits = torch.tensor([[[2.0, 1.0, 1.0]] * 2]).log()
    found = masked_lm_loss(logits, torch.tensor([[0, -100]]), 0.3)
    expected = 0.7 * math.log(2) + 0.3 * 5 / 3 * math.log(2)
    assert found.tolist() == [[pytest.approx(expected, rel=1e-6), 0.0]]


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_label_smoothing_is_torchs(smoothing):
    logits, labels = torch.randn(3, 5, 7), torch.randint(7, (3, 5))
    labels[0, 2:] = labels[2, 0] = -100
    mean = masked_lm_loss(logits, labels, smoothing).sum() / (labels != -100).sum()
    expected = cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=smoothing)
    torch.testing.assert_close(mean, expected)
