import json
import math

import numpy as np
import pytest

from lifecycle_hf.evaluation.bootstrap import Measurement, bootstrap_interval, exp_ratio
from lifecycle_hf.evaluation.report import NO_DIFFERENCE, TaxReport, mixture_table

BEFORE = {"gold_reward": 0.4, "perplexity": 10.0, "kl": 0.0, "score": -1.0}
AFTER = {"gold_reward": 0.7, "perplexity": 12.5, "kl": 3.0, "score": math.nan}
HIGHER = {"gold_reward": True, "perplexity": False, "kl": False, "score": True}


@pytest.fixture
def report():
    return TaxReport(BEFORE, AFTER, HIGHER, labels={"gold_reward": "gold"}, units={"kl": "nats"})


def test_tax_is_what_was_lost(report):
    rows = {row["metric"]: row for row in report.rows()}
    # tax = s (before - after): +1 (0.4 - 0.7) = -0.3, a gain of 75 %; -1 (10 - 12.5) = 2.5, a loss of 25 %.
    assert rows["gold_reward"]["tax"] == pytest.approx(-0.3) and rows["gold_reward"]["percent"] == pytest.approx(-75)
    assert rows["perplexity"]["tax"] == pytest.approx(2.5) and rows["perplexity"]["percent"] == pytest.approx(25)
    assert rows["kl"]["tax"] == 3.0 and rows["kl"]["percent"] is None
    assert math.isnan(rows["score"]["tax"]) and rows["score"]["percent"] is None


def test_one_table_in_three_forms(report):
    assert report.to_markdown().splitlines()[2:4] == [
        "| gold ↑ | 0.400 | 0.700 | -0.300 | -75.0 % |",
        "| perplexity ↓ | 10.00 | 12.50 | +2.500 | +25.0 % |",
    ]
    terminal = report.to_terminal()
    for word in ("gold ↑", "kl (nats) ↓", "+2.500", "n/a", "positive is a loss"):
        assert word in terminal
    assert json.loads(json.dumps(report.to_json()))["perplexity"] == {
        "before": 10.0,
        "after": 12.5,
        "higher_is_better": False,
        "tax": 2.5,
        "percent": 25.0,
    }


def test_a_multiple_of_next_to_nothing_is_not_told():
    report = TaxReport({"brier": 0.001, "ece": 0.1}, {"brier": 0.0119, "ece": 1.0}, {"brier": False, "ece": False})
    assert report.to_json()["brier"]["percent"] == pytest.approx(1090)
    assert report.to_markdown().splitlines()[2:] == [
        "| brier ↓ | 0.001 | 0.012 | +0.011 |  |",
        "| ece ↓ | 0.100 | 1.000 | +0.900 | +900.0 % |",
    ]


def test_reports_of_different_metrics_are_refused():
    with pytest.raises(ValueError, match=r"before and after .* \['b'\]"):
        TaxReport({"a": 1.0}, {"a": 1.0, "b": 2.0}, {"a": True})
    with pytest.raises(ValueError, match=r"before and higher_is_better .* \['a'\]"):
        TaxReport({"a": 1.0}, {"a": 1.0}, {})


def test_items_give_an_interval_and_a_verdict():
    """Every text loses 0.1 nats per token: paired, perplexity rises by just e^2.1 − e^2 however much texts differ."""
    tokens = np.arange(5, 45)
    noise = np.random.default_rng(0).normal(size=40)
    before = {
        "gold": Measurement(noise),
        "perplexity": Measurement(np.stack([2 * tokens, tokens], 1), exp_ratio),
        "same": Measurement(noise),
        "kl": 0.0,
    }
    after = {
        "gold": Measurement(noise + 1),
        "perplexity": Measurement(np.stack([2.1 * tokens, tokens], 1), exp_ratio),
        "same": Measurement(noise[::-1]),
        "kl": Measurement(noise),
    }
    report = TaxReport(before, after, {"gold": True, "perplexity": False, "same": True, "kl": False})
    rows = report.to_json()
    assert rows["gold"]["verdict"] == "gain" and rows["gold"]["interval"] == pytest.approx([-1, -1])
    assert rows["perplexity"]["interval"] == pytest.approx([math.exp(2.1) - math.exp(2)] * 2)
    assert rows["perplexity"]["verdict"] == "loss" and "interval" not in rows["kl"]
    assert rows["same"]["verdict"] == NO_DIFFERENCE and rows["same"]["interval"] == list(
        bootstrap_interval(before["same"], after["same"])
    )
    lines = report.to_markdown().splitlines()
    assert lines[0].endswith("| tax / before | tax, 95 % interval | verdict |") and lines[1].count("|") == 8
    assert lines[3] == "| perplexity ↓ | 7.389 | 8.166 | +0.777 | +10.5 % | +0.777 to +0.777 | loss |"
    assert lines[4].endswith("| not distinguishable from zero |") and lines[5].endswith("|  |  |  |")
    assert "+0.777 to +0.777" in report.to_terminal() and json.dumps(rows)


def test_an_interval_needs_items_on_both_sides():
    one = Measurement([1.0])
    report = TaxReport({"a": one, "b": 1.0}, {"a": one, "b": Measurement([1.0, 2.0])}, {"a": True, "b": True})
    assert not any("interval" in row for row in report.rows())
    assert report.to_markdown().splitlines()[0] == "| metric | before | after | tax | tax / before |"


def test_table_of_a_mixture():
    row = {
        "task": "sums",
        "family": None,
        "rows": 40,
        "share": 0.125,
        "chains": 0.0,
        "epochs": 2.345,
        "token_share": 1,
    }
    assert mixture_table([row]).splitlines() == [
        "| task | family | rows | share | chains | epochs | token share |",
        "|---|---:|---:|---:|---:|---:|---:|",
        "| sums |  | 40 | 12.5% | 0.0% | 2.35 | 100.0% |",
    ]
    drawn = mixture_table([row, row | {"family": "maths"}], terminal=True, title="Tasks").splitlines()
    assert drawn[0].strip() == "Tasks" and drawn[-1].split() == [
        "sums",
        "maths",
        "40",
        "12.5%",
        "0.0%",
        "2.35",
        "100.0%",
    ]
