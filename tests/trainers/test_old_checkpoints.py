"""Checkpoints of the version before (commit 04153b0) still load, and their runs go on as they would have there."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from ppo_setting import PROMPTS, count_e
from ppo_setting import config as ppo_config
from preference_setting import ANSWERS, OPTIONS, PAIRS
from transformers import AutoTokenizer, LlamaForCausalLM, set_seed

from lifecycle_hf import (
    DPOTrainer,
    KTOTrainer,
    LifecycleConfig,
    LifecycleForCausalLM,
    PPOTrainer,
    PretrainingConfig,
    PretrainingTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
    load_reward_model,
)
from lifecycle_hf.alignment_tax import EWC
from lifecycle_hf.data.collators import pad_sequences

KEPT = Path(__file__).parents[1] / "fixtures" / "checkpoints_04153b0"
TEXTS = Dataset.from_dict({"text": ["The capital of France is Paris.", "Two and three make five.", "hello", "a fox"]})
WORDS = Dataset.from_dict({"prompt": [f"word {i}" for i in range(8)], "completion": [" Paris"] * 8})
QUIET = {
    "report_to": "none", "use_cpu": True, "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True,
    "max_steps": 3, "learning_rate": 1e-2, "lr_scheduler_type": "constant",
}  # fmt: skip
LORA = {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "v_proj"])}
PTX = {"ptx_dataset": TEXTS}


def ppo(folder, tokenizer, given=(), **options):
    defaults = {"max_steps": 4, "ppo_epochs": 2, "learning_rate": 1e-2, "max_completion_length": 4}
    args, data = ppo_config(folder, **(defaults | options)), Dataset.from_dict({"prompt": PROMPTS})
    return PPOTrainer("base", count_e, args, data, processing_class=tokenizer, **dict(given))


def preference(folder, tokenizer, cls=DPOTrainer, data=PAIRS, given=(), **options):
    args = cls.config_class(str(folder), **(OPTIONS | {"max_steps": 3} | options))
    return cls("base", args=args, train_dataset=data, processing_class=tokenizer, **dict(given))


def stage(folder, tokenizer, cls=SFTTrainer, config=SFTConfig, data=WORDS, **given):
    args = config(str(folder), per_device_train_batch_size=4, gradient_checkpointing=False, **QUIET)
    return cls("base", args=args, train_dataset=data, processing_class=tokenizer, **given)


def pretraining(folder, tokenizer):
    sizes = json.loads((KEPT / "pretraining" / "config.json").read_text())
    torch.manual_seed(0)
    model = LifecycleForCausalLM(LifecycleConfig(**{k: v for k, v in sizes.items() if k != "auto_map"}))
    options = {"objective": "prefix", "max_length": 32, "per_device_train_batch_size": 2, "warmup_steps": 0}
    data = Dataset.from_dict({"text": [row["chosen"] * 20 for row in PAIRS]})
    args = PretrainingConfig(str(folder), **options, **QUIET)
    return PretrainingTrainer(model, args=args, train_dataset=data, processing_class=tokenizer)


ADAPTIVE = {"ptx_coef": 0.5, "kl_control": "ziegler", "kl_horizon": 40, "reward_normalization": "running"}
PROJECTED = {"projection": "update", "projection_every": 3, "ptx_ceiling": 1.0}
RUNS = {
    "ppo_model": lambda *to: ppo(*to, given=PTX, **ADAPTIVE),
    "ppo_adapter": lambda *to: ppo(*to, given=LORA),
    "ppo_head": lambda *to: ppo(*to, given=LORA, value="head"),
    "dpo": lambda *to: preference(*to, given=PTX, ewc_coef=1.0, ewc_rows=4),
    "projection": lambda *to: preference(*to, given=PTX, **PROJECTED),
    "kto": lambda *to: preference(*to, KTOTrainer, ANSWERS, given=LORA, reference_point="running_mean"),
    "sft": stage,
    "sft_adapter": lambda *to: stage(*to, **LORA),
    "reward": lambda *to: stage(*to, RewardTrainer, RewardConfig, PAIRS),
    "reward_adapter": lambda *to: stage(*to, RewardTrainer, RewardConfig, PAIRS, **LORA),
    "pretraining": pretraining,
}


@pytest.fixture
def kept(monkeypatch):
    """The folder of the old checkpoints; their base is named relative to it."""
    monkeypatch.chdir(KEPT)
    return AutoTokenizer.from_pretrained("base")


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_from_its_old_checkpoint(kept, tmp_path, name):
    shutil.copytree(KEPT / name, tmp_path / "checkpoint")
    set_seed(0)
    run = RUNS[name](tmp_path / "out", kept)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint"))
    (last,) = (entry for entry in run.state.log_history if "loss" in entry and entry["step"] == run.state.max_steps)
    *_, expected = json.loads((KEPT / name / "expected.json").read_text())
    assert expected["step"] == last["step"] == run.state.global_step
    assert {metric: last[metric] for metric in expected} == pytest.approx(expected, rel=2e-3, abs=1e-5)


@pytest.mark.parametrize("name", ["reward_final", "reward_adapter_final"])
def test_an_old_reward_model_gives_its_scores(kept, name):
    expected = json.loads((KEPT / name / "expected.json").read_text())
    model = load_reward_model(name, kept)
    scores = model.score(pad_sequences(expected["ids"], 0), torch.tensor([len(ids) for ids in expected["ids"]]))
    assert scores.tolist() == pytest.approx(expected["scores"], abs=1e-6)


def test_an_old_fisher_gives_its_penalty(kept):
    policy = LlamaForCausalLM.from_pretrained("base")
    ewc = EWC.load("ewc.safetensors", policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1)
    assert ewc(policy).item() == pytest.approx(json.loads(Path("ewc.json").read_text()), rel=1e-5)
