"""recipes/pretrain.py and recipes/scaling_law.py: two steps of tiny models, loaded back and resumed."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lifecycle_hf import LifecycleForCausalLM, PretrainingConfig, PretrainingTrainer, ScalingLaw, cli
from lifecycle_hf.data.corpora import python_documentation
from lifecycle_hf.models.loading import load_tokenizer

RECIPES = Path(__file__).parents[2] / "recipes"
QUICK = ["--use_cpu", "true", "--disable_tqdm", "true", "--vocab_size", "258"]
SMALL = ["--hidden_size", "32", "--num_hidden_layers", "1", "--intermediate_size", "48", "--max_length", "96"]
LADDER = ["--max_length", "32", "--hidden_sizes", "16", "32", "48", "64", "--bootstrap", "20", "--max_epochs", "1000"]
STEP = 2 * 32
"""Tokens of an optimizer step of the ladder."""


def run(name, output, *options):
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    recipe = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    arguments = {"pretrain": ("PretrainingArguments", "ModelConfig"), "scaling_law": ("ScalingArguments",)}[name]
    own, *others = (getattr(recipe, each) for each in arguments)
    default = RECIPES / "configs" / f"{name}_python.yaml"
    argv = ["--output_dir", str(output), *QUICK, *map(str, options)]
    recipe.main(*cli.parse((own, PretrainingConfig, *others), default, argv=argv))
    return json.loads((output / "report.json").read_text())


@pytest.fixture
def book(tmp_path):
    (tmp_path / "book.txt").write_text("\n".join(python_documentation()["text"])[:9000])
    return tmp_path / "book.txt"


def test_pretrain_loads_back_and_resumes(book, tmp_path):
    options = ["--dataset_name", book, *SMALL, "--per_device_train_batch_size", 2, "--save_steps", 1]
    options += ["--lr_scheduler_type", "constant", "--eval_strategy", "no"]
    whole = run("pretrain", tmp_path / "whole", *options, "--max_steps", 2)
    run("pretrain", tmp_path / "two", *options, "--max_steps", 1)
    resumed = run("pretrain", tmp_path / "two", *options, "--max_steps", 2, "--resume_from_checkpoint")
    assert resumed["eval_loss"] == whole["eval_loss"] and resumed["sample"] == whole["sample"]
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("whole", "two")]
    assert type(models[0]) is LifecycleForCausalLM and models[0].config.attention == "prefix"
    assert len(load_tokenizer(str(tmp_path / "two"))) == models[0].vocab_size > 258  # sentinels and modes
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)


def test_the_seed_decides_the_weights(book, tmp_path):
    options = ["--dataset_name", book, *SMALL, "--objective", "causal", "--max_steps", 1, "--learning_rate", 0]
    losses = [run("pretrain", tmp_path / "out", *options, "--seed", seed)["eval_loss"] for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


def test_the_ladder_sets_the_steps(book, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("scaling_law", tmp_path / "out", "--dataset_name", book, *LADDER, "--max_steps", 2)
    assert "max_steps=2 has no effect with ladder_budgets=" in capsys.readouterr().err


def test_scaling_law_trains_what_is_missing(book, tmp_path, monkeypatch):
    """Two steps of each run are real, its loss is that of a known law, which the fit must find."""
    law, trained, out = ScalingLaw(E=1.0, A=50.0, B=300.0, alpha=0.3, beta=0.35), [], tmp_path / "out"
    train, evaluate = PretrainingTrainer.train, PretrainingTrainer.evaluate

    def two_steps(self, **given):
        trained.append((self.model.num_parameters(), self.args.max_steps))
        self.args.max_steps = 2
        return train(self, **given)

    def planted(self):
        assert self.state.global_step == 2 and 0 < evaluate(self)["eval_loss"] < 10
        n, steps = trained[-1]
        return {"eval_loss": float(law.loss(n, steps * STEP))}

    monkeypatch.setattr(PretrainingTrainer, "train", two_steps)
    monkeypatch.setattr(PretrainingTrainer, "evaluate", planted)
    options = ["--dataset_name", book, *LADDER]
    with pytest.raises(ValueError, match="ladder_budgets: 3 runs are planned, the law needs 8"):
        run("scaling_law", out, *options, "--ladder_budgets", 3e10)
    assert trained == []
    budgets = (3e10, 1e11, 2e11)
    options += ["--ladder_budgets", *budgets, "--budget", 1e13]
    report = run("scaling_law", out, *options)
    rows = [json.loads(line) for line in (out / "points.jsonl").read_text().splitlines()]
    assert [(row["parameters"], row["steps"]) for row in rows] == trained and rows == report["runs"]
    for row in rows:
        assert row["tokens"] == row["steps"] * STEP
        assert min(abs(6 * row["parameters"] * row["tokens"] / c - 1) for c in budgets) < 0.01
    assert report["law"]["alpha"] == pytest.approx(law.alpha, rel=1e-3)
    assert report["best"][0]["tokens"] == pytest.approx(law.optimum(1e13).tokens, rel=1e-3)
    assert (out / "isoflop.png").read_bytes().startswith(b"\x89PNG")
    assert ScalingLaw.from_json(json.loads((out / "law.json").read_text())).points == len(rows) >= 8

    (out / "points.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))  # stopped before the last
    trained.clear()
    assert run("scaling_law", out, *options) == report
    assert trained == [(rows[-1]["parameters"], rows[-1]["steps"])]
    with pytest.raises(ValueError, match="points.jsonl has runs of seed=42, not 7: give another output_dir"):
        run("scaling_law", out, *options, "--seed", 7)
