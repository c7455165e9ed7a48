"""Models with prefix attention in the trainers: the prompt is the prefix in every loss, as it is in sampling."""

import math

import pytest
import torch
from datasets import Dataset
from lifecycle_setting import tiny

from lifecycle_hf import (
    DPOConfig,
    DPOTrainer,
    LifecycleForSequenceClassification,
    ORPOConfig,
    ORPOTrainer,
    PPOConfig,
    PPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
    load_reward_model,
)
from lifecycle_hf.completions.scoring import Completions, completion_logprobs

QUIET = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "max_steps": 2}
PAIRS = [("Tell me", "a story", "no"), ("The capital of France is", "Paris", "a fox"), ("Hello", "goodbye", "hello")]
pytestmark = pytest.mark.filterwarnings("ignore:.*in scoring, which is slower")


@pytest.fixture
def policy(tiny_llama):
    tokenizer = tiny_llama[1]
    return tiny(attention="prefix", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id), tokenizer


def rows(*names):
    return Dataset.from_list([dict(zip(names, pair)) for pair in PAIRS])


def test_sft_learns_completions_behind_a_prefix(policy, tmp_path):
    model, tokenizer = policy
    args = SFTConfig(str(tmp_path), per_device_train_batch_size=3, gradient_checkpointing=False, **QUIET)
    data = rows("prompt", "completion")
    trainer = SFTTrainer(model, args, data, data, processing_class=tokenizer)
    seen = []
    backbone = trainer.model.base_model
    backbone.register_forward_pre_hook(lambda m, a, k: seen.append(k["prefix_lengths"]), with_kwargs=True)
    measured = trainer.evaluate()["eval_loss"]
    lengths = sorted(len(tokenizer(prompt)["input_ids"]) for prompt, *_ in PAIRS)
    assert sorted(torch.cat(seen)[:, 0].tolist()) == lengths
    prompts = [tokenizer(prompt)["input_ids"] for prompt, *_ in PAIRS]
    answers = [[*tokenizer(answer)["input_ids"], tokenizer.eos_token_id] for _, answer, _ in PAIRS]
    with torch.no_grad():
        scores = completion_logprobs(trainer.model.eval(), Completions.from_lists(prompts, answers, 0)).logprobs
    assert measured == pytest.approx(-scores.sum().item() / sum(map(len, answers)), abs=1e-5)
    trainer.train()
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)


def test_dpo_takes_a_prefix_model_and_orpo_does_but_for_its_prompt(policy, tmp_path):
    model, tokenizer = policy
    given = {"train_dataset": rows("prompt", "chosen", "rejected"), "processing_class": tokenizer}
    dpo = DPOTrainer(model, args=DPOConfig(str(tmp_path), logging_steps=1, **QUIET), **given)
    dpo.train()
    assert dpo.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)  # the policy is the reference
    ORPOTrainer(model, args=ORPOConfig(str(tmp_path), **QUIET), **given).train()
    orpo = ORPOTrainer(model, args=ORPOConfig(str(tmp_path), nll_on_prompt=True, **QUIET), **given)
    with pytest.raises(ValueError, match="as nll_on_prompt does.*each token of a prompt sees those after it"):
        orpo.train()


def test_ppo_scores_what_it_sampled(policy, tmp_path):
    model, tokenizer = policy
    options = {"per_device_train_batch_size": 3, "max_completion_length": 6, "learning_rate": 1e-3, "logging_steps": 1}
    trainer = PPOTrainer(
        model=model,
        args=PPOConfig(str(tmp_path), **options, **QUIET),
        reward_funcs=lambda prompts, completions, **columns: [-float(len(text)) for text in completions],
        train_dataset=rows("prompt"),
        processing_class=tokenizer,
    )
    trainer.train()
    assert trainer.state.log_history[0]["policy/ratio_error_at_start"] == 0
    assert trainer.state.log_history[1]["policy/approx_kl"] > 0


@pytest.mark.parametrize("attention", ["causal", "prefix"])
def test_a_reward_model_is_trained_on_the_backbone_of_a_language_model(tiny_llama, tmp_path, attention):
    tokenizer = tiny_llama[1]
    tiny(attention=attention, vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    args = RewardConfig(str(tmp_path / "out"), per_device_train_batch_size=3, gradient_checkpointing=False, **QUIET)
    trainer = RewardTrainer(str(tmp_path / "base"), args, train_dataset=rows("prompt", "chosen", "rejected"))
    trainer.train()
    trainer.save_model()
    reward = load_reward_model(str(tmp_path / "out"))
    assert type(reward.model) is LifecycleForSequenceClassification
    ids = torch.tensor([tokenizer("Hello")["input_ids"]])
    score = trainer.model.eval()(ids, attention_mask=torch.ones_like(ids)).logits[:, 0]
    torch.testing.assert_close(
        reward(ids, torch.tensor([ids.shape[1]])), score - getattr(reward.config, "reward_center", 0.0)
    )
