"""Test per-token objectives: numbers computed by hand, and invariants."""

import math

import pytest
import torch

from lifecycle_hf.objectives.policy import (
    aggregate_tokens,
    discounted_returns,
    generalized_advantage_estimate,
    group_advantages,
    importance_ratio,
    kl_estimate,
    ppo_policy_loss,
    ppo_value_loss,
    token_rewards,
    whiten,
)

close = torch.testing.assert_close


def test_kl_estimates_of_one_token():
    log_p, log_q = torch.tensor([[math.log(0.5)]]), torch.tensor([[math.log(0.25)]])
    close(kl_estimate(log_p, log_q), torch.tensor([[math.log(2)]]))
    close(kl_estimate(log_p, log_q, estimator="k2"), torch.tensor([[math.log(2) ** 2 / 2]]))
    # q/p − 1 − log(q/p) with q/p = 1/2
    close(kl_estimate(log_p, log_q, estimator="k3"), torch.tensor([[0.5 - 1 + math.log(2)]]))
    with pytest.raises(ValueError, match="'k1', 'k2' or 'k3'"):
        kl_estimate(log_p, log_q, estimator="k4")


def test_kl_estimates_are_right_in_expectation():
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.2, 0.5, 0.3])
    exact = (p * (p / q).log()).sum()
    for estimator in ("k1", "k3"):
        close((p * kl_estimate(p.log(), q.log(), estimator=estimator)).sum(), exact)


def test_score_lands_on_the_last_real_token_and_never_on_padding():
    kl = torch.tensor([[0.5, 1.0, -0.25], [2.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    rewards = token_rewards(torch.tensor([3.0, -1.0]), kl, mask, kl_coef=0.1)
    close(rewards, torch.tensor([[-0.05, -0.1, 0.025 + 3.0], [-0.2 - 1.0, 0.0, 0.0]]))


def test_a_row_without_tokens_is_refused_by_number():
    with pytest.raises(ValueError, match="Row 1"):
        token_rewards(torch.zeros(2), torch.zeros(2, 2), torch.tensor([[1, 1], [0, 0]]), kl_coef=0.1)


def test_advantages_by_hand():
    # γ=.9, λ=.8: δ₂ = 1 − .4 = .6; δ₁ = 0 + .9·.4 − .3 = .06; δ₀ = −.1 + .9·.3 − .2 = −.03
    # Â₂ = .6; Â₁ = .06 + .72·.6 = .492; Â₀ = −.03 + .72·.492 = .32424
    rewards, values = torch.tensor([[-0.1, 0.0, 1.0]]), torch.tensor([[0.2, 0.3, 0.4]])
    advantages, returns = generalized_advantage_estimate(rewards, values, torch.ones(1, 3), gamma=0.9, lam=0.8)
    close(advantages, torch.tensor([[0.32424, 0.492, 0.6]]))
    close(returns, torch.tensor([[0.52424, 0.792, 1.0]]))


def test_truncated_completion_bootstraps():
    # one token: δ = 1 + .9·2 − .5
    advantages, returns = generalized_advantage_estimate(
        torch.tensor([[1.0]]), torch.tensor([[0.5]]), torch.ones(1, 1), gamma=0.9, bootstrap_values=torch.tensor([2.0])
    )
    close(advantages, torch.tensor([[2.3]]))
    close(returns, torch.tensor([[2.8]]))


def test_padding_carries_no_reward_value_or_decay():
    rewards, values = torch.tensor([[-0.1, 0.0, 1.0]]), torch.tensor([[0.2, 0.3, 0.4]])
    bare = generalized_advantage_estimate(rewards, values, torch.ones(1, 3), gamma=0.9, lam=0.8)
    noise = torch.full((1, 4), 7.0)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0]])
    padded = generalized_advantage_estimate(
        torch.cat([rewards, noise], 1), torch.cat([values, noise], 1), mask, gamma=0.9, lam=0.8
    )
    for short, long in zip(bare, padded, strict=True):
        close(long[:, :3], short)
        close(long[:, 3:], torch.zeros(1, 4))


def test_advantages_match_the_naive_sum():
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(3, 6, generator=generator), torch.randn(3, 6, generator=generator)
    lengths = torch.tensor([6, 1, 4])
    mask = torch.arange(6) < lengths[:, None]
    advantages, _ = generalized_advantage_estimate(rewards, values, mask, gamma=0.95, lam=0.9)
    for b, n in enumerate(lengths.tolist()):
        v = values[b, :n].tolist() + [0.0]
        delta = [rewards[b, t].item() + 0.95 * v[t + 1] - v[t] for t in range(n)]
        for t in range(n):
            expected = sum((0.95 * 0.9) ** (i - t) * delta[i] for i in range(t, n))
            assert advantages[b, t].item() == pytest.approx(expected, abs=1e-5)


def test_returns_of_reinforce():
    # 1 + .5·2 + .25·4 = 3; 2 + .5·4 = 4; 4
    mask = torch.tensor([[1, 1, 1, 0]])
    returns = discounted_returns(torch.tensor([[1.0, 2.0, 4.0, 9.0]]), mask, gamma=0.5)
    close(returns, torch.tensor([[3.0, 4.0, 4.0, 0.0]]))


def test_whiten_uses_the_moments_it_is_given():
    x, mask = torch.tensor([[1.0, 3.0, 100.0]]), torch.tensor([[1, 1, 0]])
    close(whiten(x, mask, mean=2.0, variance=1.0), torch.tensor([[-1.0, 1.0, 0.0]]))


def test_policy_loss_by_hand():
    # ρ = 2 clipped to 1.2 for Â=1: −1.2; for Â=−1 the minimum is the unclipped −2: 2; ρ = ½: −.5, and for Â=−1 .8
    logprobs = torch.log(torch.tensor([[2.0, 2.0, 0.5, 0.5]]))
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    loss = ppo_policy_loss(logprobs, torch.zeros(1, 4), advantages, clip_range=0.2)
    close(loss, torch.tensor([[-1.2, 2.0, -0.5, 0.8]]))


def test_policy_gradient_at_ratio_one_is_reinforce():
    logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    advantages = torch.tensor([[0.7, -0.3]])
    ppo_policy_loss(logprobs, logprobs.detach(), advantages).sum().backward()
    close(logprobs.grad, -advantages)


def test_clipped_tokens_have_no_gradient():
    logprobs = torch.log(torch.tensor([[1.5, 0.5]])).requires_grad_()
    ppo_policy_loss(logprobs, torch.zeros(1, 2), torch.tensor([[1.0, -1.0]])).sum().backward()
    close(logprobs.grad, torch.zeros(1, 2))


def test_value_loss_by_hand():
    # V=1, V_old=0, G=2: unclipped 1, clipped (.2 − 2)² = 3.24 → 1.62; V=.1: (1.9)² both ways → 1.805
    values, old, returns = torch.tensor([[1.0, 0.1]]), torch.zeros(1, 2), torch.full((1, 2), 2.0)
    close(ppo_value_loss(values, old, returns, clip_range=0.2), torch.tensor([[1.62, 1.805]]))


@pytest.mark.parametrize("loss", [ppo_policy_loss, ppo_value_loss])
def test_gradcheck_and_batch_split(loss):
    generator = torch.Generator().manual_seed(1)
    x, old, target = (torch.randn(4, 3, generator=generator, dtype=torch.double) for _ in range(3))
    assert torch.autograd.gradcheck(lambda x: loss(x, old, target), x.requires_grad_())
    close(torch.cat([loss(x[:2], old[:2], target[:2]), loss(x[2:], old[2:], target[2:])]), loss(x, old, target))


def test_leave_one_out_advantages_by_hand():
    # 1 − (2 + 6)/2 = −3; 2 − (1 + 6)/2 = −1.5; 6 − (1 + 2)/2 = 4.5
    advantages = group_advantages(torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0]), 3, estimator="rloo")
    close(advantages, torch.tensor([-3.0, -1.5, 4.5, 0.0, 0.0, 0.0]))
    close(advantages.view(2, 3).sum(1), torch.zeros(2))


def test_group_relative_advantages_by_hand():
    # mean 3, sample deviation sqrt((4 + 1 + 9) / 2) = 2.6457513
    returns = torch.tensor([1.0, 2.0, 6.0])
    close(group_advantages(returns, 3, estimator="grpo"), torch.tensor([-2.0, -1.0, 3.0]) / (7**0.5 + 1e-4))
    close(group_advantages(returns, 3, estimator="grpo", scale=0), torch.tensor([-2.0, -1.0, 3.0]))
    close(group_advantages(returns, 3, estimator="grpo", scale=2.0), torch.tensor([-2.0, -1.0, 3.0]) / 2.0001)


@pytest.mark.parametrize("estimator", ["rloo", "grpo"])
def test_equal_returns_have_no_advantage_to_the_last_bit(estimator):
    for value in torch.rand(200, generator=torch.Generator().manual_seed(0)):
        assert group_advantages(value.expand(7), 7, estimator=estimator).count_nonzero() == 0
    with pytest.raises(ValueError, match="groups of 1"):
        group_advantages(torch.ones(4), 1)
    with pytest.raises(ValueError, match="5 returns do not make groups of 2"):
        group_advantages(torch.ones(5), 2)


def test_ratio_levels_by_hand():
    # log-ratios ln 2, ln 8 of two tokens: mean ln 4, sum ln 16; the third is padding
    new, mask = torch.log(torch.tensor([[2.0, 8.0, 5.0]])), torch.tensor([[1, 1, 0]])
    old = torch.zeros(1, 3)
    close(importance_ratio(new, old), torch.tensor([[2.0, 8.0, 5.0]]))
    close(importance_ratio(new, old, mask, level="sequence"), torch.full((1, 3), 4.0))
    close(importance_ratio(new, old, mask, level="trajectory"), torch.full((1, 3), 16.0))
    with pytest.raises(ValueError, match="level='word' is unknown"):
        importance_ratio(new, old, mask, level="word")


def test_clip_higher_by_hand():
    # ρ = 2: clipped to 1 + .5 for Â = 1; ρ = ½ and Â = −1: the clip at 1 − .2 gives .8
    logprobs, advantages = torch.log(torch.tensor([[2.0, 0.5]])), torch.tensor([[1.0, -1.0]])
    loss = ppo_policy_loss(logprobs, torch.zeros(1, 2), advantages, clip_range=0.2, clip_range_high=0.5)
    close(loss, torch.tensor([[-1.5, 0.8]]))


@pytest.mark.parametrize(("aggregation", "expected"), [("token", 22 / 5), ("sequence", 7.25), ("constant", 22 / 20)])
def test_aggregations_of_ragged_rows_by_hand(aggregation, expected):
    # rows 1, 2, 3, 4 (mean 2.5, sum 10) and 12: 22 / 5 tokens; (2.5 + 12) / 2 completions; 22 / (2 · 10)
    losses = torch.tensor([[1.0, 2.0, 3.0, 4.0], [12.0, 7.0, 7.0, 7.0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    options = {"aggregation": aggregation, "tokens": 5, "completions": 2, "max_length": 10}
    parts = [aggregate_tokens(losses[i : i + 1], mask[i : i + 1], **options) for i in (0, 1)]
    close(sum(parts), aggregate_tokens(losses, mask, **options))
    close(sum(parts), torch.tensor(expected))
