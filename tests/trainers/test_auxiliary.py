"""In every trainer an auxiliary loss adds weight × its gradient to a step, once, however the step is cut up."""

import math

import pytest
import torch
from datasets import Dataset
from ppo_setting import trainer as ppo_trainer
from preference_setting import ANSWERS, PAIRS
from preference_setting import trainer as preference_trainer
from transformers import LlamaForSequenceClassification

from lifecycle_hf import DPOTrainer, KTOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from lifecycle_hf.alignment_tax.trade_off import LagrangeMultiplier

SGD = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 1e9, "max_steps": 1, "lr_scheduler_type": "constant"}
TEXTS = Dataset.from_dict({"prompt": [f"word {i}" for i in range(8)], "completion": [" Paris"] * 8})


def sft(tiny_llama, tmp_path, **options):
    return stage(SFTTrainer, SFTConfig, tiny_llama[0](), TEXTS, tiny_llama, tmp_path, options)


def reward(tiny_llama, tmp_path, **options):
    config = tiny_llama[0]().config
    config.num_labels = 1
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config)
    return stage(RewardTrainer, RewardConfig, model, PAIRS, tiny_llama, tmp_path, options)


def stage(cls, config, model, data, tiny_llama, tmp_path, options):
    quiet = {"report_to": "none", "use_cpu": True, "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True}
    args = config(str(tmp_path), gradient_checkpointing=False, **quiet, **options)
    return cls(model, args=args, train_dataset=data, processing_class=tiny_llama[1])


MAKE = {
    "sft": sft,
    "reward": reward,
    "dpo": lambda *given, **options: preference_trainer(*given, DPOTrainer, **options),
    "kto": lambda *given, **options: preference_trainer(*given, KTOTrainer, dataset=ANSWERS, **options),
    "ppo": lambda *given, **options: ppo_trainer(*given, **options),
}


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("accumulation", [1, 4])
def test_step_moves_by_the_gradient_once(tiny_llama, tmp_path, name, accumulation):
    def moved(weight):
        cut = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
        run = MAKE[name](tiny_llama, tmp_path, **SGD, **cut)
        norm = getattr(run.model, "policy", run.model).model.norm.weight  # ones at the start
        if weight:
            run.add_auxiliary_loss("l2", lambda policy: policy.model.norm.weight.square().sum(), weight)
        run.train()
        return norm.detach().clone(), run.state.log_history

    (plain, _), (mixed, logs) = moved(0), moved(0.25)
    # the gradient of ¼‖w‖² at w = 1 is ½, so that a step at 0.1 takes 0.05 off beside what it does anyway
    torch.testing.assert_close(plain - mixed, torch.full_like(plain, 0.05), atol=1e-5, rtol=0)
    assert [entry["loss/l2"] for entry in logs if "loss/l2" in entry] == [plain.numel()]


@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "kto"])
def test_objective_under_a_ceiling_is_measured_as_the_mean_of_the_step(tiny_llama, tmp_path, name):
    def measured(accumulation):
        cut = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
        run = MAKE[name](tiny_llama, tmp_path, **SGD, **cut)
        multiplier = LagrangeMultiplier(0.0, rate=1.0)  # λ becomes the mean loss of the first step
        run.constrain_objective(multiplier)
        run.train()
        return multiplier.value

    whole, cut = measured(1), measured(4)
    assert cut == pytest.approx(whole, rel=1e-4) and whole > 0
    if name == "dpo":
        assert whole == pytest.approx(math.log(2), rel=1e-6)
