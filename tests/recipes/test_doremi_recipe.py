"""recipes/doremi.py on own rows: the reference is kept, a resumed run ends the same, pretraining reads the weights."""

import json
import runpy
import sys
from pathlib import Path

import yaml

from lifecycle_hf.toyworld import planted_domains

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = ["--use_cpu", "true", "--disable_tqdm", "true", "--hidden_size", "32", "--num_hidden_layers", "1",
         "--vocab_size", "258", "--max_length", "32", "--per_device_train_batch_size", "4"]  # fmt: skip


def run(monkeypatch, name, *options):
    monkeypatch.setattr(sys, "argv", [str(RECIPES / f"{name}.py"), *SMALL, *map(str, options)])
    runpy.run_path(str(RECIPES / f"{name}.py"), run_name="__main__")


def test_doremi_then_pretrain(tmp_path, monkeypatch, capsys):
    rows, where = tmp_path / "rows.jsonl", tmp_path / "out"
    rows.write_text("\n".join(json.dumps(row) for row in planted_domains(documents=20)))
    options = ["--dataset_name", rows, "--output_dir", where, "--max_steps", 3, "--reference_steps", 2]
    options += ["--save_steps", 2, "--per_device_train_batch_size", 4]
    run(monkeypatch, "doremi", *options)
    written = yaml.safe_load((where / "domain_weights.yaml").read_text())
    assert list(written["weights"]) == ["learnable", "noise", "trivial"] and written["steps"] == 3
    assert json.loads((where / "report.json").read_text()) == written
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| noise")]
    assert table[0].endswith(f"| {written['weights']['noise']:.3f} |")
    reference = where / "reference" / "model.safetensors"
    before = reference.stat().st_mtime_ns
    (where / "domain_weights.yaml").unlink()
    run(monkeypatch, "doremi", *options, "--resume_from_checkpoint")
    assert yaml.safe_load((where / "domain_weights.yaml").read_text()) == written
    assert reference.stat().st_mtime_ns == before
    weights = ["--domain_weights", where / "domain_weights.yaml", "--objective", "causal", "--eval_strategy", "no"]
    run(
        monkeypatch, "pretrain", "--dataset_name", rows, "--max_steps", 1, "--output_dir", tmp_path / "model", *weights
    )
    assert json.loads((tmp_path / "model" / "report.json").read_text())["eval_loss"] > 0
