"""benchmarks/gpu.py in small, where neither a GPU nor the optional libraries are."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
BLOCKED = ("bitsandbytes", "deepspeed", "lm_eval", "vllm", "flash_attn", "liger_kernel", "matplotlib", "scipy")
BLOCK = f"""
import runpy, sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {BLOCKED} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
sys.path.insert(0, "benchmarks")
sys.argv = ["gpu.py", *sys.argv[1:]]
runpy.run_path("benchmarks/gpu.py", run_name="__main__")
"""


@pytest.mark.slow
def test_every_part_runs_in_small_without_the_optional_libraries(tmp_path, monkeypatch):
    command = [sys.executable, "-c", BLOCK, "--smoke", "--output", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert list(parts) == ["correct", "fast", "decode", "profile"]
    assert not [row for rows in parts.values() for row in rows if "failed" in row or "cut off" in row]
    checks = [row["check"] for row in parts["correct"]]
    assert all(row["passed"] for row in parts["correct"]) and len(checks) >= 10
    for name in (
        "attention, segments, torch.float32",
        "attention, segments, torch.bfloat16",
        "resumed PPO bit for bit",
    ):
        assert name in checks
    measured = {row["measured"] for row in parts["fast"]}
    assert {"DPO, ours", "DPO, TRL", "SFT, ours", "PPO update, ours"} <= measured
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    from gpu_correct import check

    assert "loads here; log-probs differ by 0 at most" in check(tmp_path)


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", str(tmp_path / "none")])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(REPOSITORY / "benchmarks" / "gpu.py"), run_name="__main__")
    assert "no CUDA device here" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()
