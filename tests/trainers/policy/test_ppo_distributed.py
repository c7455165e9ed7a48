"""Test that two processes on CPU give the result of one: DDP, ZeRO-2, ZeRO-3 and FSDP2."""

import json

import pytest
from launching import needs_deepspeed
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lifecycle_hf.data.loading import load_splits
from lifecycle_hf.evaluation.metrics import perplexity
from lifecycle_hf.models.loading import load_causal_lm, load_tokenizer

ALL = ("full", "lora", "head", "grpo", "resume")
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("engine", "modes", "slow"),
    [
        ("MULTI_CPU", ("full", "lora", "grpo", "resume"), False),
        pytest.param("ZERO3", ("full", "lora"), False, marks=needs_deepspeed),
        pytest.param("MULTI_CPU", ALL, True, marks=SLOW),
        pytest.param("FSDP", ALL, True, marks=SLOW),
        pytest.param("ZERO2", ALL, True, marks=[needs_deepspeed, SLOW]),
        pytest.param("ZERO3", ALL, True, marks=[needs_deepspeed, SLOW]),
    ],
)
def test_two_processes_of_four_equal_one_of_eight(engine, modes, slow, launched):
    single, double = launched("NO").found, launched(engine, slow)
    engine = "DEEPSPEED" if engine.startswith("ZERO") else engine
    for mode in modes:
        if mode == "resume":
            check_resumed(double.found["resume"], engine)
            continue
        one, two = single[mode], double.found[mode]
        assert (one["world_size"], one["engine"], two["world_size"], two["engine"]) == (1, "NO", 2, engine)
        names = ("loss", "grad_norm", "kl", "reward", "entropy", "loss/policy", "loss/value", "loss/ptx")
        looks = ("completions/distinct", "completions/distinct_first_half", "completions/most_common")
        for name in (*names, *looks, "reward/length_correlation"):
            if (mode, name) != ("grpo", "loss/value"):  # which has no critic
                assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), (mode, name)
        assert [len(lengths) for lengths in two["sampled"]] == [4] and min(two["sampled"][0]) >= 1
        check_saved(mode, double.folder / "ppo" / mode, double.models / "base")


def test_the_recipe_runs_on_two_processes(launched):
    double = launched("MULTI_CPU")
    folder = double.folder / "recipe"
    assert "| world_size | `2` |" in (folder / "README.md").read_text()
    report = json.loads((folder / "report.json").read_text())
    assert report["kl"]["before"] == pytest.approx(0, abs=1e-6) and 0 < abs(report["kl"]["after"]) < 0.1
    assert (folder / "training.png").exists()
    texts = load_splits(str(double.models / "texts.jsonl"), "ptx")[1]["text"]
    after = perplexity(load_causal_lm(str(folder)), load_tokenizer(str(folder)), texts)
    assert report["perplexity"]["after"] == pytest.approx(float(after), rel=1e-5)
    assert report["perplexity"]["after"] < 0.99 * report["perplexity"]["before"]  # the pretraining mix learns texts


def check_resumed(found, engine):
    """Check that the resumed run has the logs and weights of the whole one, up to the order of sums."""
    assert (found["world_size"], found["engine"]) == (2, engine)
    exact = engine != "DEEPSPEED"
    whole, resumed = found["lines"]
    assert len(whole) == len(resumed) == 4
    for a, b in zip(whole, resumed, strict=True):
        assert b == (a if exact else pytest.approx(a, rel=1e-5, abs=1e-7))
    assert found["far"] <= (0 if exact else 1e-6) and found["moved"] > 1e-3


def check_saved(mode, folder, base):
    """Check that the saved weights of all processes load without this package."""
    if mode in ("lora", "head"):
        assert (folder / "adapter_model.safetensors").exists() and (folder / "value/value_head.safetensors").exists()
        policy = AutoPeftModelForCausalLM.from_pretrained(folder)
        assert any(p.abs().max() > 0 for n, p in policy.named_parameters() if "lora_B" in n)
        return
    policy, before = AutoModelForCausalLM.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(base)
    moved = [(a - b).abs().max().item() for a, b in zip(policy.parameters(), before.parameters(), strict=True)]
    assert 0 < max(moved) < 2e-3  # one step of Adam at 1e-3
    if mode == "full":
        assert AutoModelForSequenceClassification.from_pretrained(folder / "value").config.num_labels == 1
