"""UL2 pretraining, SFT and PPO, each from the checkpoint of the stage before: it learns and keeps its attention."""

import numpy as np
import pytest
import torch
from ppo_setting import logged
from transformers import AutoModelForCausalLM

from lifecycle_hf import (
    LifecycleForCausalLM,
    PPOConfig,
    PPOTrainer,
    PretrainingConfig,
    PretrainingTrainer,
    SFTConfig,
    SFTTrainer,
    toyworld,
)

SHARED = {
    "per_device_train_batch_size": 32, "per_device_eval_batch_size": 64, "report_to": "none", "use_cpu": True,
    "save_strategy": "no", "disable_tqdm": True, "logging_steps": 8,
}  # fmt: skip


def unigram_entropy(rows):
    """Nats per target of the best prediction that reads no input."""
    targets = np.concatenate([row["labels"][row["labels"] >= 0] for row in rows])
    shares = np.unique(targets, return_counts=True)[1] / len(targets)
    return -(shares * np.log(shares)).sum()


def pretrain(folder):
    """(held-out loss, unigram entropy of its targets) of the model that is written to `folder`."""
    tokenizer = toyworld.build_tokenizer()
    model = toyworld.build_model(tokenizer)
    model.config.attention = "prefix"
    documents = toyworld.dataset("ptx")
    args = PretrainingConfig(str(folder), objective="ul2", max_length=128, max_steps=100, learning_rate=3e-3, **SHARED)
    run = PretrainingTrainer(model, args, documents["train"], documents["test"], tokenizer)
    run.train()
    run.save_model()
    rows = [run.eval_dataset[i] for i in range(len(run.eval_dataset))]
    return run.evaluate()["eval_loss"], unigram_entropy(rows)


def dialogue(row):
    """A rendered dialogue as the prompt, which becomes the prefix, and the answer."""
    prompt, mark, answer = row["text"].partition("<|im_start|>assistant\n")
    return {"prompt": prompt + mark, "completion": answer}


def fine_tune(base, folder):
    """Held-out losses before and after learning to answer."""
    pairs = toyworld.dataset("sft").map(dialogue, remove_columns="text").filter(lambda row: row["completion"])
    args = SFTConfig(
        str(folder), max_length=64, max_steps=100, gradient_checkpointing=False, learning_rate=3e-3, **SHARED
    )
    run = SFTTrainer(str(base), args, pairs["train"], pairs["test"])
    before = run.evaluate()["eval_loss"]
    run.train()
    run.save_model()
    return before, run.evaluate()["eval_loss"]


def reinforce(base, folder):
    """The finished PPO run on the gold reward."""
    args = PPOConfig(
        str(folder), max_steps=64, num_mini_batches=2, ppo_epochs=4, max_prompt_length=48, max_completion_length=32,
        learning_rate=3e-4, value_learning_rate=1e-3, lr_scheduler_type="constant", kl_coef=0.1,
        activation_checkpointing=False, log_completions=False, **SHARED,
    )  # fmt: skip
    run = PPOTrainer(str(base), toyworld.gold_reward, args, toyworld.dataset("ppo")["train"])
    run.train()
    run.save_model()
    return run


@pytest.mark.slow
def test_a_ul2_checkpoint_goes_on_into_sft_and_ppo(tmp_path):
    pretrained, tuned, aligned = (tmp_path / name for name in ("ul2", "sft", "ppo"))
    loss, entropy = pretrain(pretrained)
    before, after = fine_tune(pretrained, tuned)
    run = reinforce(tuned, aligned)
    rewards = logged(run, "score")
    assert loss < entropy - 1
    assert after < min(1, before - 1)
    assert logged(run, "policy/ratio_error_at_start") == [0] * len(rewards)
    assert np.mean(rewards[-3:]) > np.mean(rewards[:2]) + 0.1
    first, last = (AutoModelForCausalLM.from_pretrained(folder) for folder in (pretrained, aligned))
    assert type(last) is type(first) is LifecycleForCausalLM
    assert last.config.attention == first.config.attention == "prefix"
    trained = run.model.policy.state_dict()
    assert all(torch.equal(weight, trained[name]) for name, weight in last.state_dict().items())
