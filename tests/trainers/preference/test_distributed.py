"""DPO, KTO, ORPO and online DPO in two processes on CPU give what one gives: DDP, ZeRO-2, ZeRO-3 and FSDP2."""

import pytest
import torch
from launching import needs_deepspeed
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

import lifecycle_hf  # noqa: F401  (registers the bottleneck adapter)

NAMES = ("dpo", "dpo_cached", "dpo_lora", "dpo_bottleneck", "kto", "orpo", "online")
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("engine", "names", "slow"),
    [
        ("MULTI_CPU", NAMES, False),
        pytest.param("FSDP", NAMES, True, marks=SLOW),
        pytest.param("ZERO2", ("dpo", "dpo_bottleneck", "online"), False, marks=needs_deepspeed),
        pytest.param("ZERO2", NAMES, True, marks=[needs_deepspeed, SLOW]),
        pytest.param("ZERO3", NAMES, True, marks=[needs_deepspeed, SLOW]),
    ],
)
def test_two_processes_of_two_equal_one_of_four(engine, names, slow, launched):
    """5 held-out rows in batches of 2 × 2: the rows that fill up the last batch must not count."""
    single, double = launched("NO"), launched(engine, slow)
    engine = "DEEPSPEED" if engine.startswith("ZERO") else engine
    for name in names:
        one, two = single.found[name], double.found[name]
        assert (one["world_size"], one["engine"], two["world_size"], two["engine"]) == (1, "NO", 2, engine)
        assert len(one["steps"]) == 3 and {"loss", "grad_norm", "rewards/margins", "entropy"} <= one["steps"][0].keys()
        for step, (first, second) in enumerate(zip(one["steps"], two["steps"], strict=True)):
            assert second == pytest.approx(first, rel=1e-4, abs=1e-6), (name, step)
        assert one["steps"][2]["loss"] != one["steps"][0]["loss"]
        kl = "kl" in one["held_out"]
        assert kl == (name == "kto")
        assert two["held_out"] == pytest.approx(one["held_out"], rel=1e-4, abs=1e-6), name
        check_saved(name, *(run.folder / "preference" / name for run in (double, single)))


def check_saved(name, got, expected):
    """What was saved loads as an ordinary checkpoint and has the weights that one process gives."""
    auto = AutoPeftModelForCausalLM if name in ("dpo_lora", "dpo_bottleneck") else AutoModelForCausalLM
    weights, others = (auto.from_pretrained(folder).state_dict() for folder in (got, expected))
    assert weights.keys() == others.keys()
    for key, weight in weights.items():
        torch.testing.assert_close(
            weight, others[key], rtol=1e-3, atol=1e-3
        )  # Adam magnifies differences of very small gradients
