"""recipes/self_instruct.py and recipes/evol_instruct.py: the embedded defaults, a server, and what they refuse."""

import json
import runpy
import sys
from itertools import combinations
from pathlib import Path

import pytest
from chat_server import says
from datasets import load_dataset

from lifecycle_hf.evaluation.text import rouge_l

RECIPES = Path(__file__).parents[2] / "recipes"


def run(name, output, monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", [str(RECIPES / f"{name}.py"), "--output_dir", str(output), *options])
    runpy.run_path(str(RECIPES / f"{name}.py"), run_name="__main__")
    return json.loads((output / "report.json").read_text())


def test_self_instruct_drops_by_every_filter(tmp_path, monkeypatch, capsys):
    report = run("self_instruct", tmp_path, monkeypatch)
    assert {"similar", "keyword", "start", "too short", "kept"} <= report["instructions"].keys()
    assert {"repeated", "empty output", "output is input", "input with other outputs"} <= report["instances"].keys()
    assert f"| kept | {report['instructions']['kept']} | {report['instances']['kept']} |" in capsys.readouterr().out
    rows = load_dataset("json", data_files=str(tmp_path / "generated.jsonl"), split="train", cache_dir=tmp_path / "c")
    assert report["instances"]["kept"] == len(rows) and {"instruction", "input", "output"} <= set(rows.column_names)
    kept = sorted(set(rows["instruction"]))
    assert len(kept) >= 40 and max(rouge_l(a, b) for a, b in combinations(kept, 2)) < 0.7


def test_evol_instruct_drops_by_every_rule(tmp_path, monkeypatch, capsys):
    report = run("evol_instruct", tmp_path, monkeypatch)
    rules = {"no information gain", "refusal", "empty answer", "copied prompt", "kept"}
    assert report["instructions"].keys() == rules and report["operators"].keys() >= {"deepen", "in_breadth"}
    assert f"| kept | {report['instructions']['kept']} |" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "generated.jsonl").read_text().splitlines()]
    known = {row["id"] for row in rows}
    assert any(row["parent"] in known for row in rows)  # an evolved one was evolved again


def test_a_server_writes_from_tasks_of_a_file(tmp_path, monkeypatch, stand_in):
    stand_in.answer = lambda body, number: (200, says(f"Write {body['seed']} lines.\nNot equal"))
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text('{"instruction": "Add.", "input": "2 3"}\n{"instruction": "Sing.", "input": ""}\n')
    options = ("--server_url", stand_in.url, "--server_model", "m", "--dataset_name", str(tasks), "--rounds", "1")
    report = run("evol_instruct", tmp_path / "a", monkeypatch, *options, "--operators", "deepen")
    assert report["instructions"] == {"kept": 2} and report["tokens"] == {"prompt": 60, "completion": 6}
    again = run("evol_instruct", tmp_path / "a", monkeypatch, *options, "--operators", "deepen")
    assert again == report and len(stand_in.requests) == 6
    one = run("evol_instruct", tmp_path / "b", monkeypatch, *options, "--rows", "1")
    assert one["instructions"] == {"kept": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--server_url", "http://localhost:9/v1"), "server_url=http://localhost:9/v1 needs server_model"),
        (("--model_name_or_path", ""), "There is no writer: give model_name_or_path"),
    ],
)
def test_a_writer_that_is_missing_is_told(options, message, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=message):
        run("self_instruct", tmp_path, monkeypatch, *options)
