"""Test that a policy is pushed to the Hub with its card, and loads where this package is not installed."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForSequenceClassification

RECIPE = Path(__file__).parents[3] / "recipes" / "ppo.py"
RELOAD = """
import sys
sys.modules["lifecycle_hf"] = None  # an import of it would fail
import torch
from transformers import AutoTokenizer
from {library} import {auto}
model, tokenizer = {auto}.from_pretrained("me/ppo"), AutoTokenizer.from_pretrained("me/ppo")
print(model.eval()(torch.tensor([tokenizer("hello")["input_ids"]])).logits.double().abs().sum().item())
"""


@pytest.mark.parametrize("peft", [False, True])
def test_policy_is_pushed_with_its_card_and_reloads(hub, tiny_llama, tmp_path, peft):
    make_model, tokenizer = tiny_llama
    base, reward, prompts, texts = (tmp_path / n for n in ("base", "reward", "prompts.jsonl", "texts.jsonl"))
    make_model().save_pretrained(base), tokenizer.save_pretrained(base)
    config = make_model().config
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(reward), tokenizer.save_pretrained(reward)
    prompts.write_text("\n".join(json.dumps({"prompt": p}) for p in ["Tell me", "Please", "hello", "I am"] * 3))
    texts.write_text("\n".join(json.dumps({"text": t}) for t in ["The capital of France is Paris.", "hello"] * 8))
    out = tmp_path / "out"
    printed = hub.run(
        str(RECIPE), "--model_name_or_path", base, "--dataset_name", prompts, "--reward_funcs", reward,
        "--ptx_dataset_name", texts, "--output_dir", out, "--max_steps", 2, "--ppo_epochs", 1,
        "--per_device_train_batch_size", 2, "--max_completion_length", 4, "--measure_rows", 4, "--save_strategy", "no",
        "--push_to_hub", "--hub_model_id", "me/ppo", *(["--use_peft", "--merge"] if peft else []),
        cwd=tmp_path,
    )  # fmt: skip
    files = hub.files("me/ppo")
    card = files["README.md"].decode()
    for said in (
        "PPOTrainer",
        "base",
        "2203.02155",
        "ptx_coef",
        "| kl_coef |",
        "perplexity",
        "proxy reward",
        "before",
    ):
        assert said in card, said
    assert "me/ppo" in card and "training.png" in files and "report.json" in files
    report = json.loads((out / "report.json").read_text())
    assert report["kl"]["before"] == 0.0 and report["perplexity"]["before"] > 1 and "perplexity" in printed
    weights = "adapter_model.safetensors" if peft else "model.safetensors"
    value = "value/value_head.safetensors" if peft else "value/model.safetensors"
    assert files[weights] == (out / weights).read_bytes() and files[value] == (out / value).read_bytes()
    library, auto = ("peft", "AutoPeftModelForCausalLM") if peft else ("transformers", "AutoModelForCausalLM")
    again = float(hub.run(RELOAD.format(library=library, auto=auto)))
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(out / "merged" if peft else out)
    ids = torch.tensor([tokenizer("hello")["input_ids"]])
    assert again == pytest.approx(whole(ids).logits.double().abs().sum().item(), rel=1e-4)
