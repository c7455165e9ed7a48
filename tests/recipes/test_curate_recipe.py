"""recipes/curate.py: the embedded crawl, a user's files, the steps that learn, and what it refuses."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from lifecycle_hf.data.loading import load_splits
from lifecycle_hf.toyworld import crawl

pytest.importorskip("datatrove")
RECIPES = Path(__file__).parents[2] / "recipes"
STEPS = ["url", "rules", "pii", "quality", "minhash", "substring"]


def run(output, monkeypatch, *options):
    argv = [str(RECIPES / "curate.py"), *map(str, options), "--output_dir", str(output)]
    monkeypatch.setattr(sys, "argv", argv)
    runpy.run_path(str(RECIPES / "curate.py"), run_name="__main__")
    return json.loads((output / "report.json").read_text())


def test_the_embedded_default_finds_what_was_planted(tmp_path, monkeypatch, capsys):
    report = run(tmp_path / "out", monkeypatch)
    assert [row["step"] for row in report["steps"]][1:] == STEPS
    printed = capsys.readouterr().out
    rows = re.findall(r"^ +(\w+(?: \w+)?) +(?:\w+) +(\d+) +(\d+) +(\d+) *$", printed, re.MULTILINE)
    found = {kind: tuple(map(int, numbers)) for kind, *numbers in rows}
    expected = crawl.PLANTED | {"long run": crawl.PLANTED["long run"] - 1, "personal data": 6 * 30}
    assert {kind: row[0] for kind, row in found.items()} == expected
    assert all(hits == planted for planted, hits, _ in found.values())
    assert {kind: wrong for kind, (*_, wrong) in found.items() if wrong} == {"garbage": found["garbage"][2]}
    assert found["garbage"][2] <= 0.15 * 149  # of clean pages; they repeat themselves, 17 with Python 3.11
    train, _ = load_splits(str(tmp_path / "out"), "pretrain")
    assert "text" in train.column_names and "quality" in train.column_names


@pytest.fixture
def files(tmp_path):
    """(crawl of 30 pages of Python and 30 of junk, 40 trusted pages)."""
    pages = crawl.documents()
    (tmp_path / "crawl").mkdir()
    rows = [{"body": text, "key": i} for i, text in enumerate([*pages[:30], *crawl.junk(5, 30)])]
    (tmp_path / "crawl" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "trusted.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in pages[40:80]))
    (tmp_path / "junk.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in crawl.junk(6, 40)))
    return tmp_path / "crawl", tmp_path / "trusted.jsonl", tmp_path / "junk.jsonl"


def test_a_crawl_is_told_from_trusted_text(files, tmp_path, monkeypatch):
    options = ("--steps", "quality", "--trusted_dataset", files[1], "--untrusted_dataset", files[2], "--tasks", 2)
    columns = ("--text_column", "body", "--id_column", "key", "--output_format", "jsonl")
    report = run(tmp_path / "out", monkeypatch, files[0], *options, *columns)
    rows = [json.loads(line) for file in (tmp_path / "out" / "data").iterdir() for line in file.open()]
    assert {int(row["id"]) for row in rows} == set(range(30)) and all(row["quality"] >= 0.5 for row in rows)
    assert report["steps"][1]["removed"] == {"low_quality": 30}
    with pytest.raises(ValueError, match="seed=0, and this run has 1"):
        run(tmp_path / "out", monkeypatch, files[0], *options, *columns, "--seed", 1)


def test_a_reference_model_is_trained_once(files, tmp_path, monkeypatch):
    options = ("--steps", "perplexity", "--trusted_dataset", files[1], "--reference_steps", 2, "--sample_size", 20)
    report = run(tmp_path / "out", monkeypatch, files[0], *options, "--text_column", "body")
    assert 0 < report["steps"][1]["removed"]["perplexity"] < 30
    before = (tmp_path / "out" / "models" / "reference" / "model.safetensors").stat().st_mtime_ns
    assert run(tmp_path / "out", monkeypatch, files[0], *options, "--text_column", "body") == report
    assert (tmp_path / "out" / "models" / "reference" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--steps", "url", "dedup"), "steps: 'dedup' is unknown, known are url, rules, pii"),
        (("--rules", "gopher"), "rules: 'gopher' is unknown, known are gopher_quality"),
        (("--steps", "quality"), "The steps quality and perplexity need trusted_dataset"),
        (("--steps", "toxicity"), "The step 'toxicity' needs toxicity_model: give it"),
        (("--steps", "language"), "The step 'language' needs language_model"),
        (("--steps", "pii", "--executor", "no_such_module:make"), "executor: 'no_such_module:make' can't be imported"),
    ],
)
def test_what_is_missing_is_told(options, message, files, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", monkeypatch, files[0], *options)


def test_an_executor_is_imported_by_its_name(files, tmp_path, monkeypatch):
    (tmp_path / "my_cluster.py").write_text(
        "from datatrove.executor import LocalPipelineExecutor\n"
        "def make(**options):\n    return LocalPipelineExecutor(workers=1, **options)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    options = ("--steps", "pii", "--text_column", "body", "--executor", "my_cluster:make", "--tasks", 1)
    assert run(tmp_path / "out", monkeypatch, files[0], *options)["steps"][1]["documents"] == 60
