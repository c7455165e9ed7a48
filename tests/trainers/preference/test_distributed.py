"""DPO, KTO and ORPO in two processes on CPU give what one gives: DDP, ZeRO-2, ZeRO-3 and FSDP2."""

from pathlib import Path

import pytest
import torch
from launching import launch, needs_deepspeed, results
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

SCRIPT = Path(__file__).parents[2] / "launched" / "preference_invariance.py"
NAMES = ("dpo", "dpo_cached", "dpo_lora", "kto", "orpo")


@pytest.fixture(scope="module")
def base(tiny_llama, tmp_path_factory):
    make_model, tokenizer = tiny_llama
    path = tmp_path_factory.mktemp("base")
    # The head has so many weights that ZeRO-3 shards it.
    make_model(hidden_size=288).save_pretrained(path), tokenizer.save_pretrained(path)
    return path


def run(config, output, batch, base, kept, names=NAMES, engine="NO"):
    env = {"KEPT": str(kept)} | ({"FSDP_ON_CPU": "1"} if engine == "FSDP" else {})
    return results(launch(config, SCRIPT, output, batch, base, ",".join(names), env=env))


@pytest.fixture(scope="module")
def single(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    return folder, run("cpu", folder, 4, base, folder / "kept")


@pytest.mark.parametrize(
    ("config", "engine", "names"),
    [
        ("cpu_ddp", "MULTI_CPU", NAMES),
        pytest.param("cpu_ddp", "FSDP", NAMES, marks=pytest.mark.slow),
        pytest.param("cpu_zero2", "DEEPSPEED", ("dpo", "kto"), marks=needs_deepspeed),
        pytest.param("cpu_zero2", "DEEPSPEED", NAMES, marks=[needs_deepspeed, pytest.mark.slow]),
        pytest.param("cpu_zero3", "DEEPSPEED", NAMES, marks=[needs_deepspeed, pytest.mark.slow]),
    ],
)
def test_two_processes_of_two_equal_one_of_four(config, engine, names, base, single, tmp_path):
    """5 held-out rows in batches of 2 × 2: the rows that fill up the last batch must not count."""
    folder, expected = single
    # Under ZeRO-3 one process computes the log-probs of the reference before; else the two compute them.
    found = run(config, tmp_path, 2, base, (folder if config == "cpu_zero3" else tmp_path) / "kept", names, engine)
    assert tuple(found) == names and tuple(expected) == NAMES
    for name in names:
        one, two = expected[name], found[name]
        assert (one["world_size"], one["engine"], two["world_size"], two["engine"]) == (1, "NO", 2, engine)
        assert len(one["steps"]) == 3 and {"loss", "grad_norm", "rewards/margins", "entropy"} <= one["steps"][0].keys()
        for step, (first, second) in enumerate(zip(one["steps"], two["steps"], strict=True)):
            assert second == pytest.approx(first, rel=1e-4, abs=1e-6), (name, step)
        assert one["steps"][2]["loss"] != one["steps"][0]["loss"]
        kl = "kl" in one["held_out"]
        assert kl == (name == "kto")
        assert two["held_out"] == pytest.approx(one["held_out"], rel=1e-4, abs=1e-6), name
        check_saved(name, tmp_path / name, folder / name)


def check_saved(name, got, expected):
    """What was saved loads as an ordinary checkpoint and has the weights that one process gives."""
    auto = AutoPeftModelForCausalLM if name == "dpo_lora" else AutoModelForCausalLM
    weights, others = (auto.from_pretrained(folder).state_dict() for folder in (got, expected))
    assert weights.keys() == others.keys()
    for key, weight in weights.items():
        torch.testing.assert_close(
            weight, others[key], rtol=1e-3, atol=1e-3
        )  # Adam magnifies differences of very small gradients
