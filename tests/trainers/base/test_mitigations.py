"""ProjectionCallback in trainers of this library and in transformers' own."""

import pytest
import torch
from peft import LoraConfig
from ppo_setting import logged
from ppo_setting import trainer as ppo_trainer
from preference_setting import trainer as preference_trainer
from transformers import Trainer, TrainerCallback, TrainingArguments

from lifecycle_hf import DPOTrainer
from lifecycle_hf.trainers.base.mitigations import ProjectionCallback

NAMES = ("projection/cosine", "projection/removed", "projection/loss")


class Plane(torch.nn.Module):
    """y = w·x, w of two numbers."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(2))

    def forward(self, x, labels):
        return {"loss": (x @ self.w - labels).square().mean()}


def plain_trainer(tmp_path, batch=8, **options):
    options = {"max_steps": 4, "learning_rate": 0.01, "logging_steps": 2, "save_strategy": "no"} | options
    args = TrainingArguments(
        tmp_path, report_to="none", use_cpu=True, disable_tqdm=True, per_device_train_batch_size=batch,
        gradient_accumulation_steps=8 // batch, **options,
    )  # fmt: skip
    rows = [{"x": torch.tensor([float(i), 1.0]), "labels": torch.tensor(-2.0 * i)} for i in range(32)]
    return Trainer(Plane(), args, train_dataset=rows)


@pytest.mark.parametrize("batch", [8, 1])
def test_transformers_own_trainer_keeps_the_protected_parameter(tmp_path, batch):
    """The capability loss is w₁², so that only w₂ moves, under clipping, decay and accumulation, and logs say so."""
    trainer = plain_trainer(tmp_path, batch, weight_decay=0.1, max_grad_norm=0.1)
    callback = ProjectionCallback(lambda model: model.w[0].square(), level="update").attach(trainer)
    trainer.train()
    first, second = trainer.model.w.tolist()
    assert first == 1.0 and second < 0.99 and callback.projection.step == 4
    lines = [entry for entry in trainer.state.log_history if "projection/cosine" in entry]
    assert [line["step"] for line in lines] == [2, 4] and all(line["projection/loss"] == 1 for line in lines)
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [2, 4]
    trainer.optimizer.step()
    assert callback.projection.step == 4  # it was taken off at the end


def language_loss(model):
    """The NLL of a fixed text."""
    ids = torch.arange(10, 40).view(2, 15)
    return model(input_ids=ids, labels=ids).loss


class Watch(TrainerCallback):
    """Every step: its product with the capability gradient, over the lengths, and what of the value head moved."""

    def __init__(self, policy):
        self.policy, self.products, self.old = policy, [], {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.old = {name: p.detach().double() for name, p in model.named_parameters()}
        trained = {name: p for name, p in self.policy.named_parameters() if p.requires_grad}
        with torch.enable_grad():
            found = torch.autograd.grad(language_loss(self.policy), list(trained.values()), allow_unused=True)
        self.gradients = {name: g.double() for name, g in zip(trained, found) if g is not None}

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        prefix = "policy." if hasattr(model, "policy") else ""
        new = {name: p.detach().double() - self.old[name] for name, p in model.named_parameters()}
        moves = {name: new[prefix + name] for name in self.gradients}
        length = sum(m.square().sum() for m in moves.values()) * sum(g.square().sum() for g in self.gradients.values())
        self.products.append(float(sum((moves[n] * g).sum() for n, g in self.gradients.items()) / length.sqrt()))
        self.value = max([new[n].abs().max().item() for n in new if n.startswith("value_head")], default=None)


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("kind", ["dpo", "ppo"])
def test_updates_of_a_policy_are_orthogonal(tiny_llama, tmp_path, kind, peft):
    """With LoRA, in a model that wraps the policy, and beside a value function, which goes on learning."""
    options = {"peft_config": LoraConfig(r=4, target_modules="all-linear")} if peft else {}
    if kind == "ppo":
        value = {"value": "head"} if peft else {}
        trainer = ppo_trainer(tiny_llama, tmp_path, trainer_options=options, learning_rate=1e-2, **value)
    else:
        trainer = preference_trainer(
            tiny_llama, tmp_path, DPOTrainer, learning_rate=1e-2, max_steps=2, trainer_options=options
        )
    policy = getattr(trainer.model, "policy", trainer.model)
    ProjectionCallback(language_loss, level="update").attach(trainer)
    watch = Watch(policy)
    trainer.add_callback(watch)
    trainer.train()
    assert len(watch.products) == 2 and max(map(abs, watch.products)) < 1e-6
    assert all(len(logged(trainer, name)) > 0 for name in NAMES)
    if kind == "ppo" and peft:
        assert watch.value > 0


def test_a_resumed_run_goes_on_with_its_directions(tiny_llama, tmp_path):
    def run(folder, resume=None, **options):
        trainer = preference_trainer(
            tiny_llama, tmp_path / folder, DPOTrainer, max_steps=4, save_strategy="steps", save_steps=3,
            learning_rate=1e-2, **options,
        )  # fmt: skip
        callback = ProjectionCallback(language_loss, every=4).attach(trainer)  # the direction of the first step
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model, callback.projection.state_dict()

    whole, state = run("run")
    resumed, restored = run("run", resume=str(tmp_path / "run" / "checkpoint-3"))
    assert state["step"] == restored["step"] == 4 and len(state) > 1
    assert all(torch.equal(restored[name], state[name]) for name in state if name != "step")
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_what_cannot_work_is_refused_before_training(tmp_path):
    trainer = plain_trainer(tmp_path)
    with pytest.raises(ValueError, match="k=0 must be at least 1"):
        ProjectionCallback(language_loss, k=0).attach(trainer)
    trainer.add_callback(ProjectionCallback(language_loss))
    with pytest.raises(ValueError, match=r"not attached: call \.attach\(trainer\)"):
        trainer.train()
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match="does not run on DeepSpeed: use DDP or FSDP2"):
        ProjectionCallback(language_loss).attach(trainer)
