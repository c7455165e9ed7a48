"""DoReMi's excess loss and step of the weights: by hand, and against NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lifecycle_hf.objectives import domain_sums, doremi_weights, excess_loss


def test_excess_loss_by_hand():
    """Domain 0 has rows 0 and 2, domain 1 has row 1, domain 2 none; the last token of row 0 is not predicted."""
    nll = torch.tensor([[3.0, 1.0, 9.0], [2.0, 2.5, 1.0], [0.5, 4.0, 2.0]])
    reference = torch.tensor([[1.0, 2.0, 0.0], [1.5, 3.0, 1.0], [1.0, 1.0, 1.5]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 1]]).bool()
    # Row 0: 2, −1 -> 0. Row 2: −.5 -> 0, 3, .5. Row 1: .5, −.5 -> 0, 0.
    found = excess_loss(nll, reference, mask, torch.tensor([0, 1, 0]), 3)
    assert found.tolist() == [[2 + 3 + 0.5, 5], [0.5, 3], [0, 0]]
    assert (found[:2, 0] / found[:2, 1]).tolist() == pytest.approx([1.1, 1 / 6])


def test_the_step_of_the_weights_by_hand():
    """e^(η·λ) = 2, 1, 4 on (.5, .3, .2): 1, .3, .8 of 2.1; then .9 of these and .1 / 3."""
    step, excess = 0.5, torch.tensor([2 * np.log(2), 0.0, 4 * np.log(2)])
    found = doremi_weights(torch.tensor([0.5, 0.3, 0.2]).double(), excess, step_size=step, smoothing=0.1)
    assert found.tolist() == pytest.approx([0.9 * x / 2.1 + 0.1 / 3 for x in (1, 0.3, 0.8)])


def test_the_step_does_not_overflow():
    found = doremi_weights(torch.tensor([0.5, 0.5, 0.0]).double(), torch.tensor([5000.0, 0.0, 1.0]))
    assert found.tolist() == pytest.approx([0.999 + 1e-3 / 3, 1e-3 / 3, 1e-3 / 3])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 6), st.floats(0.01, 3), st.floats(0, 1))
def test_against_numpy(seed, count, step_size, smoothing):
    rng = np.random.default_rng(seed)
    nll, reference = rng.exponential(size=(2, 7, 5))
    mask, domains = rng.random((7, 5)) < 0.7, rng.integers(count, size=7)
    tensors = [torch.from_numpy(array) for array in (mask, domains)]
    found = excess_loss(torch.from_numpy(nll), torch.from_numpy(reference), *tensors, count)
    plain = domain_sums(torch.from_numpy(nll), *tensors, count)
    for k in range(count):
        tokens = [(a, b) for i in range(7) for a, b, m in zip(nll[i], reference[i], mask[i]) if m and domains[i] == k]
        assert found[k].tolist() == pytest.approx([sum(max(a - b, 0) for a, b in tokens), len(tokens)])
        assert plain[k].tolist() == pytest.approx([sum(a for a, _ in tokens), len(tokens)])
    weights, excess = rng.dirichlet(np.ones(count)), rng.exponential(size=count)
    moved = weights * np.exp(step_size * excess)
    expected = (1 - smoothing) * moved / moved.sum() + smoothing / count
    options = {"step_size": step_size, "smoothing": smoothing}
    after = doremi_weights(torch.from_numpy(weights), torch.from_numpy(excess), **options)
    assert after.numpy() == pytest.approx(expected) and after.sum() == pytest.approx(1)
