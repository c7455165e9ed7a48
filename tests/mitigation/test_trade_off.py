import pytest
import torch

from lifecycle_hf.mitigation.trade_off import LagrangeMultiplier


def solve(objective, measure, multiplier, steps=2000):
    """Gradient descent on f + weight·c with dual ascent after each step, from x = 3."""
    x = torch.tensor(3.0, requires_grad=True)
    for _ in range(steps):
        value = measure(x)
        (gradient,) = torch.autograd.grad(objective(x) + multiplier.weight * value, x)
        multiplier.update(value.item())
        with torch.no_grad():
            x -= 0.02 * gradient
    return x.item(), multiplier.value


@pytest.mark.parametrize(
    ("objective", "measure", "options", "x", "value"),
    [
        # min (x − 2)², x² ≤ 1: at x = 1 the gradient 2(x − 2) + λ·2x is 0 for λ = 1
        (lambda x: (x - 2) ** 2, lambda x: x**2, {"limit": 1.0}, 1.0, 1.0),
        # min x², x ≥ 1: 2x − λ = 0 at x = 1
        (lambda x: x**2, lambda x: x, {"limit": 1.0, "sense": "at_least"}, 1.0, 2.0),
        # slack: the minimum 2 of (x − 2)² has x² = 4 ≤ 5
        (lambda x: (x - 2) ** 2, lambda x: x**2, {"limit": 5.0}, 2.0, 0.0),
        # x² ≤ −1 can't be met: λ goes to its cap, where 2(x − 2) + 3·2x = 0
        (lambda x: (x - 2) ** 2, lambda x: x**2, {"limit": -1.0, "maximum": 3.0}, 0.5, 3.0),
    ],
)
def test_converges_to_the_point_and_the_price_of_the_kkt_conditions(objective, measure, options, x, value):
    found = solve(objective, measure, LagrangeMultiplier(rate=0.02, **options))
    assert found == pytest.approx((x, value), abs=1e-3)


def test_ascent_by_hand():
    ceiling = LagrangeMultiplier(2.0, rate=0.5, maximum=1.0, initial=0.2)
    ceiling.update(3.0)
    assert (ceiling.weight, ceiling.violation) == (pytest.approx(0.7), 1.0)
    ceiling.update(float("inf"))
    assert ceiling.value == pytest.approx(0.7)
    ceiling.update(9.0)
    assert ceiling.value == 1.0
    ceiling.update(-9.0)
    assert ceiling.value == 0.0
    floor = LagrangeMultiplier(2.0, sense="at_least", rate=0.5)
    floor.update(1.0)
    assert (floor.value, floor.weight, floor.violation) == (0.5, -0.5, 1.0)
    other = LagrangeMultiplier(2.0, sense="at_least", rate=0.5)
    other.load_state_dict(floor.state_dict())
    assert other.weight == -0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sense": "below"}, "sense='below'"),
        ({"limit": float("nan")}, "limit=nan"),
        ({"rate": 0.0}, "rate=0.0"),
        ({"initial": 2.0, "maximum": 1.0}, "initial=2.0 <= maximum=1.0"),
    ],
)
def test_senseless_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LagrangeMultiplier(**({"limit": 1.0, "rate": 1.0} | options))
