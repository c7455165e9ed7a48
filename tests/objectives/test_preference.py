"""Test per-pair objectives: numbers computed by hand, invariants, and ORPO against TRL."""

import math
from types import SimpleNamespace

import pytest
import torch

from lifecycle_hf.objectives.preference import dpo_loss, ipo_loss, log_odds, orpo_loss

close = torch.testing.assert_close

# objective, number of [B] inputs
OBJECTIVES = {
    "dpo": (dpo_loss, 2),
    "dpo, smoothed": (lambda chosen, rejected: dpo_loss(chosen, rejected, beta=0.5, label_smoothing=0.2), 2),
    "ipo": (ipo_loss, 2),
    "log odds": (log_odds, 1),
    "orpo": (lambda nll, chosen, rejected: orpo_loss(nll, chosen, rejected, lambda_or=0.7), 3),
}


def test_dpo_by_hand():
    # β = ½: Δ = 0 → ln 2; Δ = 2·ln 3 → −log ¾; Δ = −2·ln 3 → −log ¼
    chosen = torch.tensor([1.0, 1.0 + 2 * math.log(3), 1.0])
    rejected = torch.tensor([1.0, 1.0, 1.0 + 2 * math.log(3)])
    expected = torch.tensor([math.log(2), math.log(4 / 3), math.log(4)])
    close(dpo_loss(chosen, rejected, beta=0.5), expected)


def test_dpo_label_smoothing_by_hand():
    # σ(βΔ) = ¾ and ε = .1: .9·log(4/3) + .1·log 4; at Δ = 0 smoothing changes nothing
    chosen = torch.tensor([10 * math.log(3), 0.0])
    loss = dpo_loss(chosen, torch.zeros(2), beta=0.1, label_smoothing=0.1)
    close(loss, torch.tensor([0.9 * math.log(4 / 3) + 0.1 * math.log(4), math.log(2)]))


def test_dpo_gradient_by_hand():
    # d/dh_w −log σ(βΔ) = −β·σ(−βΔ): −.1·½ at Δ = 0, −.1·¼ at σ = ¾; h_l gets the opposite
    chosen = torch.tensor([0.0, 10 * math.log(3)], requires_grad=True)
    rejected = torch.zeros(2, requires_grad=True)
    dpo_loss(chosen, rejected, beta=0.1).sum().backward()
    close(chosen.grad, torch.tensor([-0.05, -0.025]))
    close(rejected.grad, torch.tensor([0.05, 0.025]))


def test_smoothed_dpo_has_its_optimum_at_the_log_odds_of_the_label():
    # σ(βΔ) = 1 − ε, so βΔ = log((1−ε)/ε) = ln 9 for ε = .1
    chosen = torch.tensor([0.9, 1.0, 1.1]).mul(10 * math.log(9)).requires_grad_()
    dpo_loss(chosen, torch.zeros(3), beta=0.1, label_smoothing=0.1).sum().backward()
    assert chosen.grad[0] < 0 < chosen.grad[2]
    close(chosen.grad[1], torch.tensor(0.0), atol=1e-7, rtol=0)


def test_dpo_is_the_log_likelihood_of_a_noisy_bernoulli_label():
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = (torch.randn(16, generator=generator, dtype=torch.double) * 10 for _ in range(2))
    for epsilon in (0.0, 0.3):
        target = torch.full((16,), 1 - epsilon, dtype=torch.double)
        expected = torch.nn.functional.binary_cross_entropy_with_logits(
            0.3 * (chosen - rejected), target, reduction="none"
        )
        close(dpo_loss(chosen, rejected, beta=0.3, label_smoothing=epsilon), expected)


def test_far_apart_logratios_stay_finite():
    chosen = torch.tensor([1000.0, -1000.0], requires_grad=True)
    loss = dpo_loss(chosen, torch.zeros(2), beta=1.0)
    loss.sum().backward()
    close(loss, torch.tensor([0.0, 1000.0]))
    close(chosen.grad, torch.tensor([0.0, -1.0]))


def test_ipo_by_hand():
    # τ = ¼ asks for Δ = 2: Δ = 0 → 4; Δ = 2 → 0; Δ = 5 → 9; only the difference counts
    chosen, rejected = torch.tensor([0.0, 3.0, 1.0]), torch.tensor([0.0, 1.0, -4.0])
    close(ipo_loss(chosen, rejected, tau=0.25), torch.tensor([4.0, 0.0, 9.0]))


def test_ipo_is_a_regression_on_the_log_ratio_of_the_pair():
    generator = torch.Generator().manual_seed(0)
    policy_w, policy_l, ref_w, ref_l = (torch.rand(16, generator=generator, dtype=torch.double) for _ in range(4))
    h = torch.log(policy_w * ref_l / (policy_l * ref_w))
    expected = torch.nn.functional.mse_loss(h, torch.full_like(h, 1 / 0.6), reduction="none")
    close(ipo_loss(policy_w.log() - ref_w.log(), policy_l.log() - ref_l.log(), tau=0.3), expected)


def test_ipo_has_its_optimum_at_one_over_two_tau():
    # τ = .1: h_w − h_l = 5; the slope is 2·(Δ − 5)
    chosen = torch.tensor([4.5, 5.0, 5.5], requires_grad=True)
    ipo_loss(chosen, torch.zeros(3), tau=0.1).sum().backward()
    close(chosen.grad, torch.tensor([-1.0, 0.0, 1.0]))


def test_scaled_logratios_would_move_the_optimum_of_ipo():
    # (β·Δ − 1/(2β))² with β = .1: slope 2β(βΔ − 5), −.9 at Δ = 5 and 0 at 1/(2β²) = 50
    chosen = torch.tensor([5.0, 50.0], requires_grad=True)
    ipo_loss(0.1 * chosen, torch.zeros(2), tau=0.1).sum().backward()
    close(chosen.grad, torch.tensor([-0.9, 0.0]))


def test_log_odds_by_hand():
    # p/(1−p): 1/3, 1, 3; and p̄ = −1e-3, where 1 − p is small
    p = [0.25, 0.5, 0.75, math.exp(-1e-3)]
    expected = [-math.log(3), 0.0, math.log(3), math.log(p[3] / (1 - p[3]))]
    assert math.log(p[0] / (1 - p[0])) == pytest.approx(expected[0])
    close(log_odds(torch.tensor([math.log(x) for x in p], dtype=torch.double)), torch.tensor(expected).double())
    close(log_odds(torch.tensor([math.log(x) for x in p])), torch.tensor(expected))


def test_log_odds_near_certainty_and_far_from_it():
    # p̄ → 0: log(p/(1−p)) → −log(−p̄) + p̄/2; p̄ = −50: p̄ itself
    mean_logps = [-1e-8, -1e-6, -1e-5, -50.0]
    expected = [-math.log(-x) + x / 2 for x in mean_logps[:3]] + [-50.0]
    close(log_odds(torch.tensor(mean_logps)), torch.tensor(expected))


def test_log_odds_gradient_by_hand():
    # 1/(1 − e^p̄): p = ¼ → 4/3; p = ½ → 2; p̄ = −1e-6 → 1e6; −50 → 1; 0 is above the clamp
    x = torch.tensor([math.log(0.25), math.log(0.5), -1e-6, -50.0, 0.0], requires_grad=True)
    log_odds(x).sum().backward()
    close(x.grad, torch.tensor([4 / 3, 2.0, 1e6, 1.0, 0.0]))


def test_log_odds_of_a_certain_completion_is_that_of_the_clamp():
    # a mean log-probability of 0, or a rounding error above it
    close(log_odds(torch.tensor([0.0, 1e-7, 1e-3])), torch.full((3,), -math.log(1e-8)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_orpo_stays_finite_over_the_whole_range(dtype):
    values = [-50.0, -20.0, -1.0, -1e-3, -1e-6, -1e-8, 0.0, 1e-7]
    grid = torch.cartesian_prod(torch.tensor(values), torch.tensor(values)).to(dtype)
    chosen, rejected = (column.clone().requires_grad_() for column in grid.T)
    loss = orpo_loss(-chosen, chosen, rejected)
    loss.sum().backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for tensor in (loss, chosen.grad, rejected.grad):
        assert tensor.isfinite().all()


def test_orpo_by_hand():
    # equal answers: NLL + λ·ln 2; p_w = ¾ and p_l = ½: odds ratio 3, −log σ(ln 3) = log(4/3); reversed: log 4
    p_w, p_l = torch.log(torch.tensor([0.5, 0.75, 0.5])), torch.log(torch.tensor([0.5, 0.5, 0.75]))
    loss = orpo_loss(torch.tensor([0.0, 1.0, 2.0]), p_w, p_l, lambda_or=0.5)
    close(loss, torch.tensor([math.log(2) / 2, 1 + math.log(4 / 3) / 2, 2 + math.log(4) / 2]))


def test_orpo_without_lambda_is_the_likelihood():
    nll = torch.tensor([0.3, 2.0])
    close(orpo_loss(nll, -nll, torch.tensor([-1.0, -1.0]), lambda_or=0.0), nll)


def test_orpo_gradient_raises_the_chosen_and_lowers_the_rejected_answer():
    # λ·σ(−ratio)·d log_odds: at p = ½ for both, .1·½·2 = .1; the NLL adds −1 for y_w
    chosen, rejected = (torch.tensor([math.log(0.5)], requires_grad=True) for _ in range(2))
    orpo_loss(-chosen, chosen, rejected, lambda_or=0.1).sum().backward()
    close(chosen.grad, torch.tensor([-1.1]))
    close(rejected.grad, torch.tensor([0.1]))


def test_orpo_matches_trl():
    orpo_trainer = pytest.importorskip("trl.experimental.orpo.orpo_trainer")
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = (-torch.rand(32, generator=generator) * 8 - 1e-3 for _ in range(2))
    trainer = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    odds_term, *_ = orpo_trainer.ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)
    close(orpo_loss(-chosen, chosen, rejected, lambda_or=0.3), -chosen - odds_term)


@pytest.mark.parametrize("name", ["dpo", "ipo"])
def test_sixteen_bit_inputs_are_computed_in_fp32(name):
    loss, _ = OBJECTIVES[name]
    chosen, rejected = torch.tensor([100.0]).bfloat16(), torch.tensor([0.30078125]).bfloat16()
    result = loss(chosen, rejected)
    assert result.dtype == torch.float32
    close(result, loss(chosen.float(), rejected.float()), rtol=0, atol=0)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradcheck_batch_split_and_permutation(name):
    loss, n = OBJECTIVES[name]
    generator = torch.Generator().manual_seed(1)
    inputs = [-torch.rand(6, generator=generator, dtype=torch.double) * 3 - 0.05 for _ in range(n)]
    assert torch.autograd.gradcheck(loss, [x.clone().requires_grad_() for x in inputs])
    whole = loss(*inputs)
    assert whole.shape == (6,)
    close(torch.cat([loss(*(x[:2] for x in inputs)), loss(*(x[2:] for x in inputs))]), whole)
    order = torch.randperm(6, generator=generator)
    close(loss(*(x[order] for x in inputs)), whole[order])
