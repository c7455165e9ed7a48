"""recipes/constitution.py: the data of the embedded default, and the commands of its stages."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from lifecycle_hf.cli.constituting import ConstitutionArguments, stage_options, train_stage

RECIPE = Path(__file__).parents[2] / "recipes" / "constitution.py"


def run(output, monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", [str(RECIPE), "--output_dir", str(output), *options])
    runpy.run_path(str(RECIPE), run_name="__main__")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_data_of_the_embedded_default(quick_stages, tmp_path, monkeypatch, capsys):
    few = ("--rows", "16", "--rounds", "1", "--train", "none")
    run(tmp_path, monkeypatch, *few)
    report, printed = json.loads((tmp_path / "report.json").read_text()), capsys.readouterr().out
    assert report["prompts"] == 16 == report["revised"] + sum(report["dropped"].values())
    assert len(lines(tmp_path / "sft.jsonl")) == report["revised"]
    assert len(lines(tmp_path / "preferences.jsonl")) == report["labelled"] == 16 - sum(report["no_pair"].values())
    assert "revised: " in printed and "refusal rate" in printed
    before = (tmp_path / "written.jsonl").read_bytes()
    run(tmp_path, monkeypatch, *few)  # all of it is there already
    assert (tmp_path / "written.jsonl").read_bytes() == before


def test_a_stage_is_a_command_that_is_made_once(tmp_path, capfd):
    args = ConstitutionArguments(output_dir=str(tmp_path), launcher="echo launched", seed=3)
    options = stage_options(["sft:use_peft=true", "dpo:beta=0.2"])
    train_stage("sft", args, "MODEL", "DATA", tmp_path / "sft", options)
    printed = capfd.readouterr().out
    words = f"recipes/sft.py --model_name_or_path MODEL --dataset_name DATA --output_dir {tmp_path}/sft --seed 3"
    assert "$ echo launched" in printed and printed.count(f"{words} --use_peft true") == 2
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "README.md").touch()
    train_stage("sft", args, "MODEL", "DATA", tmp_path / "sft", options)
    assert capfd.readouterr().out == ""
    args.launcher = "false"
    with pytest.raises(RuntimeError, match="The stage dpo failed"):
        train_stage("dpo", args, "MODEL", "DATA", tmp_path / "dpo", options)


@pytest.mark.parametrize("text", ["sft:lora_r", "kto:beta=1", "beta=1"])
def test_options_of_stages_that_are_written_otherwise(text):
    with pytest.raises(ValueError, match="is not STAGE:OPTION=VALUE with one of the stages sft, reward, dpo, ppo"):
        stage_options([text])
