"""Two processes on CPU give what one gives: DDP, ZeRO-2 and ZeRO-3."""

from pathlib import Path

import pytest
import torch
from launching import launch, needs_deepspeed, results
from peft import AutoPeftModelForCausalLM
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


def run(config, output, batch, models, modes):
    return results(launch(config, SCRIPT, output, batch, *models, ",".join(modes)))


@pytest.fixture(scope="module")
def single(models, tmp_path_factory):
    return run("cpu", tmp_path_factory.mktemp("single"), 8, models, ("full", "lora"))


@pytest.mark.parametrize(
    ("config", "engine", "modes"),
    [
        ("cpu_ddp", "MULTI_CPU", ("full", "lora")),
        pytest.param("cpu_zero2", "DEEPSPEED", ("full",), marks=needs_deepspeed),
        pytest.param("cpu_zero3", "DEEPSPEED", ("full", "lora"), marks=needs_deepspeed),
    ],
)
def test_two_processes_of_four_equal_one_of_eight(config, engine, modes, models, single, tmp_path):
    results = run(config, tmp_path, 4, models, modes)
    for mode in modes:
        one, two = single[mode], results[mode]
        assert (one["world_size"], one["engine"], two["world_size"], two["engine"]) == (1, "NO", 2, engine)
        for name in ("loss", "grad_norm", "kl", "reward", "entropy", "loss/policy", "loss/value", "loss/ptx"):
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), (mode, name)
        assert [len(lengths) for lengths in two["sampled"]] == [4] and min(two["sampled"][0]) >= 1
        check_saved(mode, tmp_path / mode, models[0])


def check_saved(mode, folder, base):
    """What was gathered from the processes and saved loads without this package."""
    if mode == "lora":
        assert (folder / "adapter_model.safetensors").exists() and (folder / "value/value_head.safetensors").exists()
        policy = AutoPeftModelForCausalLM.from_pretrained(folder)
        assert any(p.abs().max() > 0 for n, p in policy.named_parameters() if "lora_B" in n)
        return
    policy, before = AutoModelForCausalLM.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(base)
    moved = [(a - b).abs().max().item() for a, b in zip(policy.parameters(), before.parameters(), strict=True)]
    assert 0 < max(moved) < 2e-3  # one step of Adam at 1e-3
    assert AutoModelForSequenceClassification.from_pretrained(folder / "value").config.num_labels == 1
