"""recipes/curate.py: what it finds of what was planted, and what it refuses before it reads anything."""

import json
import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("datatrove")
RECIPE = Path(__file__).parents[2] / "recipes" / "curate.py"


def run(output, monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", [str(RECIPE), *options, "--output_dir", str(output)])
    runpy.run_path(str(RECIPE), run_name="__main__")
    return json.loads((output / "report.json").read_text())


def test_what_was_planted_is_found(tmp_path, monkeypatch, capsys):
    (tmp_path / "blocked.txt").write_text("pornhub.com\n")
    options = ("--blocklist", "false", "--blocked_domains", str(tmp_path / "blocked.txt"), "--tasks", "2")
    report = run(tmp_path / "out", monkeypatch, *options)
    told = capsys.readouterr().out.split("What was planted")[1]
    counts = [[int(word) for word in line.split() if word.isdigit()] for line in told.splitlines()]
    planted = [own for own in counts if len(own) == 2]
    assert len(planted) == 7 and all(count == found > 5 for count, found in planted[:6])
    assert planted[6][1] < 0.12 * planted[6][0]  # of clean documents, which the rules remove
    assert [step["step"] for step in report["steps"]] == ["read", "url", "rules", "pii", "minhash", "substring"]
    assert report["steps"][1]["removed"] == {"blocked_domain": planted[4][0]}
    assert (tmp_path / "out" / "funnel.png").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--steps", "url", "spelling"), "'spelling' is none of url, language"),
        (("--steps", "url", "url"), "'url' stands twice"),
        (("--steps", "quality"), "'quality' needs trusted"),
        (("--trusted", "books"), "trusted has no effect without the step 'quality'"),
    ],
)
def test_steps_that_can_not_be(tmp_path, monkeypatch, options, told):
    with pytest.raises(ValueError, match=told):
        run(tmp_path / "out", monkeypatch, str(tmp_path), *options)


def test_quality_learns_from_trusted_files(tmp_path, monkeypatch):
    words = {"crawl": "buy cheap now click here win", "trusted": "the theory of the proof shows that"}
    for name, text in words.items():
        rows = [{"text": " ".join((text.split() * 9)[i % 7 : i % 7 + 30]) + f" {i}"} for i in range(60)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--steps", "quality", "--trusted", str(tmp_path / "trusted.jsonl"), "--quality_threshold", "0.5")
    report = run(tmp_path / "out", monkeypatch, str(tmp_path / "crawl.jsonl"), *options, "--tasks", "1")
    assert report["steps"][-1]["documents"] <= 2 and (tmp_path / "out_quality").is_dir()
