"""Test objectives for single labelled answers: numbers computed by hand, and invariants."""

import math

import pytest
import torch

from lifecycle_hf.objectives.unpaired import class_balance, kto_loss, kto_reference_point

close = torch.testing.assert_close

OBJECTIVES = {
    "kto": kto_loss,
    "kto, weighted": lambda h, labels, z0: kto_loss(
        h, labels, z0, beta=0.4, desirable_weight=1.3, undesirable_weight=2.0
    ),
}


def test_kto_by_hand():
    # β = .1, z₀ = 2: at h = z₀ both are ½; h = z₀ + 10·ln 3: 1 − σ(ln 3) = ¼, and 1 − σ(−ln 3) = ¾
    h = torch.tensor([2.0, 2.0, 2.0 + 10 * math.log(3), 2.0 + 10 * math.log(3)])
    labels = torch.tensor([True, False, True, False])
    close(kto_loss(h, labels, 2.0), torch.tensor([0.5, 0.5, 0.25, 0.75]))


def test_kto_gradient_by_hand():
    # ∓λ·β·σ(1 − σ): ¼·.1 at the reference point, 3/16·.1 at σ = ¾; desirable answers are pushed up
    h = torch.tensor([0.0, 0.0, 10 * math.log(3)], requires_grad=True)
    kto_loss(h, torch.tensor([True, False, True]), 0.0).sum().backward()
    close(h.grad, torch.tensor([-0.025, 0.025, -0.1 * 3 / 16]))


def test_kto_matches_the_two_classes_written_apart():
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(32, generator=generator, dtype=torch.double) * 20
    labels = torch.rand(32, generator=generator) < 0.4
    loss = kto_loss(h, labels, torch.tensor(1.5), beta=0.2, desirable_weight=1.2, undesirable_weight=0.7)
    close(loss[labels], 1.2 * (1 - 1 / (1 + torch.exp(-0.2 * (h[labels] - 1.5)))))
    close(loss[~labels], 0.7 * (1 - 1 / (1 + torch.exp(-0.2 * (1.5 - h[~labels])))))


def test_loss_aversion_doubles_the_undesirable_losses_only():
    h, labels = torch.tensor([3.0, 3.0, -1.0, -1.0]), torch.tensor([True, False, True, False])
    averse = kto_loss(h, labels, 0.5, undesirable_weight=2.0)
    close(averse / kto_loss(h, labels, 0.5), torch.tensor([1.0, 2.0, 1.0, 2.0]))


def test_a_better_reference_point_makes_good_answers_dearer_and_bad_ones_cheaper():
    h, labels = torch.zeros(2), torch.tensor([True, False])
    low, high = kto_loss(h, labels, 0.0), kto_loss(h, labels, 4.0)
    assert high[0] > low[0]
    assert high[1] < low[1]


def test_reference_point_gets_no_gradient():
    h, z0 = torch.tensor([1.0, -1.0], requires_grad=True), torch.tensor(0.3, requires_grad=True)
    kto_loss(h, torch.tensor([True, False]), z0).sum().backward()
    assert z0.grad is None
    assert h.grad.abs().min() > 0


@pytest.mark.parametrize("label", [True, False])
def test_a_batch_of_one_class_is_finite(label):
    h = torch.tensor([0.0, 5.0, -5.0], requires_grad=True)
    loss = kto_loss(h, torch.full((3,), label), kto_reference_point(0.0, 0))
    loss.sum().backward()
    # σ(±.5) around ½; the sign of the slope is that of the label
    sign = 1 if label else -1
    close(loss, torch.tensor([0.5] + [1 / (1 + math.exp(sign * 0.1 * x)) for x in (5.0, -5.0)]))
    assert (h.grad * sign < 0).all()


def test_kto_saturates():
    h = torch.tensor([1e4, -1e4, 1e4, -1e4], requires_grad=True)
    loss = kto_loss(h, torch.tensor([True, True, False, False]), 1.0, desirable_weight=3.0, undesirable_weight=2.0)
    loss.sum().backward()
    close(loss, torch.tensor([0.0, 3.0, 2.0, 0.0]))
    close(h.grad, torch.zeros(4))


def test_small_losses_keep_their_digits():
    # 1 − σ(x) is e^−x for large x: written as such it would round to 0 in fp32
    close(
        kto_loss(torch.tensor([40.0]), torch.tensor([True]), 0.0, beta=1.0),
        torch.tensor([math.exp(-40)]),
        rtol=1e-5,
        atol=0,
    )


def test_sixteen_bit_inputs_are_computed_in_fp32():
    h, labels = torch.tensor([100.0, 3.0]).bfloat16(), torch.tensor([1, 0])
    loss = kto_loss(h, labels, torch.tensor(0.30078125).bfloat16())
    assert loss.dtype == torch.float32
    close(loss, kto_loss(h.float(), labels, 0.30078125), rtol=0, atol=0)


def test_reference_point_by_hand():
    close(kto_reference_point(torch.tensor(6.0), torch.tensor(4)), torch.tensor(1.5))
    close(kto_reference_point(torch.tensor(-6.0), torch.tensor(4)), torch.tensor(0.0))
    close(kto_reference_point(torch.tensor(0.0), torch.tensor(0)), torch.tensor(0.0))
    close(kto_reference_point(6.0, 4), torch.tensor(1.5))
    close(kto_reference_point(torch.tensor(6.0).double(), torch.tensor(4.0).double()), torch.tensor(1.5).double())


def test_reference_point_of_all_ranks_is_not_the_mean_of_theirs():
    # ranks with (sum, number) = (8, 2) and (−3, 3): 5/5 = 1; their means average to 1.5, clamped ones to 2
    total, count = torch.tensor([8.0, -3.0]), torch.tensor([2, 3])
    close(kto_reference_point(total.sum(), count.sum()), torch.tensor(1.0))


@pytest.mark.parametrize(
    "n_d, n_u, w_d, w_u, expected",
    [
        (100, 100, 1.0, 1.0, 1.0),
        (100, 300, 4.0, 1.0, 4 / 3),  # 4·100 / 300
        (300, 100, 1.0, 2.0, 1.5),
        (5, 0, 1.0, 1.0, math.inf),
        (0, 5, 1.0, 1.0, 0.0),
        (5, 5, 1.0, 0.0, math.inf),
    ],
)
def test_class_balance(n_d, n_u, w_d, w_u, expected):
    assert class_balance(n_d, n_u, desirable_weight=w_d, undesirable_weight=w_u) == pytest.approx(expected)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradcheck_batch_split_and_permutation(name):
    loss = OBJECTIVES[name]
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(6, generator=generator, dtype=torch.double) * 5
    labels = torch.tensor([True, False, False, True, True, False])
    assert torch.autograd.gradcheck(lambda x: loss(x, labels, 0.4), h.clone().requires_grad_())
    whole = loss(h, labels, 0.4)
    assert whole.shape == (6,)
    close(torch.cat([loss(h[:2], labels[:2], 0.4), loss(h[2:], labels[2:], 0.4)]), whole)
    order = torch.randperm(6, generator=generator)
    close(loss(h[order], labels[order], 0.4), whole[order])
