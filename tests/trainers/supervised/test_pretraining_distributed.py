"""Pretraining and the Fisher: two processes with four rows each give what one process with eight gives."""

from pathlib import Path

import pytest
from launching import launch, needs_deepspeed, results

SCRIPT = Path(__file__).parents[2] / "launched" / "pretraining_invariance.py"


@pytest.mark.parametrize(
    ("config", "engine", "names"),
    [
        ("cpu_ddp", "MULTI_CPU", "causal,ul2,ewc"),
        pytest.param("cpu_zero2", "DEEPSPEED", "causal,ul2,ewc", marks=[pytest.mark.slow, needs_deepspeed]),
        pytest.param("cpu_zero3", "DEEPSPEED", "causal,ul2", marks=[pytest.mark.slow, needs_deepspeed]),
    ],
)
def test_two_processes_of_four_equal_one_of_eight(tmp_path, config, engine, names):
    one = results(launch("cpu", SCRIPT, tmp_path / "one", 8, names))
    two = results(launch(config, SCRIPT, tmp_path / "two", 4, names))
    for name in names.split(","):
        a, b = one[name], two[name]
        assert (a["world_size"], a["engine"], b["world_size"], b["engine"]) == (1, "NO", 2, engine)
        assert len(a["lines"]) == 3 and a["lines"][2]["loss"] < a["lines"][0]["loss"]
        for line, other in zip(a["lines"], b["lines"], strict=True):
            assert other == pytest.approx(line, rel=1e-4, abs=1e-6)
        assert b["fisher"] == pytest.approx(a["fisher"], rel=1e-4, abs=1e-9)
        assert (name == "ewc") == (len(a["fisher"]) > 10 and a["lines"][2].get("loss/ewc", 0) > 0)
