import json

import pytest
from huggingface_hub import ModelCard

from lifecycle_hf.evaluation.report import TaxReport
from lifecycle_hf.trainers.base.model_card import write_model_card

PAPER = ("Training language models to follow instructions with human feedback", "2203.02155")


def write(folder, **changes):
    options = {
        "trainer_name": "PPOTrainer",
        "objective": "Maximise the reward.",
        "paper": PAPER,
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "dataset_name": "Anthropic/hh-rlhf",
        "hyperparameters": {"learning_rate": 1e-5, "optim": "a|b"},
        "tax": TaxReport({"perplexity": 10.0}, {"perplexity": 12.5}, {"perplexity": False}),
        "tags": ["rlhf"],
    }
    return ModelCard.load(write_model_card(folder, **(options | changes)))


def save_config(folder, name, **content):
    (folder / name).write_text(json.dumps(content))


def test_card_tells_what_was_done_and_what_it_cost(tmp_path):
    save_config(tmp_path, "config.json", architectures=["LlamaForCausalLM"])
    card = write(tmp_path, model_name="me/tiny-ppo")
    data = card.data
    assert (data.base_model, data.datasets) == ("HuggingFaceTB/SmolLM2-135M-Instruct", ["Anthropic/hh-rlhf"])
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert data.tags == ["lifecycle_hf", "ppo", "rlhf"] and data.to_dict()["base_model_relation"] == "finetune"
    for text in (
        "# tiny-ppo\n",
        'AutoModelForCausalLM.from_pretrained("me/tiny-ppo")',
        "Maximise the reward.",
        f"[{PAPER[0]}](https://arxiv.org/abs/2203.02155)",
        "| perplexity ↓ | 10.00 | 12.50 | +2.500 | +25.0 % |",
        "| learning_rate | `1e-05` |",
        "| optim | `a\\|b` |",
        "| trl | `",
    ):
        assert text in card.content, text


@pytest.mark.parametrize(("task", "auto"), [("CAUSAL_LM", "CausalLM"), ("SEQ_CLS", "SequenceClassification")])
def test_adapters_are_loaded_with_peft(tmp_path, task, auto):
    save_config(tmp_path, "adapter_config.json", task_type=task)
    card = write(tmp_path)
    assert card.data.library_name == "peft" and card.data.to_dict()["base_model_relation"] == "adapter"
    assert f"from peft import AutoPeftModelFor{auto}" in card.content


def test_reward_models_are_classifiers(tmp_path):
    save_config(tmp_path, "config.json", architectures=["LlamaForSequenceClassification"])
    card = write(tmp_path, trainer_name="RewardTrainer", tax=None)
    assert card.data.pipeline_tag == "text-classification" and "(reward model)" in card.content
    assert "Measured" not in card.content


@pytest.mark.parametrize("name", ["toyworld", "/data/some/folder", "output/sft"])
def test_names_that_are_not_on_the_hub_stay_out_of_the_metadata(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output" / "sft").mkdir(parents=True)
    data = write(tmp_path, base_model=name, dataset_name=name).data
    assert data.base_model is None and data.datasets is None


def test_the_hub_accepts_the_card(hub, tmp_path):
    write(tmp_path, base_model=str(tmp_path))
    code = "import sys; from huggingface_hub import ModelCard; ModelCard.load(sys.argv[1]).validate()"
    hub.run(code, tmp_path / "README.md")
