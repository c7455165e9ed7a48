"""A Lagrange multiplier as the weight of an auxiliary loss, or of the trainer's own."""

import pytest
import torch
from conftest import SENTENCES
from datasets import Dataset
from ppo_setting import logged
from ppo_setting import trainer as ppo_trainer
from transformers import Trainer, TrainingArguments

from lifecycle_hf import SFTConfig, SFTTrainer
from lifecycle_hf.mitigation.trade_off import LagrangeMultiplier
from lifecycle_hf.trainers.base.capability import CapabilityLoss
from lifecycle_hf.trainers.base.trainer import LifecycleTrainerMixin


class Point(torch.nn.Module):
    """(x − 2)², whatever the row."""

    def __init__(self):
        super().__init__()
        self.x = torch.nn.Parameter(torch.tensor(3.0))

    def forward(self, row):
        return {"loss": (self.x - 2) ** 2}


class ToyTrainer(LifecycleTrainerMixin, Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return self.with_auxiliary(model(**inputs)["loss"], num_items_in_batch)


def toy(folder, **options):
    defaults = {
        "max_steps": 400, "learning_rate": 0.05, "optim": "sgd", "max_grad_norm": 0.0, "report_to": "none",
        "lr_scheduler_type": "constant", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True,
        "logging_steps": 1, "per_device_train_batch_size": 1, "remove_unused_columns": False,
    }  # fmt: skip
    rows = [{"row": torch.zeros(1)}] * 8
    return ToyTrainer(Point(), TrainingArguments(str(folder), **(defaults | options)), train_dataset=rows)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("reverse", [False, True])
def test_finds_the_kkt_point_both_ways(tmp_path, accumulation, reverse):
    """min (x − 2)² with x² ≤ 1, and min x² with (x − 2)² ≤ 1: x = 1 and λ = 1, where the two gradients cancel."""
    run, multiplier = toy(tmp_path, gradient_accumulation_steps=accumulation), LagrangeMultiplier(1.0, rate=0.1)
    run.add_auxiliary_loss("square", lambda model: model.x.square(), 1.0 if reverse else multiplier)
    if reverse:
        run.constrain_objective(multiplier)
    run.train()
    assert (run.model.x.item(), multiplier.value) == pytest.approx((1.0, 1.0), abs=1e-3)
    name = "objective" if reverse else "square"
    first, second = logged(run, f"lambda/{name}")[:2]
    # from x = 3: the auxiliary 9 breaks its ceiling of 1 by 8, the objective 1 does not
    assert first == pytest.approx(0.0 if reverse else 0.8)


def test_a_resumed_run_has_its_multiplier(tmp_path):
    def run(**options):
        trainer, multiplier = toy(tmp_path, max_steps=6, **options), LagrangeMultiplier(1.0, rate=0.1)
        trainer.add_auxiliary_loss("square", lambda model: model.x.square(), multiplier)
        return trainer, multiplier

    whole, multiplier = run(save_strategy="steps", save_steps=3)
    whole.train()
    resumed, again = run()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert (resumed.model.x.item(), again.value) == (whole.model.x.item(), multiplier.value)


def test_ppo_under_a_floor_of_the_score(tiny_llama, tmp_path):
    def run(floor, **options):
        trainer = ppo_trainer(tiny_llama, tmp_path, optim="sgd", learning_rate=0.1, ppo_epochs=2, **options)
        multiplier = LagrangeMultiplier(floor, sense="at_least", rate=0.5)
        trainer.constrain_objective(multiplier)
        before = {name: p.detach().clone() for name, p in trainer.model.policy.named_parameters()}
        trainer.train()
        moved = any(not torch.equal(p, before[name]) for name, p in trainer.model.policy.named_parameters())
        return trainer, multiplier, moved

    _, multiplier, moved = run(-1.0)  # letters are never fewer than none: the policy has nothing to gain
    assert multiplier.value == 0.0 and not moved
    trainer, multiplier, moved = run(10.0, max_steps=6)
    short = [10.0 - score for score in logged(trainer, "score")]
    assert multiplier.value == pytest.approx(0.5 * sum(short)) and moved and len(short) == 3
    assert trainer.stateful["multiplier_objective"] is multiplier


@pytest.mark.slow
def test_sft_learns_under_a_ceiling_of_what_it_may_forget(tiny_llama, tmp_path):
    make_model, tokenizer = tiny_llama
    known = Dataset.from_dict({"text": SENTENCES})
    prompts, answers = ["The capital of France is", "Two and three make"], [" hello hello", " goodbye fox fox"]
    new = Dataset.from_dict({"prompt": prompts, "completion": answers})

    def nll(model, texts):
        with torch.no_grad():
            return CapabilityLoss(texts, tokenizer, batch_size=len(texts))(model).item()

    def trained(weights, data, ceiling=None):
        model = make_model()
        model.load_state_dict(weights)
        args = SFTConfig(
            str(tmp_path), max_steps=120, per_device_train_batch_size=6, learning_rate=3e-3, use_cpu=True,
            save_strategy="no", report_to="none", lr_scheduler_type="constant", gradient_checkpointing=False,
            disable_tqdm=True, logging_steps=200,
        )  # fmt: skip
        run = SFTTrainer(model, args=args, train_dataset=data, processing_class=tokenizer)
        if ceiling is not None:
            loss = CapabilityLoss(known, tokenizer, batch_size=len(known))
            run.add_auxiliary_loss("capability", loss, LagrangeMultiplier(ceiling, rate=0.5))
        run.train()
        return model

    base = trained(make_model().state_dict(), known)
    free, held = trained(base.state_dict(), new), trained(base.state_dict(), new, ceiling=0.3)
    assert nll(base, known) < 0.3 and nll(free, known) > 2
    assert nll(held, known) <= 0.3 + 0.02  # dual ascent oscillates about the ceiling
    assert nll(base, new) > 2 and max(nll(free, new), nll(held, new)) < 0.1


def test_limits_that_can_not_be_meant_are_refused(tiny_llama, tmp_path):
    with pytest.raises(ValueError, match="under a ceiling, sense='at_most'"):
        toy(tmp_path).constrain_objective(LagrangeMultiplier(1.0, sense="at_least", rate=1.0))
    with pytest.raises(ValueError, match="above a floor: sense='at_least'"):
        ppo_trainer(tiny_llama, tmp_path).constrain_objective(LagrangeMultiplier(1.0, rate=1.0))
    with pytest.raises(ValueError, match="reward_normalization='none', which is 'batch' here"):
        run = ppo_trainer(tiny_llama, tmp_path, reward_normalization="batch")
        run.constrain_objective(LagrangeMultiplier(1.0, sense="at_least", rate=1.0))
