"""Our perplexity and multiple choice against lm-evaluation-harness on local tasks."""

import json
import math

import pytest
import yaml

from lifecycle_hf.evaluation.bootstrap import Measurement
from lifecycle_hf.evaluation.harness import lm_eval_tasks
from lifecycle_hf.evaluation.metrics import multiple_choice, perplexity

pytest.importorskip("lm_eval")
TEXTS = ["The capital of France is Paris.", "Two and three make five.", "Please tell me a story about a red fox."]
ACCURACIES = ("acc", "acc_norm")
QUESTIONS = [
    {"question": "The capital of France is", "choices": ["Paris", "a small red fox", "seven"], "answer": 0},
    {"question": "Two and three make", "choices": ["five", "a prime number"], "answer": 0},
    {"question": "Please tell me ", "choices": ["hello", "a story", "no"], "answer": 1},
]


def write_task(folder, name, rows, **task):
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "metadata": {"version": 1},
    } | task
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return str(folder / f"{name}.yaml")


def test_perplexity_agrees(tiny_llama, tmp_path):
    """The harness predicts each token behind a BOS; ours ends texts at an EOS: with both written out they are one."""
    make_model, tokenizer = tiny_llama
    model = make_model(initializer_range=0.3)
    metrics = [
        {"metric": name, "aggregation": kind, "higher_is_better": False}
        for name, kind in (
            ("word_perplexity", "weighted_perplexity"),
            ("byte_perplexity", "weighted_perplexity"),
            ("bits_per_byte", "bits_per_byte"),
        )
    ]
    task = write_task(
        tmp_path, "rolling", [{"text": f"{text}<eos>"} for text in TEXTS], output_type="loglikelihood_rolling",
        doc_to_text="", doc_to_target="{{text}}", metric_list=metrics,
    )  # fmt: skip
    values, higher = lm_eval_tasks(model, tokenizer, [task])
    ours = perplexity(model, tokenizer, [f"<bos>{text}" for text in TEXTS])
    nll, size = ours.columns[:, 0].sum(), sum(len(f"{text}<eos>") for text in TEXTS)
    assert values["rolling/byte_perplexity"] == pytest.approx(math.exp(nll / size), rel=1e-6)
    assert values["rolling/word_perplexity"] == pytest.approx(
        math.exp(nll / sum(len(t.split()) for t in TEXTS)), rel=1e-6
    )
    assert values["rolling/bits_per_byte"] == pytest.approx(nll / size / math.log(2), rel=1e-6)
    assert all(isinstance(value, Measurement) and len(value.columns) == 3 for value in values.values())
    assert not any(higher.values())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_multiple_choice_agrees(tiny_llama, tmp_path, seed):
    make_model, tokenizer = tiny_llama
    model = make_model(seed, initializer_range=0.3)
    task = write_task(
        tmp_path, "choices", QUESTIONS, output_type="multiple_choice", doc_to_text="{{question}}",
        doc_to_target="answer", doc_to_choice="choices", target_delimiter=" ",
        metric_list=[{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ACCURACIES],
    )  # fmt: skip
    model.save_pretrained(tmp_path / "model"), tokenizer.save_pretrained(tmp_path / "model")
    for given in (model, str(tmp_path / "model")):
        values, higher = lm_eval_tasks(given, tokenizer, [task])
        ours = multiple_choice(
            model, tokenizer, *([row[key] for row in QUESTIONS] for key in ("question", "choices", "answer"))
        )
        assert values["choices/acc"].columns.tolist() == ours.acc.columns.tolist()
        assert values["choices/acc_norm"].columns.tolist() == ours.acc_norm.columns.tolist()
        assert higher == {"choices/acc": True, "choices/acc_norm": True}


def test_unknown_tasks_are_named(tiny_llama, tmp_path):
    make_model, tokenizer = tiny_llama
    with pytest.raises(ValueError, match="no task file .*nowhere.yaml"):
        lm_eval_tasks(make_model(), tokenizer, [str(tmp_path / "nowhere.yaml")])
