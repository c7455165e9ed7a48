"""recipes/instruct.py: the embedded default for two steps, a mixture from a YAML file, and the toy world's tasks."""

import json
import runpy
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from lifecycle_hf.cli.instructing import load_mixture
from lifecycle_hf.toyworld.instructions import HELD_OUT, TASKS, instruction_rows, instruction_task

RECIPE = Path(__file__).parents[2] / "recipes" / "instruct.py"


def test_two_steps_are_measured_and_saved(quick_stages, tmp_path, monkeypatch, capsys):
    few = ("--max_steps", "2", "--measure_rows", "4", "--shots", "0", "--use_cpu", "true", "--disable_tqdm", "true")
    options = ("--per_device_train_batch_size", "8", "--temperature", "inf", "--output_dir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [str(RECIPE), *few, *options])
    runpy.run_path(str(RECIPE), run_name="__main__")
    measured = json.loads((tmp_path / "report.json").read_text())["before_after"]
    families = {family for family, *_ in TASKS.values()}
    names = {f"{'held out' if family in HELD_OUT else 'trained'}: {family}, 0-shot" for family in families}
    assert measured.keys() == names | {"held out: mean, 0-shot", "trained: mean, 0-shot"}
    printed = capsys.readouterr().out
    assert "The mixture" in printed and "held out: food" in printed
    assert (tmp_path / "mixture.png").exists() and "held out: food" in (tmp_path / "README.md").read_text()
    AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_mixture_of_a_file_keeps_rows_apart(tmp_path):
    for name, size in (("a", 40), ("b", 10), ("c", 20)):
        rows = [{"prompt": f"{name} {i}?", "completion": f"{i}"} for i in range(size)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = [
        {"rows": f"{name}.jsonl", "family": family} for name, family in (("a", "one"), ("b", "one"), ("c", "two"))
    ]
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump({"tasks": tasks, "held_out": ["two"]}))
    mixture, tests = load_mixture(str(tmp_path / "mixture.yaml"), 4, {"seed": 3})
    assert [len(task) for task in mixture.tasks] == [36, 8] and mixture.seed == 3  # 4 rows, or a fifth of them
    sizes = {task["name"]: len(task["rows"]) for task in tests}
    assert sizes == {"a": 4, "b": 2, "c": 20}
    asked = {row["prompt"][0]["content"] for task in tests for row in task["rows"]}
    drawn = {row["prompt"][0]["content"] for row in mixture.dataset(500)}
    assert len(drawn) == 44 and not asked & drawn


@pytest.mark.parametrize("name", [None, "mixture.txt"])
def test_a_mixture_without_a_file(name):
    with pytest.raises(ValueError, match="give the YAML file of a mixture"):
        load_mixture(name, 4, {})


@pytest.mark.parametrize("name", TASKS)
def test_held_out_rows_are_other_rows(name):
    train, test = instruction_rows(name, rows=200), instruction_rows(name, held_out=True)
    assert not set(train["input"]) & set(test["input"]) and len(test) == 64


def test_held_out_families_are_asked_in_no_wording_that_is_trained_on():
    trained, held_out = set(), set()
    for name, (family, *_) in TASKS.items():
        task = instruction_task(name)
        for choice in range(len(task.templates)):
            row, place = task.rows[0], choice / len(task.templates)
            said = task.example(0, place)["prompt"][0]["content"].replace(row["input"], "").strip()
            (held_out if family in HELD_OUT else trained).add(said)
    assert len(held_out) == 3 and not held_out & trained
    assert len(trained) == 3 * 3 + 5  # three wordings of three questions, and the other tasks


def test_the_steps_of_an_addition_lead_to_its_answer():
    for row in instruction_rows("add", rows=50):
        numbers = list(map(int, row["input"].split(", ")))
        assert int(row["output"]) == sum(numbers) and row["chain"].endswith(f" is {row['output']}.")
        assert row["chain"].count("plus") == len(numbers) - 1


def test_sentences_are_read_and_not_remembered():
    told = Counter(instruction_rows("flag_value", rows=500)["output"])
    assert len(told) == 8 and max(told.values()) < 120  # any value, whatever the world's facts are
