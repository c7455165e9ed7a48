"""The recipes of tasks: two steps on the toy world, and on a file of one's own with an adapter."""

import importlib.util
import json
from pathlib import Path

import pytest
from transformers import AutoModelForQuestionAnswering, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from lifecycle_hf.toyworld import stages, task_dataset, tasks

RECIPES = Path(__file__).parents[2] / "recipes"
QUICK = ["--max_steps", "2", "--use_cpu", "true", "--disable_tqdm", "true", "--eval_strategy", "no"]


def run(name, output, *options):
    from lifecycle_hf import ClassificationConfig, QuestionAnsweringConfig, Seq2SeqConfig, cli

    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    config = {"classify": ClassificationConfig, "qa": QuestionAnsweringConfig, "seq2seq": Seq2SeqConfig}[name]
    argv = ["--output_dir", str(output), *QUICK, *options]
    default = RECIPES / "configs" / f"{name}_toyworld.yaml"
    recipe.main(*cli.parse((cli.ProtectedArguments, config, recipe.ModelConfig), default, argv=argv))
    return json.loads((output / "report.json").read_text())


@pytest.fixture
def small_world(tmp_path, monkeypatch):
    """The toy world with few rows, and its first model."""
    task_dataset.cache_clear()
    monkeypatch.setattr(tasks, "TASKS", {name: (make, 64, 24) for name, (make, *_) in tasks.TASKS.items()})
    monkeypatch.setenv("LIFECYCLE_HF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(stages, "_build_init", stages.write_init)
    yield
    task_dataset.cache_clear()


@pytest.mark.parametrize(
    ("name", "auto", "metric"),
    [
        ("classify", AutoModelForSequenceClassification, "accuracy"),
        ("qa", AutoModelForQuestionAnswering, "f1"),
        ("seq2seq", AutoModelForSeq2SeqLM, "rouge_l"),
    ],
)
def test_the_embedded_default(small_world, tmp_path, name, auto, metric, capsys):
    report = run(name, tmp_path / "out")
    assert {f"eval_{metric}", f"eval_{metric}_interval", "before_after"} <= report.keys()
    assert "interval" in report["before_after"][metric] and "95 % interval" in capsys.readouterr().out
    config = auto.from_pretrained(tmp_path / "out").config
    assert (config.model_type if name == "seq2seq" else config.attention) in ("t5", "bidirectional")
    for file in ("README.md", "predictions.jsonl"):
        assert (tmp_path / "out" / file).is_file()


def test_a_file_of_pairs_with_an_adapter(tiny_llama, tmp_path):
    make_model, tokenizer = tiny_llama
    make_model().save_pretrained(tmp_path / "base"), tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"text": f"word {i}", "text_pair": "Paris", "label": ["no", "yes"][i % 2]} for i in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = ["--dataset_name", str(tmp_path / "data.jsonl"), "--model_name_or_path", str(tmp_path / "base")]
    adapter = ["--use_peft", "true", "--merge", "true", "--model_init_kwargs", "{}", "--class_weights", "balanced"]
    run("classify", tmp_path / "out", *data, *adapter)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "merged")
    assert merged.config.id2label == {0: "no", 1: "yes"}


def test_every_answer_of_the_toy_world_stands_where_it_says():
    for held_out in (False, True):
        rows = task_dataset("qa")["test" if held_out else "train"].select(range(200))
        for row in rows:
            texts, starts = row["answers"]["text"], row["answers"]["answer_start"]
            assert all(row["context"][s : s + len(t)] == t for t, s in zip(texts, starts)) and len(texts) < 2
        shares = sum(not row["answers"]["text"] for row in rows) / 200
        assert 0.1 < shares < 0.3


def test_written_answers_of_the_toy_world_are_right_and_of_requests_of_their_split():
    splits = task_dataset("seq2seq")
    for rows in splits.values():
        for row in rows.select(range(50)):
            answer = tasks.requests()[row["prompt"]].answer
            assert row["completion"].endswith(f" is {answer}.") if answer else row["completion"] == tasks.REFUSALS[0]
    assert 90 < len(set(splits["test"]["prompt"])) == len(splits["test"])
    assert not set(splits["train"]["prompt"]) & set(splits["test"]["prompt"])
