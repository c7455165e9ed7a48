"""Pretraining, DoReMi and the Fisher: two processes with four rows each give what one process with eight gives."""

import pytest
from launching import needs_deepspeed

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("engine", "names", "slow"),
    [
        ("MULTI_CPU", ("causal", "ul2", "ewc", "doremi"), False),
        pytest.param("ZERO2", ("causal", "ul2", "ewc", "doremi"), True, marks=[SLOW, needs_deepspeed]),
        pytest.param("ZERO3", ("causal", "ul2"), True, marks=[SLOW, needs_deepspeed]),
    ],
)
def test_two_processes_of_four_equal_one_of_eight(launched, engine, names, slow):
    one, two = launched("NO").found, launched(engine, slow).found
    engine = "DEEPSPEED" if engine.startswith("ZERO") else engine
    for name in names:
        a, b = one[name], two[name]
        assert (a["world_size"], a["engine"], b["world_size"], b["engine"]) == (1, "NO", 2, engine)
        assert len(a["lines"]) == 3 and a["lines"][2]["loss"] < a["lines"][0]["loss"]
        for line, other in zip(a["lines"], b["lines"], strict=True):
            assert other == pytest.approx(line, rel=1e-4, abs=1e-6)
        assert b["fisher"] == pytest.approx(a["fisher"], rel=1e-4, abs=1e-9)
        assert (name == "doremi") == ("weight/topic 0" in a["lines"][0])
        assert (name == "ewc") == (len(a["fisher"]) > 10 and a["lines"][2].get("loss/ewc", 0) > 0)
