"""Mitigations by option: each trainer takes each of them, and what they do to a step is what their formula says."""

import math
import warnings

import pytest
import torch
from datasets import Dataset
from trainer_setting import MAKE, SGD
from transformers import TrainerCallback

from lifecycle_hf import DPOConfig
from lifecycle_hf.mitigation.ewc import EWC
from lifecycle_hf.trainers.base.capability import CapabilityLoss
from lifecycle_hf.trainers.base.mitigations import check_mitigations, mitigations_in_force, protect

NAMES = [name for name in MAKE if name not in ("reward", "classification", "qa")]  # those predict tokens
FACTS = Dataset.from_dict({"text": [f"the capital of land {i} is city {i}" for i in range(4)]})
EMPTY = Dataset.from_dict({"text": ["a fact", ""]})
EXACT = {"per_device_train_batch_size": 4, "ptx_batch_size": 4}
"""All texts in every batch, so that the gradient of their loss is known."""


def make(name, tiny_llama, tmp_path, **options):
    given = {"ptx_dataset": options.pop("ptx_dataset", None)}
    return MAKE[name](tiny_llama, tmp_path, trainer_options=given, **SGD | options)


def policy_of(run):
    return getattr(run.model, "policy", run.model)


def weights(run):
    return {name: p.detach().clone() for name, p in policy_of(run).named_parameters() if p.requires_grad}


def capability_gradient(run):
    policy, tokenizer = policy_of(run), run.processing_class
    loss = CapabilityLoss(FACTS, tokenizer, batch_size=4)(policy)
    names, parameters = zip(*((n, p) for n, p in policy.named_parameters() if p.requires_grad))
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {n: g.double() for n, g in zip(names, gradients, strict=True) if g is not None}


def moved(run):
    before = weights(run)
    run.train()
    return {name: (after.double() - before[name].double()) for name, after in weights(run).items()}


@pytest.mark.parametrize("name", NAMES)
def test_ptx_adds_its_share_of_the_gradient(tiny_llama, tmp_path, name):
    plain = moved(make(name, tiny_llama, tmp_path, **EXACT))
    mixed_run = make(name, tiny_llama, tmp_path, **EXACT, ptx_coef=0.5, ptx_dataset=FACTS)
    gradient = capability_gradient(mixed_run)
    mixed = moved(mixed_run)
    for key, found in gradient.items():  # Δθ = −0.1·(g + ½c)
        torch.testing.assert_close(mixed[key], plain[key] - 0.05 * found, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("level", ["gradient", "update"])
def test_projection_leaves_the_texts_where_they_were(tiny_llama, tmp_path, name, level):
    adamw = {} if level == "gradient" else {"optim": "adamw_torch", "weight_decay": 0.1}
    run = make(name, tiny_llama, tmp_path, **adamw, **EXACT, projection=level, ptx_dataset=FACTS)
    gradient = capability_gradient(run)
    steps = moved(run)
    dot = sum((steps[key] * found).sum() for key, found in gradient.items()).item()
    sizes = [math.sqrt(sum(t.square().sum().item() for t in side.values())) for side in (gradient, steps)]
    assert sizes[1] > 1e-5 and abs(dot) <= 1e-5 * sizes[0] * sizes[1]
    assert any("projection/removed" in entry for entry in run.state.log_history)


def naive_fisher(run):
    """Mean over the texts of the squared gradient of −log p(text)."""
    policy, tokenizer = policy_of(run), run.processing_class
    names, parameters = zip(*((n, p) for n, p in policy.named_parameters() if p.requires_grad))
    fisher = {name: torch.zeros_like(p, dtype=torch.double) for name, p in zip(names, parameters, strict=True)}
    for text in FACTS["text"]:
        ids = torch.tensor([*tokenizer(text)["input_ids"], tokenizer.eos_token_id])
        nll = -policy(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None]).sum()
        for name, gradient in zip(names, torch.autograd.grad(nll, parameters), strict=True):
            fisher[name] += gradient.double().square() / len(FACTS)
    return fisher


class KeepWeights(TrainerCallback):
    """The policy's weights after every step."""

    def __init__(self, run):
        self.run, self.steps = run, []

    def on_step_end(self, *args, **kwargs):
        self.steps.append(weights(self.run))


@pytest.mark.parametrize("name", NAMES)
def test_ewc_adds_half_its_fisher_times_the_squared_way_from_the_start(tiny_llama, tmp_path, name):
    options = EXACT | {"ewc_coef": 50.0, "ewc_rows": 4, "ptx_dataset": FACTS, "max_steps": 2}
    run = make(name, tiny_llama, tmp_path, **options)
    fisher, start, keep = naive_fisher(run), weights(run), KeepWeights(run)
    run.add_callback(keep)
    run.train()
    first, second = [entry["loss/ewc"] for entry in run.state.log_history if "loss/ewc" in entry]
    way = {key: (moved.double() - start[key].double()).square() for key, moved in keep.steps[0].items()}
    assert first == 0 and second == pytest.approx(sum((fisher[n] * way[n]).sum().item() for n in way) / 2, rel=1e-4)


def test_a_ceiling_raises_its_multiplier_while_it_is_broken(tiny_llama, tmp_path):
    options = EXACT | {"max_steps": 3, "ptx_ceiling": 0.5, "ptx_rate": 0.1, "ptx_dataset": FACTS}
    run = make("ppo", tiny_llama, tmp_path, **options)
    run.train()
    logs = [entry for entry in run.state.log_history if "lambda/ptx" in entry]
    price = 0.0
    for entry in logs:  # λ ← λ + rate·(c − ceiling), c the loss of the step
        price += 0.1 * (entry["loss/ptx"] - 0.5)
        assert entry["lambda/ptx"] == pytest.approx(price, rel=1e-4)
    assert len(logs) == 3 and price > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ptx_coef": 0.5}, "ptx_coef=0.5 is set, but ptx_dataset is not"),
        ({"projection": "update"}, "projection=update is set, but ptx_dataset is not"),
        ({"ewc_coef": 1.0}, "ewc_coef=1.0 is set, but ptx_dataset is not"),
        ({"ewc": "fisher.safetensors"}, "does nothing while ewc_coef is 0"),
        ({"projection": "update", "projection_k": 0, "ptx_dataset": FACTS}, "projection_k=0 must be at least 1"),
        (
            {"projection": "steps", "ptx_dataset": FACTS},
            "projection='steps' is unknown: choose one of gradient",
        ),
        ({"ptx_ceiling": 0.0}, "ptx_ceiling=0.0 is set, but ptx_dataset is not"),
        ({"ptx_coef": 0.5, "ptx_dataset": EMPTY, "strict_data": True}, "ptx_dataset: 1 of 2 rows"),
        ({"ewc_coef": 0.5, "ptx_dataset": EMPTY, "strict_data": True}, "ptx_dataset: 1 of 2 rows"),
    ],
)
def test_what_can_not_be_meant_is_refused(tiny_llama, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make("dpo", tiny_llama, tmp_path, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dpo", {"ptx_coef": 0.5}),
        ("dpo", {"ptx_ceiling": 1.0}),
        ("dpo", {"ewc_coef": 1.0}),
        ("sft", {"ewc_coef": 1.0}),
    ],
)
def test_sharded_models_are_refused_before_a_fisher_is_estimated(tiny_llama, tmp_path, monkeypatch, name, options):
    run = make(name, tiny_llama, tmp_path)
    run.is_fsdp_enabled = True
    monkeypatch.setattr(EWC, "estimate", None)
    for name, value in options.items():
        setattr(run.args, name, value)
    with pytest.raises(ValueError, match="auxiliary loss '(ptx|ewc)' does not run under FSDP, .*: use DDP"):
        protect(run, FACTS)


def test_ppo_mixes_its_own_pretraining_loss_under_fsdp(tiny_llama, tmp_path):
    """tests/trainers/test_ppo_distributed.py trains with it."""
    run = make("ppo", tiny_llama, tmp_path, ptx_coef=0.5, ptx_dataset=FACTS)
    run.is_fsdp_enabled = True
    protect(run, FACTS, mixes=True)
    assert not run._auxiliary


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projection_every": 2}, "projection_every=2 does nothing while projection is None"),
        ({"projection_when": "conflict", "ptx_coef": 1.0}, "projection_when='conflict' does nothing while"),
        ({"ewc": "fisher.safetensors"}, "ewc='fisher.safetensors' does nothing while ewc_coef is 0"),
        ({"ewc_rows": 8, "ptx_coef": 1.0}, "ewc_rows=8 does nothing while ewc_coef is 0"),
        ({"ewc_rows": 8, "ewc": "fisher.safetensors", "ewc_coef": 1.0}, "ewc_rows=8 does nothing beside ewc="),
        ({"ptx_rate": 0.5, "ptx_coef": 1.0}, "ptx_rate=0.5 does nothing while ptx_ceiling is None"),
    ],
)
def test_what_would_do_nothing_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        check_mitigations(DPOConfig("output", use_cpu=True, **options), FACTS)


@pytest.mark.parametrize(
    ("options", "listed"),
    [
        ({}, set()),
        ({"ptx_coef": 0.5}, {"ptx_coef", "ptx_batch_size", "ptx_max_length"}),
        ({"ptx_ceiling": 0.0, "ptx_rate": 1.0}, {"ptx_ceiling", "ptx_rate", "ptx_batch_size", "ptx_max_length"}),
        ({"projection": "update"}, {"projection", "ptx_batch_size", "ptx_max_length"}),
        ({"ewc_coef": 1.0, "ewc_rows": 8}, {"ewc_coef", "ewc_rows", "ptx_max_length"}),
        ({"ewc_coef": 1.0, "ewc": "fisher.safetensors"}, {"ewc_coef", "ewc"}),
    ],
)
def test_the_card_lists_what_acts(options, listed):
    args = DPOConfig("output", use_cpu=True, ptx_batch_size=4, ptx_max_length=64, **options)
    assert mitigations_in_force(args) == {name: getattr(args, name) for name in listed}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        check_mitigations(args, FACTS)
