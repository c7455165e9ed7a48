"""Two processes with half a capability batch each project as one with the whole, under DDP and FSDP2."""

import pytest
from launching import launch_jobs, needs_deepspeed


@pytest.mark.parametrize(
    ("engine", "slow"), [("MULTI_CPU", False), pytest.param("FSDP", True, marks=pytest.mark.slow)]
)
def test_two_processes_of_four_equal_one_of_eight(launched, engine, slow):
    one, two = launched("NO").found, launched(engine, slow).found
    for level in ("gradient", "update"):
        a, b = one[level], two[level]
        assert (a["world_size"], a["engine"], b["world_size"], b["engine"]) == (1, "NO", 2, engine)
        assert len(a["lines"]) == 3 and any(line["projection/removed"] > 0.01 for line in a["lines"])
        assert b["sums"] == pytest.approx(a["sums"], rel=1e-4)
        for line, other in zip(a["lines"], b["lines"], strict=True):
            assert other == pytest.approx(line, rel=1e-4, abs=1e-5)


@pytest.mark.slow
@needs_deepspeed
def test_deepspeed_is_refused(tmp_path):
    with pytest.raises(AssertionError, match="ProjectionCallback does not run on DeepSpeed: use DDP or FSDP2"):
        launch_jobs("cpu_zero2", [("projection_invariance", [tmp_path, 4, "update"])])
