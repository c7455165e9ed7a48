"""DoReMi: planted domains, the weights' way by NumPy, resuming, and errors for bad input."""

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from ppo_setting import KeepGradients, logged

from lifecycle_hf import (
    DoReMiConfig,
    DoReMiTrainer,
    LifecycleConfig,
    LifecycleForCausalLM,
    PretrainingConfig,
    PretrainingTrainer,
)
from lifecycle_hf.data.corpora import train_tokenizer
from lifecycle_hf.toyworld import planted_domains
from lifecycle_hf.trainers.supervised.pretraining import new_model

DATA = planted_domains(documents=60)
NAMES = ["learnable", "noise", "trivial"]
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
QUIET = {"report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
CONSTANT = {"lr_scheduler_type": "constant", "warmup_steps": 0, "max_length": 32}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(DATA["text"], 300)


def model(seed, **changes):
    torch.manual_seed(seed)
    made = LifecycleForCausalLM(LifecycleConfig(**({"vocab_size": 300} | SIZES | changes)))
    for parameter in made.parameters():  # so that losses differ by token
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made


def trainer(tmp_path, tokenizer, data=DATA, reference=None, callbacks=None, kind=DoReMiTrainer, **options):
    args = DoReMiConfig(
        str(tmp_path), **(QUIET | CONSTANT | {"per_device_train_batch_size": 6, "max_steps": 3} | options)
    )
    return DoReMiTrainer(
        model(0), model(1) if reference is None else reference, args, data, tokenizer, callbacks=callbacks
    )


def weights_logged(run):
    return np.array([logged(run, f"weight/{name}") for name in NAMES]).T


def nll_by_hand(lm, row):
    """−log p of tokens 1 … of a row, in fp64."""
    logprobs = lm.double()(input_ids=torch.tensor(row["input_ids"])[None]).logits[0].log_softmax(-1)
    return [-logprobs[t - 1, token].item() for t, token in enumerate(row["input_ids"]) if t]


@pytest.mark.parametrize("batch", [6, 2])
def test_weights_by_hand(tmp_path, tokenizer, batch):
    """A frozen proxy: λ of each step from both models' probabilities. Of two rows, a domain has none."""
    options = {"learning_rate": 0.0, "weight_step_size": 0.7, "weight_smoothing": 0.03, "max_steps": 4}
    start = {"learnable": 1, "noise": 2, "trivial": 1}
    run = trainer(tmp_path, tokenizer, domain_weights=start, per_device_train_batch_size=batch, **options)
    rows = [run.train_dataset[i] for i in range(4 * batch)]
    run.train()
    w, last, total, ways, losses, absent = np.array([0.25, 0.5, 0.25]), np.zeros(3), np.zeros(3), [], [], 0
    sums = np.zeros((3, 2))
    for step in range(4):
        excess, plain = {}, {}
        for row in rows[step * batch : (step + 1) * batch]:
            proxy, reference = nll_by_hand(model(0), row), nll_by_hand(model(1), row)
            excess.setdefault(row["domain"], []).extend(max(a - b, 0) for a, b in zip(proxy, reference))
            plain.setdefault(row["domain"], []).extend(proxy)
            sums[row["domain"]] += sum(reference), len(reference)
        absent += 3 - len(excess)
        losses.append(sum(w[k] * np.mean(found) for k, found in plain.items()))
        last = np.array([np.mean(excess[k]) if k in excess else last[k] for k in range(3)])
        w = w * np.exp(0.7 * last)
        w = 0.97 * w / w.sum() + 0.01
        total, ways = total + w, [*ways, w]
    assert (absent > 0) == (batch == 2) and np.ptp(ways[-1]) > 0.05
    assert weights_logged(run) == pytest.approx(np.array(ways), abs=1e-6)
    assert logged(run, "loss") == pytest.approx(losses, rel=1e-5)
    assert list(run.weights.values()) == pytest.approx(total / 4, abs=1e-6)
    written = yaml.safe_load((tmp_path / "domain_weights.yaml").read_text())
    assert written["weights"] == run.weights and list(run.weights) == NAMES
    reads = dict(zip(NAMES, sums[:, 0] / sums[:, 1]))
    assert written["reference_loss"] == pytest.approx(reads, rel=1e-5)
    assert written["start_weights"] == {"learnable": 0.25, "noise": 0.5, "trivial": 0.25}
    assert written["last_weights"] == pytest.approx(dict(zip(NAMES, ways[-1])), abs=1e-6)
    expected = {"steps": 4, "rows_per_step": batch, "tokens_per_row": 32, "weight_step_size": 0.7, "seed": 42}
    assert {name: written[name] for name in expected} == expected and written["weight_smoothing"] == 0.03
    assert written["parameters"]["proxy"] == sum(p.numel() for p in model(0).parameters())
    assert written["tokenizer"]["tokens"] == 300 and len(written["tokenizer"]["sha256"]) == 64
    assert (tmp_path / "domain_weights.png").stat().st_size > 10_000


def test_accumulation_changes_nothing(tmp_path, tokenizer):
    runs, steps = [], []
    for batch, accumulation in ((8, 1), (1, 8)):
        keep = KeepGradients()
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        runs.append(trainer(tmp_path, tokenizer, callbacks=[keep], **options))
        runs[-1].train()
        steps.append(keep.steps)
    assert weights_logged(runs[1]) == pytest.approx(weights_logged(runs[0]), abs=1e-6)
    assert logged(runs[1], "loss") == pytest.approx(logged(runs[0], "loss"), rel=1e-5)
    for one, other in zip(*steps, strict=True):
        for name, gradient in one.items():
            torch.testing.assert_close(other[name], gradient, atol=2e-6, rtol=1e-3)


def test_a_resumed_run_is_the_same_to_the_bit(tmp_path, tokenizer):
    options = {
        "save_strategy": "steps",
        "save_steps": 5,
        "max_steps": 9,
        "logging_steps": 2,
        "data": DATA.select([0, *range(60, 120, 20), 120]),
    }
    whole = trainer(tmp_path, tokenizer, **options)
    assert (
        5 * 6 % len(whole.train_dataset) and 3 * len(whole.train_dataset) < 9 * 6
    )  # within the second of four epochs
    whole.train()
    written = (tmp_path / "domain_weights.yaml").read_bytes()
    resumed = trainer(tmp_path, tokenizer, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert (tmp_path / "domain_weights.yaml").read_bytes() == written
    assert resumed.weights == whole.weights and (weights_logged(resumed) == weights_logged(whole)).all()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


@pytest.mark.parametrize("seed", range(5))
def test_the_weight_of_the_learnable_domain_rises(tmp_path, seed):
    data = planted_domains(seed)
    tokenizer = train_tokenizer(data["text"], 300)
    options = (
        QUIET | CONSTANT | {"learning_rate": 1e-2, "per_device_train_batch_size": 9, "seed": seed, "max_length": 48}
    )
    given = PretrainingConfig(
        str(tmp_path / "reference"), **options, max_steps=100, domain_weights=dict.fromkeys(NAMES, 1)
    )
    reference = PretrainingTrainer(
        new_model(given, tokenizer, **SIZES | {"num_hidden_layers": 1}), given, data, processing_class=tokenizer
    )
    reference.train()
    args = DoReMiConfig(str(tmp_path), **options, max_steps=60, weight_step_size=0.1)
    run = DoReMiTrainer(
        new_model(args, tokenizer, **SIZES | {"num_hidden_layers": 1}), reference.model, args, data, tokenizer
    )
    run.train()
    print(run.weights)
    for found in (run.weights, dict(zip(NAMES, weights_logged(run)[-1]))):
        assert found["learnable"] > 1 / 3 > max(found["noise"], found["trivial"])


def test_a_model_is_pretrained_by_the_weights(tmp_path, tokenizer):
    (tmp_path / "w.yaml").write_text(yaml.safe_dump({"weights": {"learnable": 0.5, "noise": 0, "trivial": 0.5}}))
    args = PretrainingConfig(str(tmp_path), **QUIET, **CONSTANT, max_steps=2, domain_weights=str(tmp_path / "w.yaml"))
    run = PretrainingTrainer(model(0), args, DATA, DATA.select([0, 60]), tokenizer)
    rows = [run.train_dataset[i] for i in range(len(run.train_dataset))]
    texts = [tokenizer.decode(row["input_ids"]).replace(tokenizer.eos_token, "") for row in rows]
    assert sum(set(text) <= set("ab ") for text in texts) == pytest.approx(len(rows) / 2, abs=1)
    assert {row["domain"] for row in rows} == {0, 2}
    run.train()
    assert run.evaluate()["eval_loss"] > 0


def test_other_objectives_draw_by_the_weights_too(tmp_path, tokenizer):
    copy = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token, pad_token="<|padding|>"
    )
    args = PretrainingConfig(
        str(tmp_path),
        **QUIET,
        **CONSTANT,
        objective="span_corruption",
        max_steps=1,
        domain_weights=dict.fromkeys(NAMES, 1),
    )
    torch.manual_seed(0)
    prefix = LifecycleForCausalLM(LifecycleConfig(vocab_size=300, attention="prefix", **SIZES))
    run = PretrainingTrainer(prefix, args, DATA, processing_class=copy)
    first = run.train_dataset[0]["input_ids"].tolist()
    run.train_dataset.set_epoch(1)
    assert run.train_dataset[0]["input_ids"].tolist() != first
    run.train()
    assert logged(run, "loss/span_corruption")


def column(**domains):
    return Dataset.from_dict(
        {"text": [t for ts in domains.values() for t in ts], "domain": [n for n, ts in domains.items() for _ in ts]}
    )


LONG = ["some words " * 40]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"data": {"a": LONG, "b": []}}, "domain 'b' has no row"),
        ({"data": {"a": LONG}}, "'a' is its only domain; DoReMi weighs two or more"),
        ({"data": column(a=LONG, b=["word"])}, "train_dataset, domain 'b': the corpus has .* fewer than the 32"),
        ({"data": DATA.remove_columns("domain")}, "add 'domain'"),
        ({"data": None}, "train_dataset is a NoneType"),
        ({"domain_weights": {"learnable": 1, "noise": 1}}, "each domain of train.* needs a weight.*missing: trivial"),
        ({"domain_weights": dict.fromkeys([*NAMES, "web"], 1)}, "unknown: web"),
        ({"domain_weights": {"learnable": 1, "noise": 1, "trivial": 0}}, "'trivial' has the weight 0"),
        ({"weight_step_size": 0.0}, "weight_step_size=0.0 must be above 0"),
        ({"weight_step_size": -1.0}, "weight_step_size=-1.0 must be above 0"),
        ({"weight_smoothing": 1.5}, "weight_smoothing=1.5 must lie between 0 and 1"),
        ({"objective": "ul2"}, "objective='ul2': DoReMi compares the losses of causal LMs"),
        ({"eval_strategy": "steps"}, "eval_strategy=.*: DoReMi reads training losses alone"),
        ({"reference": model(1, vocab_size=258)}, "ref_model knows 258 tokens of the tokenizer's 300"),
    ],
)  # fmt: skip
def test_bad_input(tmp_path, tokenizer, options, problem):
    with pytest.raises(ValueError, match=problem):
        trainer(tmp_path, tokenizer, **options)


def test_a_reference_that_trains_and_an_evaluation(tmp_path, tokenizer):
    proxy = model(0)
    with pytest.raises(ValueError, match="ref_model is the model that trains"):
        DoReMiTrainer(proxy, proxy, DoReMiConfig(str(tmp_path), **QUIET), DATA, tokenizer)
    with pytest.raises(ValueError, match="eval_dataset: DoReMi's proxy is not evaluated"):
        trainer(tmp_path, tokenizer).evaluate(DATA)
    with pytest.raises(ValueError, match="eval_dataset: DoReMi's proxy is not evaluated"):
        DoReMiTrainer(proxy, model(1), DoReMiConfig(str(tmp_path), **QUIET), DATA, tokenizer, eval_dataset=DATA)


def test_a_proxy_that_diverges(tmp_path, tokenizer):
    run = trainer(tmp_path, tokenizer)
    run.model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="step 1: the excess loss of domain 'learnable' is not finite"):
        run.train()
