import math

import pytest

from lifecycle_hf.mitigation.kl_control import AdaptiveKL, ExponentialKL, FixedKL, KLBudget, ZieglerKL


def test_fixed_stays():
    control = FixedKL(0.1)
    control.update(100.0, 64)
    assert control.kl_coef == 0.1


def test_ziegler_by_hand():
    control = ZieglerKL(0.1, target=6.0, horizon=1000)
    control.update(6.6, 100)  # error .1 → ×(1 + .1·.1)
    assert control.kl_coef == pytest.approx(0.1 * 1.01)
    control.update(60.0, 100)  # error clipped to .2
    assert control.kl_coef == pytest.approx(0.1 * 1.01 * 1.02)
    control.update(0.0, 100)  # clipped to −.2
    assert control.kl_coef == pytest.approx(0.1 * 1.01 * 1.02 * 0.98)


def test_ziegler_never_turns_negative_however_large_the_update():
    control = ZieglerKL(0.1, target=6.0, horizon=64)
    control.update(0.0, 64 * 100)
    assert control.kl_coef == pytest.approx(0.1 * 0.8)


def test_adaptive_by_hand():
    """log β in steps; the errors are log-ratios, clipped to ±1."""
    control, log = AdaptiveKL(0.4, target=6.0, horizon=128), math.log(0.4)
    control.update(6 / math.e**0.5, 64)  # e = −.5; half a horizon; no error before
    log += 0.03 * -0.5 / 2
    assert math.log(control.kl_coef) == pytest.approx(log)
    control.update(6 * math.e**0.25, 64)
    log += 0.75 + 0.2 * 0.25 / 2
    assert math.log(control.kl_coef) == pytest.approx(log)
    control.update(6 * math.e**9, 640)  # clipped to 1; the update counts as one horizon
    log += 0.75 + 0.2 * 1
    assert math.log(control.kl_coef) == pytest.approx(log)
    control.update(0.0, 64)  # clipped to −1; β was above its start
    log += -2 + 0.2 * -1 / 2
    assert math.log(control.kl_coef) == pytest.approx(log) and control.kl_coef < 0.4
    control.update(0.0, 64)
    log += 0.03 * -1 / 2
    assert math.log(control.kl_coef) == pytest.approx(log)


def test_adaptive_keeps_its_minimum():
    control = AdaptiveKL(0.4, target=6.0, horizon=64, minimum=0.35)
    for _ in range(9):
        control.update(0.0, 64)
    assert control.kl_coef == pytest.approx(0.35)


def test_exponential_by_hand_and_clamped():
    control = ExponentialKL(0.1, rate=0.2, maximum=0.5)
    control.update(5.0, 1)
    assert control.kl_coef == pytest.approx(0.1 * math.e)
    control.update(1e9, 1)
    assert control.kl_coef == 0.5


def test_budget_by_hand():
    control, seen = KLBudget(0.1, budget=5.0, rate=0.1, maximum=1.0), []
    for kl in (4.0, 7.0, 6.0, 3.0, 1e9, float("nan"), 1.0):
        control.update(kl, 8)
        seen.append(control.kl_coef)
    # λ: slack at the floor, + .1·2, + .1·1, − .1·2, capped at 1 − .1, left by what is not finite, − .1·4
    assert seen == pytest.approx([0.1, 0.3, 0.4, 0.2, 1.0, 1.0, 0.6])
    assert [control.rejects(kl) for kl in (-0.2, 5.0, 5.001, float("nan"))] == [False, False, True, True]
    other = KLBudget(0.1, budget=5.0, rate=0.1, maximum=1.0)
    other.load_state_dict(control.state_dict())
    other.update(4.0, 8)
    assert other.kl_coef == pytest.approx(0.5)


def test_state_goes_on_where_it_was():
    control, other = (AdaptiveKL(0.1, target=6.0, horizon=10) for _ in range(2))
    control.update(9.0, 4)
    other.load_state_dict(control.state_dict())
    control.update(2.0, 4), other.update(2.0, 4)
    assert control.kl_coef == other.kl_coef


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: FixedKL(-1), "kl_coef"),
        (lambda: AdaptiveKL(0.0, target=6, horizon=10), "kl_coef"),
        (lambda: AdaptiveKL(0.1, target=0, horizon=10), "target"),
        (lambda: AdaptiveKL(0.1, target=6, horizon=10, minimum=0.2), "minimum"),
        (lambda: ExponentialKL(2.0, rate=1), "maximum"),
        (lambda: KLBudget(0.1, budget=0.0), "budget"),
        (lambda: KLBudget(1.0, budget=1.0), "maximum"),
    ],
)
def test_senseless_options_are_named(make, name):
    with pytest.raises(ValueError, match=name):
        make()
