"""The embedded default of recipes/ppo.py: over two processes, and its effect on three seeds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from launching import launch, needs_deepspeed

from lifecycle_hf import SFTConfig, SFTTrainer, toyworld
from lifecycle_hf.models.loading import load_causal_lm, load_tokenizer

RECIPE = Path(__file__).parents[2] / "recipes" / "ppo.py"


@pytest.mark.parametrize(
    "config",
    [
        "cpu_ddp",
        pytest.param("cpu_zero2", marks=[needs_deepspeed, pytest.mark.slow]),
        pytest.param("cpu_zero3", marks=[needs_deepspeed, pytest.mark.slow]),
    ],
)
def test_embedded_default_runs_on_two_processes(config, tmp_path):
    options = ("--max_steps", 8, "--measure_updates", 1, "--measure_rows", 32, "--output_dir", tmp_path)
    printed = launch(config, RECIPE, *options, cwd=tmp_path)
    assert "gold reward" in printed
    assert "| world_size | `2` |" in (tmp_path / "README.md").read_text()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["kl"]["before"] == pytest.approx(0, abs=1e-3) and report["gold_reward"]["before"] > 0.2
    model, tokenizer = load_causal_lm(str(tmp_path)), load_tokenizer(str(tmp_path))
    reloaded = toyworld.measure(model, tokenizer, n=32, seed=0)
    assert reloaded["perplexity"] == pytest.approx(report["perplexity"]["after"], rel=1e-3)
    assert (tmp_path / "training.png").exists()


def run(folder, seed, *options):
    command = [sys.executable, str(RECIPE), "--seed", str(seed), "--output_dir", str(folder), *options]
    subprocess.run(command, check=True, capture_output=True, timeout=1800)
    return json.loads((folder / "report.json").read_text())


def perplexity_of_control(folder, seed):
    """Perplexity after as many steps of language modelling alone, on the same texts at the same learning rate."""
    sft = str(toyworld.stage_checkpoint("sft"))
    args = SFTConfig(
        str(folder), max_steps=240, per_device_train_batch_size=32, learning_rate=3e-4, lr_scheduler_type="constant",
        max_length=64, report_to="none", use_cpu=True, save_strategy="no", seed=seed, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = SFTTrainer(sft, args, toyworld.dataset("ptx")["train"])
    trainer.train()
    return toyworld.measure(trainer.model, trainer.processing_class, n=8, seed=0)["perplexity"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gold_reward_rises_and_ptx_saves_two_thirds_of_the_tax(tmp_path, seed):
    mixed = run(tmp_path / "ptx", seed)
    plain = run(tmp_path / "plain", seed, "--ptx_coef", "0")
    control = perplexity_of_control(tmp_path / "control", seed)
    print({"seed": seed, "ptx": mixed, "plain": plain, "control": control})
    assert mixed["gold_reward"]["after"] - mixed["gold_reward"]["before"] >= 0.25
    # what further pretraining would have gained is no protection: with PTX the tax is counted from the control
    tax_plain = plain["perplexity"]["after"] - plain["perplexity"]["before"]
    tax_mixed = mixed["perplexity"]["after"] - min(control, mixed["perplexity"]["before"])
    assert tax_plain > 0.02 and tax_plain >= 3 * tax_mixed
