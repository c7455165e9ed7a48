import copy
import json
import math
import pickle

import numpy as np
import pytest
from scipy import stats

from lifecycle_hf.evaluation.bootstrap import Measurement, bootstrap_interval, exp_ratio, holm, jackknife, ratio


def test_a_measurement_is_a_float_that_remembers():
    """exp((2 + 4 + 3) / (1 + 2 + 2)), not the mean of e², e² and e^1.5."""
    one = Measurement([[2, 1], [4, 2], [3, 2]], exp_ratio)
    assert one == pytest.approx(np.e**1.8)
    assert json.loads(json.dumps({"x": one})) == {"x": float(one)} and type(float(one)) is float
    for copied in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert copied == one and (copied.columns == one.columns).all() and copied.statistic is exp_ratio
    assert Measurement([True, False, True, True]) == 0.75


@pytest.mark.parametrize("items", [[], [[]], 1.0, [np.nan], [[[1.0]]]])
def test_senseless_items_are_refused(items):
    with pytest.raises(ValueError, match="finite items"):
        Measurement(items)


def test_the_interval_is_that_of_resampling_one_by_one():
    items = np.random.default_rng(1).gamma(2.0, size=(40, 2))
    rng, draws = np.random.default_rng(2), []
    for _ in range(4000):
        a, b = items[rng.integers(40, size=40)].sum(0)
        draws.append(a / b)
    expected = np.quantile(draws, [0.05, 0.95])
    got = bootstrap_interval(Measurement(items, ratio), level=0.9, resamples=4000)
    assert np.allclose(got, expected, atol=0.1 * (expected[1] - expected[0]))
    assert (
        got
        == bootstrap_interval(Measurement(items, ratio), level=0.9, resamples=4000)
        != bootstrap_interval(Measurement(items, ratio), level=0.9, resamples=4000, seed=1)
    )


def test_pairing_removes_what_the_items_have_in_common():
    """The difference of the same items before and after is −1 each: no spread is left, whatever the items' own."""
    items = np.random.default_rng(0).normal(size=50)
    low, high = bootstrap_interval(Measurement(items), Measurement(items + 1))
    assert low == pytest.approx(-1) and high == pytest.approx(-1)
    low, high = bootstrap_interval(Measurement(items), Measurement(np.append(items, 0.0) + 1))
    assert high - low > 0.5 and low < -1 < high


def accuracy(rng):
    before = rng.random(150) < 0.7
    return Measurement(before), Measurement(np.where(rng.random(150) < 0.1, ~before, before))


def perplexities(rng):
    tokens, nll = rng.integers(5, 60, 150), rng.gamma(16, 0.125, 150)
    after = nll + rng.normal(0.1, 0.2, 150)
    return tuple(Measurement(np.stack([tokens * each, tokens], 1), exp_ratio) for each in (nll, after))


SIMULATIONS = {
    "mean": (lambda rng: (Measurement(rng.gamma(4.0, size=150)),), 4.0),
    "ratio": (lambda rng: perplexities(rng)[:1], np.exp(2.0)),
    "paired accuracies": (accuracy, 0.7 - (0.7 * 0.9 + 0.3 * 0.1)),
    "paired perplexities": (perplexities, np.exp(2.0) - np.exp(2.1)),
    "other items": (lambda rng: (Measurement(rng.random(150) < 0.7), Measurement(rng.random(90) < 0.5)), 0.2),
}


@pytest.mark.parametrize("level", [0.8, 0.95])
@pytest.mark.parametrize("name", SIMULATIONS)
def test_intervals_cover_at_their_nominal_rate(name, level):
    """Of 600 simulated runs the intervals hold the truth as often as they say, within 3 standard errors (+1 %)."""
    draw, truth = SIMULATIONS[name]
    rng, runs = np.random.default_rng(5), 600
    intervals = (bootstrap_interval(*draw(rng), level=level, resamples=400, seed=seed) for seed in range(runs))
    covered = np.mean([low <= truth <= high for low, high in intervals])
    assert abs(covered - level) < 3 * (level * (1 - level) / runs) ** 0.5 + 0.01, covered


@pytest.mark.parametrize(("items", "level"), [([1.0], 0.95), ([1.0, 2.0], 1.0)])
def test_no_interval_from_one_item_or_at_certainty(items, level):
    with pytest.raises(ValueError, match="two items or more"):
        bootstrap_interval(Measurement(items), level=level)


def test_jackknife_of_a_mean_is_students_interval():
    values = np.array([0.2, 0.5, 0.1, 0.4, 0.9])
    found = jackknife(lambda runs: values[runs].mean(), len(values), level=0.9)
    wanted = stats.ttest_1samp(values, 0)
    assert found.estimate == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx(tuple(wanted.confidence_interval(0.9)))
    assert found.p == pytest.approx(wanted.pvalue)


def test_jackknife_of_what_one_run_alone_makes_finite():
    found = jackknife(lambda runs: 1.0 if 0 in runs else math.nan, 3)
    assert found.estimate == 1 and math.isnan(found.low) and math.isnan(found.p)
    with pytest.raises(ValueError, match="two runs"):
        jackknife(lambda runs: 0.0, 1)


def test_holm_by_hand():
    """Of three: 0.01·3; 0.02·2 = 0.04; max(0.03·1, 0.04). The NaN counts, so four: 0.01·4, 0.02·3, 0.03·2."""
    assert holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.03, 0.01, math.nan, 0.02]) == pytest.approx([0.06, 0.04, math.nan, 0.06], nan_ok=True)
    assert holm([0.6, 0.9]) == [1.0, 1.0] and holm([]) == []
