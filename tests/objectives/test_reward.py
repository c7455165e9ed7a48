import math

import pytest
import torch

from lifecycle_hf.objectives.reward import bradley_terry_loss


def test_values_by_hand():
    """−log σ(d): σ(0) = 1/2; σ(ln 3) = 3/4; σ(−ln 3) = 1/4."""
    chosen, rejected = torch.tensor([1.0, math.log(3), 0.0]), torch.tensor([1.0, 0.0, math.log(3)])
    expected = torch.tensor([math.log(2), math.log(4 / 3), math.log(4)])
    torch.testing.assert_close(bradley_terry_loss(chosen, rejected), expected)


@pytest.mark.parametrize("margin", [math.log(3), torch.tensor([math.log(3)])])
def test_margin_is_subtracted_inside_the_sigmoid(margin):
    """d = 2·ln 3 − ln 3 = ln 3."""
    loss = bradley_terry_loss(torch.tensor([2 * math.log(3)]), torch.tensor([0.0]), margin=margin)
    torch.testing.assert_close(loss, torch.tensor([math.log(4 / 3)]))


def test_far_apart_scores_stay_finite():
    chosen = torch.tensor([1000.0, -1000.0], requires_grad=True)
    loss = bradley_terry_loss(chosen, torch.zeros(2))
    loss.sum().backward()
    torch.testing.assert_close(loss, torch.tensor([0.0, 1000.0]))
    torch.testing.assert_close(chosen.grad, torch.tensor([0.0, -1.0]))


def test_gradcheck():
    chosen, rejected = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: bradley_terry_loss(a, b, margin=0.3), (chosen, rejected))
