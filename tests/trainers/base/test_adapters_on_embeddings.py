"""LoRA on the embeddings, on the head and on single tokens: trained, saved, scored, reloaded and merged."""

import warnings

import pytest
import torch
from peft import LoraConfig
from ppo_setting import trainer as ppo_trainer
from preference_setting import trainer as preference_trainer
from trainer_setting import plain_scores, scores
from transformers import AutoModelForCausalLM

from lifecycle_hf.models.loading import load_causal_lm, merge_adapter

KINDS = {
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5, 70]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "head and embeddings": {"target_modules": ["lm_head", "q_proj"], "ensure_weight_tying": True},
    "saved embeddings": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
}


@pytest.fixture
def base(tiny_llama, tmp_path, request):
    make_model, tokenizer = tiny_llama
    make_model(tie_word_embeddings=request.param).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.mark.parametrize(
    ("kind", "base", "make"),
    [
        ("embeddings", False, preference_trainer),
        ("embeddings", True, preference_trainer),
        ("tokens", False, preference_trainer),
        ("tokens", True, preference_trainer),
        ("head", True, preference_trainer),
        ("head and embeddings", True, preference_trainer),
        ("saved embeddings", True, preference_trainer),
        ("embeddings", False, ppo_trainer),
        ("tokens", True, ppo_trainer),
    ],
    indirect=["base"],
)
def test_trained_scored_saved_reloaded_and_merged(kind, base, make, tiny_llama, tmp_path):
    adapter = LoraConfig(r=4, lora_alpha=16, **KINDS[kind])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(tied|tie).*")
        run = make(
            tiny_llama, tmp_path / "out", model=base, max_steps=2, learning_rate=0.05,
            trainer_options={"peft_config": adapter},
        )  # fmt: skip
        run.train()
        run.save_model(str(tmp_path / "out"))
        trained = run.model.policy.eval()
        expected = plain_scores(trained)
        reloaded = load_causal_lm(str(tmp_path / "out")).eval()
        merged = merge_adapter(str(tmp_path / "out"), tmp_path / "merged").eval()
    start = scores(AutoModelForCausalLM.from_pretrained(base).eval())
    assert (scores(trained) - start).abs().max() > 1e-3
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    for model in (trained, reloaded, merged, whole):
        torch.testing.assert_close(scores(model), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(plain_scores(model), expected, rtol=0, atol=1e-5)
    with run.model.shared.merged():
        torch.testing.assert_close(plain_scores(trained), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(plain_scores(trained), expected, rtol=0, atol=0)
    with run.model.role("base"):
        torch.testing.assert_close(scores(trained), start, rtol=0, atol=1e-5)
