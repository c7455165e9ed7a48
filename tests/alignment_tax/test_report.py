import json
import math
import struct

import pytest

from lifecycle_hf.alignment_tax.report import TaxReport, plot_history

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


def test_reports_of_different_metrics_are_refused():
    with pytest.raises(ValueError, match=r"before and after .* \['b'\]"):
        TaxReport({"a": 1.0}, {"a": 1.0, "b": 2.0}, {"a": True})
    with pytest.raises(ValueError, match=r"before and higher_is_better .* \['a'\]"):
        TaxReport({"a": 1.0}, {"a": 1.0}, {})


def width_of(png):
    return struct.unpack(">I", png.read_bytes()[16:20])[0]


def test_history_is_drawn_with_a_panel_per_group_that_has_data(tmp_path):
    history = [{"step": s, "score": s / 10, "kl": s / 5, "loss": 1.0} for s in range(1, 9)]
    plot_history(history, tmp_path / "two.png")
    plot_history(
        [*history, {"step": 0, "tax/perplexity": 9.0}, {"step": 8, "tax/perplexity": 9.5}], tmp_path / "three.png"
    )
    assert width_of(tmp_path / "three.png") == pytest.approx(1.5 * width_of(tmp_path / "two.png"), abs=2)
    plot_history(history, tmp_path / "own.png", panels={"Loss": {"loss": "mean"}}, title="A run")
    assert width_of(tmp_path / "own.png") == pytest.approx(width_of(tmp_path / "two.png") / 2, abs=2)


def test_history_without_the_metrics_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"the rows have \['loss', 'step'\]"):
        plot_history([{"step": 1, "loss": 2.0}], tmp_path / "none.png")
