"""In every trainer an auxiliary loss adds weight × its gradient to a step, once, however the step is cut up."""

import math

import pytest
import torch
from trainer_setting import MAKE, SGD

from lifecycle_hf.mitigation.trade_off import LagrangeMultiplier


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


@pytest.mark.parametrize("name", ["sft", "reward", "classification", "qa", "seq2seq", "dpo", "kto"])
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
