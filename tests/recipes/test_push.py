"""Reward models and adapters go to the Hub with their card, and the scores come back."""

import json
from pathlib import Path

import pytest
import torch

from lifecycle_hf.models.loading import load_reward_model

RECIPES = Path(__file__).parents[2] / "recipes"
SCORE = """
import torch
from lifecycle_hf.models.loading import load_reward_model
print(load_reward_model("me/reward").score(torch.tensor([[7, 8, 9, 2]]), torch.tensor([4])).item())
"""


@pytest.mark.parametrize("peft", [False, True])
def test_reward_model_is_pushed_and_scores_the_same(hub, tiny_llama, tmp_path, peft):
    make_model, tokenizer = tiny_llama
    base, pairs, out = tmp_path / "base", tmp_path / "pairs.jsonl", tmp_path / "out"
    make_model().save_pretrained(base), tokenizer.save_pretrained(base)
    rows = [{"prompt": f"word {i}:", "chosen": f" yes {i}", "rejected": " no"} for i in range(40)]
    pairs.write_text("\n".join(map(json.dumps, rows)))
    options = ["--use_peft", "true"] if peft else []
    hub.run(
        str(RECIPES / "reward.py"), "--model_name_or_path", base, "--dataset_name", pairs, "--output_dir", out,
        "--max_steps", 4, "--learning_rate", "1e-2", "--per_device_train_batch_size", 4, "--push_to_hub",
        "--hub_model_id", "me/reward", *options, cwd=tmp_path,
    )  # fmt: skip
    files = hub.files("me/reward")
    weights = "adapter_model.safetensors" if peft else "model.safetensors"
    assert files[weights] == (out / weights).read_bytes() and "calibration.png" in files
    card = files["README.md"].decode()
    for said in ("RewardTrainer", "base", "2203.02155", "learning_rate", "accuracy", "before"):
        assert said in card, said
    local = load_reward_model(str(out))
    assert local.config.reward_center != 0
    expected = local.score(torch.tensor([[7, 8, 9, 2]]), torch.tensor([4])).item()
    assert float(hub.run(SCORE)) == pytest.approx(expected, abs=1e-5)
