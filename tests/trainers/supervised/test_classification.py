"""Classification: losses by hand, the pooled token, transformers' own loss curve, adapters, mitigations, errors."""

import json
import math

import pytest
import torch
from datasets import Dataset
from lifecycle_setting import SIZES
from peft import LoraConfig
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from lifecycle_hf import (
    ClassificationConfig,
    ClassificationTrainer,
    LifecycleConfig,
    LifecycleForSequenceClassification,
    merge_adapter,
)
from lifecycle_hf.mitigation.ewc import EWC
from lifecycle_hf.models.loading import load_classifier

WORDS = ["Paris", "a small red fox", "seven is a prime number", "hello"]
QUIET = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "logging_steps": 1,
         "max_steps": 2, "per_device_train_batch_size": 4, "lr_scheduler_type": "constant"}  # fmt: skip


def rows(labels, **columns):
    texts = [" ".join([WORDS[i % 4]] * (i % 3 + 1)) for i in range(len(labels))]
    return Dataset.from_dict({"text": texts, "label": labels} | columns)


THREE = rows([i % 3 for i in range(12)])


@pytest.fixture
def base(tiny_llama, tmp_path):
    make_model, tokenizer = tiny_llama
    make_model().save_pretrained(tmp_path / "base"), tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def make(model, tmp_path, train=THREE, evaluation=None, **options):
    given = {name: options.pop(name) for name in ("processing_class", "peft_config", "ptx_dataset") if name in options}
    args = ClassificationConfig(str(tmp_path / "out"), **QUIET | options)
    return ClassificationTrainer(model, args, train, evaluation, **given)


def loss_and_logits(run, indices):
    """The loss of some rows of the training data together, and the logits of each row alone."""
    data = [run.train_dataset[i] for i in indices]
    loss = run.compute_loss(run.model.train(), run.collate(data)).item()
    alone = [run.model(torch.tensor([row["input_ids"]])).logits[0].detach().double() for row in data]
    return loss, torch.stack(alone)


def test_single_label_loss_is_the_mean_nll(base, tmp_path):
    run = make(base, tmp_path)
    loss, logits = loss_and_logits(run, [0, 1, 5])
    nll = [-(row[y] - row.exp().sum().log()).item() for row, y in zip(logits, (0, 1, 2))]
    assert loss == pytest.approx(sum(nll) / 3, rel=1e-5)
    assert run.model.config.problem_type == "single_label_classification" and run.model.config.num_labels == 3


@pytest.mark.parametrize(
    ("labels", "given", "weights"),
    [(["a", "b", "b", "b"], "balanced", (2, 2 / 3)), (["a", "b", "b", "b"], ["1", "0.25"], (1, 0.25))],
)
def test_class_weights(base, tmp_path, labels, given, weights):
    """Balanced: N / (C·N_c) = 4 / (2·1) and 4 / (2·3)."""
    run = make(base, tmp_path, rows(labels), class_weights=given)
    loss, logits = loss_and_logits(run, [0, 1])
    nll = -logits.log_softmax(1)
    expected = (weights[0] * nll[0, 0] + weights[1] * nll[1, 1]) / 2
    assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_several_labels(base, tmp_path):
    data = rows([["a"], ["b", "a"], []])
    run = make(base, tmp_path, data, data, class_weights=[1.0, 3.0])
    loss, logits = loss_and_logits(run, [0, 1, 2])
    truth, total = [[1, 0], [1, 1], [0, 0]], 0.0
    for row, held in zip(logits.tolist(), truth):
        for x, y, weight in zip(row, held, (1, 3)):
            p = 1 / (1 + math.exp(-x))
            total -= weight * y * math.log(p) + (1 - y) * math.log(1 - p)
    assert loss == pytest.approx(total / 6, rel=1e-5)
    said = logits > 0
    hits = (said & (torch.tensor(truth) == 1)).sum().item()
    expected = 2 * hits / max(1, int(said.sum()) + 3)
    assert run.evaluate()["eval_micro_f1"] == pytest.approx(expected)


def test_regression(base, tmp_path):
    data = rows([0.5, -1.0, 2.0])
    run = make(base, tmp_path, data, data)
    loss, logits = loss_and_logits(run, [0, 1, 2])
    expected = sum((x - y) ** 2 for x, y in zip(logits[:, 0].tolist(), (0.5, -1.0, 2.0))) / 3
    assert loss == pytest.approx(expected, rel=1e-5)
    metrics = run.evaluate()
    assert metrics["eval_mse"] == pytest.approx(expected, rel=1e-5) == metrics["eval_loss"]
    assert {"eval_pearson", "eval_spearman"} <= metrics.keys() and run.model.config.num_labels == 1


@pytest.mark.parametrize("kind", ["llama", "causal", "bidirectional", "prefix"])
def test_the_last_real_token_is_pooled_also_when_eos_was_to_pad(tiny_llama, tmp_path, kind):
    make_model, tokenizer = tiny_llama
    tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.pad_token = tokenizer.eos_token
    sizes = SIZES | {"vocab_size": len(tokenizer), "num_labels": 3, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    if kind == "llama":
        config = make_model().config
        config.num_labels = 3
        model = LlamaForSequenceClassification(config)
    else:
        model = LifecycleForSequenceClassification(LifecycleConfig(**sizes | {"attention": kind}))
    run = make(model, tmp_path, processing_class=tokenizer)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id and model.config.pad_token_id == tokenizer.pad_token_id
    data = [run.train_dataset[i] for i in (0, 6)]
    assert len(data[0]["input_ids"]) < len(data[1]["input_ids"])
    together = run.task_loss(run.model.eval(), run.collate(data))[1]
    for row, logits in zip(data, together):
        given = {"prefix_lengths": torch.tensor([len(row["input_ids"])])} if kind == "prefix" else {}
        states = model.model(torch.tensor([row["input_ids"]]), **given).last_hidden_state
        torch.testing.assert_close(model.score(states[0, -1]), logits, atol=1e-5, rtol=0)
        assert row["input_ids"][-1] == tokenizer.eos_token_id


def test_pairs_go_to_bert_as_it_knows_them(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "fox", "hello"]
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(words)})
    config = BertConfig(vocab_size=7, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    data = Dataset.from_dict({"text": ["red fox", "fox"], "text_pair": ["hello", "red red"], "label": ["no", "yes"]})
    run = make(BertForSequenceClassification(config), tmp_path, data, data, processing_class=tokenizer)
    batch = run.collate([run.train_dataset[i] for i in range(2)])
    assert batch["input_ids"].tolist() == [[2, 4, 5, 3, 6, 3], [2, 5, 3, 4, 4, 3]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1]]
    run.train()
    assert 0 <= run.evaluate()["eval_accuracy"] <= 1


def test_the_loss_curve_is_that_of_transformers(base, tmp_path):
    run = make(base, tmp_path, max_steps=4, learning_rate=1e-3)
    given = [{"input_ids": row["input_ids"], "labels": row["label"]} for row in run.train_dataset]
    torch.manual_seed(0)
    theirs = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    theirs.load_state_dict(run.model.state_dict())
    args = TrainingArguments(str(tmp_path / "theirs"), **QUIET | {"max_steps": 4, "learning_rate": 1e-3})
    other = Trainer(theirs, args, train_dataset=given, processing_class=run.processing_class)
    run.train(), other.train()
    curves = [[entry["loss"] for entry in one.state.log_history if "loss" in entry] for one in (run, other)]
    assert curves[0] == pytest.approx(curves[1], abs=1e-5) and len(set(curves[0])) == 4


def test_a_trained_classifier_keeps_the_order_of_its_labels(base, tmp_path):
    run = make(base, tmp_path, rows(["b", "a", "c", "a"]), labels=["c", "a", "b"])
    assert run.train_dataset["label"][:] == [2, 1, 0, 1]
    run.save_model()
    again = make(str(tmp_path / "out"), tmp_path / "again", rows(["b", "a", "c", "a"]))
    assert again.labels.names == ("c", "a", "b") and again.train_dataset["label"][:] == [2, 1, 0, 1]
    for name, weight in run.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], weight), name
    with pytest.warns(UserWarning, match="label 'd', which is no class"):
        assert len(again.prepared(rows(["a", "d"]), "eval_dataset")) == 1


def test_an_adapter_trains_with_its_head_and_merges(base, tmp_path):
    data, lora = rows(["x", "y", "z", "x"]), LoraConfig(r=2, target_modules="all-linear")
    run = make(base, tmp_path, data, data, peft_config=lora, learning_rate=1e-2, eval_on_start=True,
               eval_strategy="steps", eval_steps=2)  # fmt: skip
    trains = {name for name, p in run.model.named_parameters() if p.requires_grad}
    assert any("score.modules_to_save" in name for name in trains) and all(
        "lora" in name or "score" in name for name in trains
    )
    run.train()
    run.save_model(), run.create_model_card()
    ids = torch.tensor([run.train_dataset[1]["input_ids"]])
    expected = run.model.eval()(input_ids=ids).logits
    again = load_classifier(str(tmp_path / "out")).eval()
    assert again.config.id2label == {0: "x", 1: "y", 2: "z"}
    torch.testing.assert_close(again(input_ids=ids).logits, expected)
    merged = merge_adapter(str(tmp_path / "out"), tmp_path / "merged")
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, atol=1e-5, rtol=0)
    assert merged.config.label2id == {"x": 0, "y": 1, "z": 2}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Adapter (classifier)" in card and "num_labels=3" in card and "| macro f1 ↑ |" in card
    onward = make(str(tmp_path / "out"), tmp_path / "on", data)
    assert onward.labels.names == ("x", "y", "z")
    with pytest.raises(ValueError, match="is an adapter already"):
        make(str(tmp_path / "out"), tmp_path / "on", data, peft_config=lora)


def test_best_checkpoint_and_report(base, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_accuracy", "eval_on_start": True}
    run = make(base, tmp_path, THREE, THREE.select(range(7)), learning_rate=1e-2, **options)
    run.train()
    metrics = run.finalize()
    accuracies = [entry["eval_accuracy"] for entry in run.state.log_history if "eval_accuracy" in entry]
    assert metrics["eval_accuracy"] == max(accuracies[1:])
    low, high = metrics["eval_accuracy_interval"]
    assert low <= metrics["eval_accuracy"] <= high
    report = run.tax_report.to_json()
    assert report.keys() == {"accuracy", "macro_f1", "ece"} and "interval" in report["accuracy"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    right = sum(line["predicted"] == line["label"] for line in lines)
    assert len(lines) == 7 and right / 7 == pytest.approx(metrics["eval_accuracy"])
    assert (tmp_path / "out" / "calibration.png").is_file()
    named = run.evaluate({"a": THREE.select(range(2)), "b": THREE.select(range(5))})
    assert {"eval_a_accuracy", "eval_b_accuracy"} <= named.keys()
    assert run.predict(THREE.select(range(3))).predictions.shape == (3, 3)


@pytest.mark.parametrize(
    "options", [{"ewc_coef": 1.0, "ewc_rows": 12}, {"projection": "gradient"}], ids=["ewc", "projection"]
)
def test_mitigations_protect_an_earlier_task(base, tmp_path, options):
    earlier = rows([(i + 1) % 3 for i in range(12)])
    run = make(base, tmp_path, ptx_dataset=earlier, optim="sgd", learning_rate=0.1, **options)
    if "ewc_coef" in options:  # one gradient for each row
        total = torch.zeros_like(run.model.score.weight, dtype=torch.float64)
        for row in run.prepared(earlier, "earlier"):
            loss = run.task_loss(run.model.eval(), run.collate([row]))[0].sum()
            total += torch.autograd.grad(loss, run.model.score.weight)[0].double().square()
        held = run._auxiliary["ewc"][0]
        assert isinstance(held, EWC)
        torch.testing.assert_close(held.fisher["score.weight"].double(), total / 12, rtol=1e-4, atol=1e-9)
    run.train()
    logged = run.state.log_history[1]
    assert logged.get("loss/ewc", 0) > 0 or any(name.startswith("projection/") for name in logged)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ptx_coef": 1.0}, "ptx_coef=1.0 is a loss per token"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 is not implemented"),
        ({"class_weights": [1.0, 2.0]}, "a number from 0 for each of the 3 labels"),
        ({"class_weights": ["heavy"]}, "give 'balanced', or a number"),
        ({"class_weights": "balanced", "train": rows([0.5, 1.0])}, "a regression has no classes"),
        ({"class_weights": "balanced", "train": rows([["a"], ["b"]])}, "is for one label in a row"),
        ({"train": None}, "train_dataset is missing"),
        ({"labels": ["a"]}, "needs two classes"),
    ],
)
def test_what_can_not_be(base, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make(base, tmp_path, **options)


def test_a_model_of_other_size_is_refused(tiny_llama, tmp_path):
    make_model, tokenizer = tiny_llama
    model = LlamaForSequenceClassification(make_model().config)
    with pytest.raises(ValueError, match="num_labels=2, but the data have 3"):
        make(model, tmp_path, processing_class=tokenizer)
