"""Test that a run that stops and resumes gives the result of an uninterrupted run."""

import json
import shutil

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from ppo_setting import logged, trainer

from lifecycle_hf import BottleneckConfig

TEXTS = Dataset.from_dict({"text": ["The capital of France is Paris.", "Two and three make five.", "hello", "a fox"]})
VARYING = ("tokens_per_second", "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss")


ADAPTERS = {"full": None, "lora": LoraConfig(r=4, target_modules="all-linear"), "bottleneck": BottleneckConfig()}


@pytest.mark.parametrize("peft", ADAPTERS)
@pytest.mark.parametrize("stop", [4, 6])  # between two updates, and within one
def test_resumed_run_equals_the_uninterrupted_one(tiny_llama, tmp_path, peft, stop):
    def run(resume=None):
        return trainer(
            tiny_llama, tmp_path / "out", max_steps=9, save_strategy="steps", save_steps=stop, ppo_epochs=2,
            num_mini_batches=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, ptx_coef=0.5,
            kl_control="adaptive", kl_horizon=40, reward_normalization="running", learning_rate=1e-2,
            lr_scheduler_type="linear",
            trainer_options={"ptx_dataset": TEXTS, "peft_config": ADAPTERS[peft]},
        )  # fmt: skip

    whole = run()
    whole.train()
    checkpoint = tmp_path / "out" / f"checkpoint-{stop}"
    shutil.copytree(checkpoint, tmp_path / "kept")
    resumed = run()
    resumed.train(resume_from_checkpoint=str(tmp_path / "kept"))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    assert resumed.kl_control.kl_coef == whole.kl_control.kl_coef != 0.05
    assert resumed.rollouts.reward_moments.state_dict() == whole.rollouts.reward_moments.state_dict()
    for metric in ("kl", "score", "loss", "loss/value", "grad_norm"):
        assert logged(resumed, metric) == logged(whole, metric)
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    trained = sum(p.requires_grad for p in whole.model.parameters())
    assert len(state["state"]) == trained  # both heads' moments


def test_a_rollout_in_hand_is_not_cut_up_anew(tiny_llama, tmp_path):
    def run(**options):
        return trainer(tiny_llama, tmp_path, ppo_epochs=2, save_strategy="steps", save_steps=1, **options)

    run(gradient_accumulation_steps=2, per_device_train_batch_size=2).train()
    within, between = (str(tmp_path / f"checkpoint-{step}") for step in (1, 2))
    with pytest.raises(
        ValueError,
        match="within a rollout.*per_device_train_batch_size=2, gradient_accumulation_steps=2,.*this run has .*"
        "per_device_train_batch_size=1, gradient_accumulation_steps=4",
    ):
        run(gradient_accumulation_steps=4, per_device_train_batch_size=1).train(resume_from_checkpoint=within)
    other = run(gradient_accumulation_steps=4, per_device_train_batch_size=1, max_steps=3)
    other.train(resume_from_checkpoint=between)
    assert other.state.global_step == 3


def test_a_checkpoint_without_the_trainers_state_is_refused(tiny_llama, tmp_path):
    run = trainer(tiny_llama, tmp_path, save_strategy="steps", save_steps=1, max_steps=1)
    run.train()
    state = tmp_path / "checkpoint-1" / "lifecycle_kl_control.json"
    assert json.loads(state.read_text()) == {"kl_coef": 0.05}
    state.unlink()
    with pytest.raises(ValueError, match="has no lifecycle_kl_control.json"):
        trainer(tiny_llama, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
