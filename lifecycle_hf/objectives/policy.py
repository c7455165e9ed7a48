"""Policy-gradient objectives: per-token tensors in completion coordinates, [batch B, completion tokens T].

Token t of row b is action y_t, taken in state s_t = (prompt, y_<t); `mask[b, t]` is 1 for the tokens of the
completion, the stop token included, and 0 for padding.
"""

import torch


def kl_estimate(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, *, estimator: str = "k1") -> torch.Tensor:
    """Estimate KL(π‖π_ref) for each token, from tokens sampled from π.

    k1 = log π − log π_ref (unbiased); k2 = ½·k1² (biased, low variance); k3 = e^(−k1) − 1 + k1 (unbiased, positive).

    Args:
        logprobs, ref_logprobs: [B, T], nats.
        estimator: "k1", "k2" or "k3".

    Returns:
        [B, T], nats.

    Raises:
        ValueError: the estimator is unknown.

    Reference: Schulman, "Approximating KL Divergence" (2020).
    """
    k1 = logprobs - ref_logprobs
    if estimator == "k1":
        return k1
    if estimator == "k2":
        return k1.square() / 2
    if estimator == "k3":
        return torch.expm1(-k1) + k1
    raise ValueError(f"estimator={estimator!r} is unknown: use 'k1', 'k2' or 'k3'.")


def token_rewards(scores: torch.Tensor, kl: torch.Tensor, mask: torch.Tensor, *, kl_coef: float) -> torch.Tensor:
    """Return the reward of every token: r_t = −β·kl_t, plus the score at the last token of the completion.

    Args:
        scores: [B], one score per completion.
        kl: [B, T], per-token KL, nats.
        mask: [B, T], true on completion tokens, which are at the start of each row.
        kl_coef: β.

    Returns:
        [B, T], 0 on padding.

    Raises:
        ValueError: a row has no completion token, to which its score could be added.

    Reference: InstructGPT, https://arxiv.org/abs/2203.02155, Eq. 2.
    """
    mask = mask.bool()
    lengths = mask.sum(1)
    if (lengths == 0).any():
        raise ValueError(f"Row {int((lengths == 0).nonzero()[0])} has no completion token for its score: drop it.")
    rewards = torch.where(mask, -kl_coef * kl, torch.zeros_like(kl))
    return rewards.scatter_add(1, (lengths - 1)[:, None], scores.to(rewards.dtype)[:, None])


def discounted_returns(rewards: torch.Tensor, mask: torch.Tensor, *, gamma: float = 1.0) -> torch.Tensor:
    """Return the discounted sum of the rewards from each token on: G_t = Σ_{l≥0} γ^l r_{t+l}.

    Shapes are those of [`generalized_advantage_estimate`]. This is the return of REINFORCE (Williams 1992).
    """
    zeros = torch.zeros_like(rewards)
    returns, _ = generalized_advantage_estimate(rewards, zeros, mask, gamma=gamma, lam=1.0)
    return returns


def generalized_advantage_estimate(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap_values: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return generalised advantages and the returns that follow from them.

    δ_t = r_t + γ·V_{t+1} − V_t,  Â_t = Σ_{l≥0} (γλ)^l δ_{t+l},  G_t = Â_t + V_t.

    After the last token of a row V_{T+1} is 0 (a terminal state) or `bootstrap_values` (a truncated completion).
    Padding has no reward and no value, and adds no factor γλ.

    Args:
        rewards, values: [B, T]; `values[b, t]` is V(s_t), the value before y_t.
        mask: [B, T], true on completion tokens, which are at the start of each row.
        gamma: γ, the discount.
        lam: λ; 1 gives the least bias, 0 the least variance.
        bootstrap_values: [B] or None, V of the state after the last token; 0 where the state is terminal.

    Returns:
        (advantages, returns), both [B, T] and 0 on padding.

    Reference: https://arxiv.org/abs/1506.02438, Eq. 16.
    """
    mask = mask.bool()
    next_value = torch.zeros_like(rewards[:, 0]) if bootstrap_values is None else bootstrap_values.to(rewards.dtype)
    advantage = torch.zeros_like(rewards[:, 0])
    advantages = torch.zeros_like(rewards)
    for t in reversed(range(rewards.shape[1])):
        valid = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(valid, delta + gamma * lam * advantage, advantage)
        next_value = torch.where(valid, values[:, t], next_value)
        advantages[:, t] = torch.where(valid, advantage, 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)


def whiten(values: torch.Tensor, mask: torch.Tensor, *, mean: float, variance: float) -> torch.Tensor:
    """Shift and scale to zero mean and unit variance: (x − mean) / sqrt(variance + 1e-8), 0 on padding.

    Args:
        values: [B, T].
        mask: [B, T].
        mean, variance: those of the tokens where the mask is true, over *all* ranks.
    """
    return torch.where(mask.bool(), (values - mean) * (variance + 1e-8) ** -0.5, 0.0)


def group_advantages(
    returns: torch.Tensor, group_size: int, *, estimator: str = "rloo", scale: torch.Tensor | float | None = None
) -> torch.Tensor:
    """Return the advantage of each completion over the others of its prompt.

    rloo: Â_i = R_i − mean_{j≠i} R_j. grpo: Â_i = (R_i − mean_j R_j) / (s + 1e-4), undivided in Dr. GRPO. Equal returns
    in a group give exactly 0.

    Args:
        returns: [P·N], the N completions of a prompt in a row.
        group_size: N, 2 at least.
        estimator: "rloo" or "grpo".
        scale: s of grpo; by default the sample deviation of each group, as in TRL. 0 divides by nothing.

    Returns:
        [P·N].

    Raises:
        ValueError: there is no other completion, or the groups are not whole.

    Reference: https://arxiv.org/abs/2402.14740, Eq. 8 (rloo); https://arxiv.org/abs/2402.03300, Section 4.1.2 (grpo);
    https://arxiv.org/abs/2503.20783 (no division).
    """
    if group_size < 2 or len(returns) % group_size:
        raise ValueError(f"{len(returns)} returns do not make groups of {group_size} with 2 completions or more.")
    groups = returns.view(-1, group_size)
    apart = groups - groups[:, :1]  # exactly 0 where all are equal, which a difference to the mean is not
    centred = apart - apart.mean(1, keepdim=True)
    if estimator == "rloo":
        centred = centred * (group_size / (group_size - 1))
    else:
        deviation = group_deviations(returns, group_size)[:, None] if scale is None else scale
        centred = centred if isinstance(scale, float | int) and scale == 0 else centred / (deviation + 1e-4)
    return centred.flatten()


def group_deviations(returns: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return the sample deviation of the returns [P·N] of each prompt, [P]; exactly 0 where all are equal."""
    groups = returns.view(-1, group_size)
    return (groups - groups[:, :1]).std(1)


def importance_ratio(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, mask: torch.Tensor | None = None, *, level: str = "token"
) -> torch.Tensor:
    """Return the probability ratio ρ of the new policy to the old one.

    token: ρ_t = exp(l_t), l = log π − log π_old. sequence: exp of the mean of l over the completion (GSPO).
    trajectory: exp of the sum of l, for which the whole completion is one action (RLOO).

    Args:
        logprobs, old_logprobs: [B, T].
        mask: [B, T], true on completion tokens; "token" does not need it.
        level: "token", "sequence" or "trajectory".

    Returns:
        [B, T]; the ratio of a completion stands at each of its tokens.

    Raises:
        ValueError: the level is unknown.

    Reference: https://arxiv.org/abs/1707.06347, Section 3; https://arxiv.org/abs/2507.18071, Eq. 7;
    https://arxiv.org/abs/2402.14740, Section 2.
    """
    difference = logprobs - old_logprobs
    if level == "token":
        return torch.exp(difference)
    if level not in ("sequence", "trajectory"):
        raise ValueError(f"level={level!r} is unknown: use 'token', 'sequence' or 'trajectory'.")
    total = torch.where(mask.bool(), difference, 0.0).sum(1, keepdim=True)
    total = total / mask.sum(1, keepdim=True) if level == "sequence" else total
    return torch.exp(total).expand_as(difference)


def ppo_policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    *,
    clip_range: float = 0.2,
    clip_range_high: float | None = None,
    level: str = "token",
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the clipped surrogate loss per token: −min(ρÂ, clip(ρ, 1−ε, 1+ε_high)Â), ρ of [`importance_ratio`].

    Args:
        logprobs, old_logprobs, advantages: [B, T].
        clip_range: ε.
        clip_range_high: ε_high, ε by default; a larger one ("clip-higher") lets unlikely tokens gain more.
        level: level of ρ.
        mask: [B, T], needed at the levels above "token".

    Returns:
        [B, T].

    Reference: PPO, https://arxiv.org/abs/1707.06347, Eq. 7; DAPO, https://arxiv.org/abs/2503.14476, Eq. 10.
    """
    ratio = importance_ratio(logprobs, old_logprobs, mask, level=level)
    high = clip_range if clip_range_high is None else clip_range_high
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_range, 1 + high) * advantages)


def aggregate_tokens(
    losses: torch.Tensor,
    mask: torch.Tensor,
    *,
    aggregation: str = "token",
    tokens: torch.Tensor | float,
    completions: int,
    max_length: int,
) -> torch.Tensor:
    """Return what the rows of a micro-batch add to the loss of a mini-batch; the sum over all of them is that loss.

    token: the mean over all tokens. sequence: the mean over completions of their means, GRPO's; it makes the tokens of
    short completions weigh more. constant: the sum over tokens / (completions · max_length), that of Dr. GRPO.

    Args:
        losses, mask: [B, T].
        aggregation: "token", "sequence" or "constant".
        tokens, completions: those of the whole mini-batch: all its micro-batches, on all ranks.
        max_length: tokens that a completion may have.

    Returns:
        scalar.

    Raises:
        ValueError: the aggregation is unknown.

    Reference: https://arxiv.org/abs/2402.03300, Eq. 3 (sequence); https://arxiv.org/abs/2503.14476, Eq. 8 (token);
    https://arxiv.org/abs/2503.20783, Section 3.2 (constant).
    """
    if aggregation == "token":
        return (losses * mask).sum() / tokens
    if aggregation == "sequence":
        return ((losses * mask).sum(1) / mask.sum(1)).sum() / completions
    if aggregation == "constant":
        return (losses * mask).sum() / (completions * max_length)
    raise ValueError(f"aggregation={aggregation!r} is unknown: use 'token', 'sequence' or 'constant'.")


def ppo_value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, *, clip_range: float = 0.2
) -> torch.Tensor:
    """Return the clipped value loss per token: ½·max((V−G)², (V_old + clip(V−V_old, ±ε_v) − G)²).

    Args:
        values, old_values, returns: [B, T].
        clip_range: ε_v.

    Returns:
        [B, T].

    Reference: https://arxiv.org/abs/1506.02438 as implemented in PPO2 of OpenAI's baselines; see MATHS in the docs.
    """
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    return torch.maximum((values - returns).square(), (clipped - returns).square()) / 2
