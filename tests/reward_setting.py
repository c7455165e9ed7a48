"""Reward adapters with random weights, as RewardTrainer would leave them."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForSequenceClassification

from lifecycle_hf.models.loading import save_adapter_notes


def save_reward_adapter(base, path, tokenizer, center=0.0):
    """Write a reward adapter over the model at `base`, with a random head, its tokenizer and its notes to `path`."""
    classifier = LlamaForSequenceClassification.from_pretrained(base, num_labels=1)
    classifier.config.reward_center = center
    config = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"])
    model = get_peft_model(classifier, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(path), tokenizer.save_pretrained(path), save_adapter_notes(model, path)
