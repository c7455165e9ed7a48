"""recipes/ppo.py over two processes, and the effect of its embedded default on two seeds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from launching import launch, needs_deepspeed

from lifecycle_hf import toyworld
from lifecycle_hf.models.loading import load_causal_lm, load_tokenizer

RECIPE = Path(__file__).parents[2] / "recipes" / "ppo.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        "cpu_ddp",
        pytest.param("cpu_zero2", marks=needs_deepspeed),
        pytest.param("cpu_zero3", marks=needs_deepspeed),
    ],
)
def test_embedded_default_runs_on_two_processes(config, quick_stages, tmp_path):
    options = ("--max_steps", 2, "--ppo_epochs", 1, "--measure_rows", 32, "--per_device_train_batch_size", 8)
    options += ("--output_dir", tmp_path)
    printed = launch(config, RECIPE, *options, cwd=tmp_path)
    assert "gold reward" in printed
    assert "| world_size | `2` |" in (tmp_path / "README.md").read_text()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["kl"]["before"] == pytest.approx(0, abs=1e-3) and report["gold_reward"]["before"] > 0
    model, tokenizer = load_causal_lm(str(tmp_path)), load_tokenizer(str(tmp_path))
    reloaded = toyworld.measure(model, tokenizer, n=32, seed=0)
    assert reloaded["perplexity"] == pytest.approx(report["perplexity"]["after"], rel=1e-3)
    assert (tmp_path / "training.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [5, 6])
def test_default_aligns_and_keeps_its_answers(tmp_path, seed):
    """The bounds that each seed must keep; no tuning has seen these seeds. docs/ppo.md has ten of them."""
    command = [sys.executable, str(RECIPE), "--seed", str(seed), "--output_dir", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=3000)
    found = toyworld.measure(load_causal_lm(str(tmp_path)), load_tokenizer(str(tmp_path)), n=512)
    print({"seed": seed} | {name: float(value) for name, value in found.items()})
    before = json.loads((tmp_path / "report.json").read_text())["perplexity"]["before"]
    assert found["gold_reward"] >= 0.85 and found["benign_accuracy"] >= 0.75
    assert found["perplexity"] <= before + 0.005
