"""Trainers over given chats, for tests of the tokens that they train on."""

from ppo_setting import trainer as ppo_trainer
from preference_setting import trainer as preference_trainer
from trainer_setting import stage
from transformers import LlamaForSequenceClassification

from lifecycle_hf import DPOTrainer, KTOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

LONG = {"max_length": 1024}


def sft(tiny_llama, tmp_path, data, **options):
    return stage(SFTTrainer, SFTConfig, tiny_llama[0](), data, tiny_llama, tmp_path, LONG | options)


def reward(tiny_llama, tmp_path, data, **options):
    config = tiny_llama[0]().config
    config.num_labels = 1
    model = LlamaForSequenceClassification(config)
    return stage(RewardTrainer, RewardConfig, model, data, tiny_llama, tmp_path, LONG | options)


def dpo(tiny_llama, tmp_path, data, **options):
    return preference_trainer(tiny_llama, tmp_path, DPOTrainer, dataset=data, **(LONG | options))


def kto(tiny_llama, tmp_path, data, **options):
    return preference_trainer(tiny_llama, tmp_path, KTOTrainer, dataset=data, **(LONG | options))


def ppo(tiny_llama, tmp_path, data, **options):
    model = tiny_llama[0](max_position_embeddings=2048)
    return ppo_trainer(tiny_llama, tmp_path, model, dataset=data, **({"max_prompt_length": None} | options))
