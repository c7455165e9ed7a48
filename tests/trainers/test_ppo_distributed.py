"""Two processes on CPU give what one gives: DDP, ZeRO-2 and ZeRO-3."""

import json
from pathlib import Path

import pytest
import torch
from launching import launch, needs_deepspeed
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForSequenceClassification

SCRIPT = Path(__file__).parents[1] / "launched" / "ppo_invariance.py"


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


def run(config, output, batch, mode, models):
    lines = launch(config, SCRIPT, output, batch, mode, *models).splitlines()
    return json.loads(next(line for line in lines if line.startswith("RESULT ")).removeprefix("RESULT "))


@pytest.fixture(scope="module")
def single(models, tmp_path_factory):
    return {mode: run("cpu", tmp_path_factory.mktemp(mode), 8, mode, models) for mode in ("full", "lora")}


@pytest.mark.parametrize(
    ("config", "mode"),
    [
        ("cpu_ddp", "full"),
        ("cpu_ddp", "lora"),
        pytest.param("cpu_zero2", "full", marks=needs_deepspeed),
        pytest.param("cpu_zero3", "full", marks=needs_deepspeed),
        pytest.param("cpu_zero3", "lora", marks=needs_deepspeed),
    ],
)
def test_two_processes_of_four_equal_one_of_eight(config, mode, models, single, tmp_path):
    one, two = single[mode], run(config, tmp_path, 4, mode, models)
    assert (one["world_size"], two["world_size"]) == (1, 2)
    for name in ("loss", "grad_norm", "kl", "reward", "entropy", "loss/policy", "loss/value", "loss/ptx"):
        assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name
    assert [len(lengths) for lengths in two["sampled"]] == [4] and min(two["sampled"][0]) >= 1
    if mode == "full":  # gathered, saved and loadable without this package
        policy, base = AutoModelForCausalLM.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(models[0])
        moved = [(a - b).abs().max().item() for a, b in zip(policy.parameters(), base.parameters(), strict=True)]
        assert 0 < max(moved) < 2e-3  # one step of Adam at 1e-3
        assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "value").config.num_labels == 1
    else:
        assert (tmp_path / "adapter_model.safetensors").exists()
        assert (tmp_path / "value" / "value_head.safetensors").exists()
