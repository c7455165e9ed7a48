"""The recipes that learn from their own samples: the embedded defaults for a few steps, and what they leave."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

RECIPES = Path(__file__).parents[2] / "recipes"
FEW = ("--max_steps", "2", "--use_cpu", "true", "--disable_tqdm", "true", "--measure_rows", "16")
ROLLOUTS = ("--per_device_train_batch_size", "16", "--num_mini_batches", "1", "--ptx_batch_size", "8")


def run(name, output, monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", [str(RECIPES / f"{name}.py"), "--output_dir", str(output), *options])
    runpy.run_path(str(RECIPES / f"{name}.py"), run_name="__main__")
    return json.loads((output / "report.json").read_text())


@pytest.mark.parametrize(
    ("name", "options", "measured"),
    [
        ("grpo", ROLLOUTS, {"proxy_reward", "kl", "gold_reward"}),
        pytest.param("rloo", ROLLOUTS, {"proxy_reward", "kl", "gold_reward"}, marks=pytest.mark.slow),
        ("online_dpo", ("--per_device_train_batch_size", "8", "--rounds", "2"), {"proxy_reward", "reward_margin"}),
        pytest.param(
            "spin",
            ("--per_device_train_batch_size", "8", "--rounds", "2"),
            {"target_logp", "reward_margin"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_two_steps_are_measured_and_saved(name, options, measured, quick_stages, tmp_path, monkeypatch, capsys):
    report = run(name, tmp_path, monkeypatch, *FEW, *options)
    assert measured <= report.keys() and report["gold_reward"]["before"] > 0
    assert "gold reward" in capsys.readouterr().out
    AutoModelForCausalLM.from_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "arxiv.org" in card and "| num_generations |" in card


def test_best_of_n_draws_its_curve_and_trains_on_the_winners(quick_stages, tmp_path, monkeypatch, capsys):
    options = ("--rows", "12", "--num_generations", "4", "--generation_batch_size", "12", "--use_cpu", "true")
    few = (*options, "--train", "--rounds", "2", "--max_steps", "1", "--disable_tqdm", "true", "--measure_rows", "4")
    report = run("best_of_n", tmp_path, monkeypatch, *few)
    assert report["gold_reward"]["before"] > 0
    curve = json.loads((tmp_path / "round_1" / "report.json").read_text())
    assert curve["score"] == sorted(curve["score"]) and len(curve["gold_reward"]) == 4
    assert (tmp_path / "round_2" / "best_of_n.png").exists() and (tmp_path / "round_1" / "model").is_dir()
    assert "| 4 | 0.64 |" in capsys.readouterr().out
    AutoModelForCausalLM.from_pretrained(tmp_path)
    stamp = (tmp_path / "round_1" / "model" / "model.safetensors").stat().st_mtime
    run("best_of_n", tmp_path, monkeypatch, *few)  # all of it is there already
    assert (tmp_path / "round_1" / "model" / "model.safetensors").stat().st_mtime == stamp


def test_rounds_without_training_are_refused(quick_stages, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="rounds=2 has no effect without --train"):
        run("best_of_n", tmp_path, monkeypatch, "--rounds", "2", "--use_cpu", "true")
