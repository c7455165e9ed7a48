"""Two processes of four rows pretrain as one of eight."""

from pathlib import Path

import pytest
from launching import launch, needs_deepspeed, results

SCRIPT = Path(__file__).parents[1] / "launched" / "pretraining_invariance.py"


@pytest.mark.parametrize(
    ("config", "engine"),
    [
        ("cpu_ddp", "MULTI_CPU"),
        pytest.param("cpu_zero2", "DEEPSPEED", marks=[pytest.mark.slow, needs_deepspeed]),
        pytest.param("cpu_zero3", "DEEPSPEED", marks=[pytest.mark.slow, needs_deepspeed]),
    ],
)
def test_two_processes_of_four_equal_one_of_eight(tmp_path, config, engine):
    one = results(launch("cpu", SCRIPT, tmp_path / "one", 8, "causal,ul2"))
    two = results(launch(config, SCRIPT, tmp_path / "two", 4, "causal,ul2"))
    for objective in ("causal", "ul2"):
        a, b = one[objective], two[objective]
        assert (a["world_size"], a["engine"], b["world_size"], b["engine"]) == (1, "NO", 2, engine)
        assert len(a["lines"]) == 3 and a["lines"][2]["loss"] < a["lines"][0]["loss"]
        for line, other in zip(a["lines"], b["lines"], strict=True):
            assert other == pytest.approx(line, rel=1e-4, abs=1e-6)
