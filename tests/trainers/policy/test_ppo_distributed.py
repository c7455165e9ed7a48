"""Test that two processes on CPU give the result of one: DDP, ZeRO-2, ZeRO-3 and FSDP2."""

from pathlib import Path

import pytest
import torch
from launching import launch, needs_deepspeed, results
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForSequenceClassification

SCRIPT = Path(__file__).parents[2] / "launched" / "ppo_invariance.py"


@pytest.fixture(scope="module")
def models(tiny_llama, tmp_path_factory):
    make_model, tokenizer = tiny_llama
    base, reward = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("reward")
    make_model().save_pretrained(base), tokenizer.save_pretrained(base)
    config = make_model().config
    config.num_labels, config.reward_center = 1, 0.25
    torch.manual_seed(1)
    LlamaForSequenceClassification(config).save_pretrained(reward), tokenizer.save_pretrained(reward)
    return base, reward


def run(config, engine, output, batch, models, modes):
    env = {"FSDP_ON_CPU": "1"} if engine == "FSDP" else {}
    return results(launch(config, SCRIPT, output, batch, *models, ",".join(modes), env=env))


@pytest.fixture(scope="module")
def single(models, tmp_path_factory):
    return run("cpu", "NO", tmp_path_factory.mktemp("single"), 8, models, ("full", "lora", "head"))


ALL = ("full", "lora", "head", "resume")
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("config", "engine", "modes"),
    [
        ("cpu_ddp", "MULTI_CPU", ("full", "lora", "resume")),
        ("cpu_ddp", "FSDP", ("lora", "head")),
        pytest.param("cpu_zero2", "DEEPSPEED", ("lora",), marks=needs_deepspeed),
        pytest.param("cpu_zero3", "DEEPSPEED", ("full", "lora"), marks=needs_deepspeed),
        pytest.param("cpu_ddp", "MULTI_CPU", ALL, marks=SLOW),
        pytest.param("cpu_ddp", "FSDP", ALL, marks=SLOW),
        pytest.param("cpu_zero2", "DEEPSPEED", ALL, marks=[needs_deepspeed, SLOW]),
        pytest.param("cpu_zero3", "DEEPSPEED", ALL, marks=[needs_deepspeed, SLOW]),
    ],
)
def test_two_processes_of_four_equal_one_of_eight(config, engine, modes, models, single, tmp_path):
    results = run(config, engine, tmp_path, 4, models, modes)
    if "resume" in modes:
        check_resumed(results.pop("resume"), engine)
    for mode in results:
        one, two = single[mode], results[mode]
        assert (one["world_size"], one["engine"], two["world_size"], two["engine"]) == (1, "NO", 2, engine)
        names = ("loss", "grad_norm", "kl", "reward", "entropy", "loss/policy", "loss/value", "loss/ptx")
        looks = ("completions/distinct", "completions/distinct_first_half", "completions/most_common")
        for name in (*names, *looks, "reward/length_correlation"):
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), (mode, name)
        assert [len(lengths) for lengths in two["sampled"]] == [4] and min(two["sampled"][0]) >= 1
        check_saved(mode, tmp_path / mode, models[0])


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
    if mode != "full":
        assert (folder / "adapter_model.safetensors").exists() and (folder / "value/value_head.safetensors").exists()
        policy = AutoPeftModelForCausalLM.from_pretrained(folder)
        assert any(p.abs().max() > 0 for n, p in policy.named_parameters() if "lora_B" in n)
        return
    policy, before = AutoModelForCausalLM.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(base)
    moved = [(a - b).abs().max().item() for a, b in zip(policy.parameters(), before.parameters(), strict=True)]
    assert 0 < max(moved) < 2e-3  # one step of Adam at 1e-3
    assert AutoModelForSequenceClassification.from_pretrained(folder / "value").config.num_labels == 1
