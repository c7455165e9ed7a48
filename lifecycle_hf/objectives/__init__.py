"""Losses as pure functions: tensors in, one number per example (or per token) out. They need only torch."""

from lifecycle_hf.objectives.domains import domain_sums, doremi_weights, excess_loss
from lifecycle_hf.objectives.language import causal_lm_loss, masked_lm_loss
from lifecycle_hf.objectives.policy import (
    aggregate_tokens,
    discounted_returns,
    generalized_advantage_estimate,
    group_advantages,
    group_deviations,
    importance_ratio,
    kl_estimate,
    ppo_policy_loss,
    ppo_value_loss,
    token_rewards,
    whiten,
)
from lifecycle_hf.objectives.preference import dpo_loss, ipo_loss, log_odds, orpo_loss
from lifecycle_hf.objectives.reward import bradley_terry_loss
from lifecycle_hf.objectives.unpaired import class_balance, kto_loss, kto_reference_point

__all__ = [
    "aggregate_tokens",
    "bradley_terry_loss",
    "causal_lm_loss",
    "class_balance",
    "discounted_returns",
    "domain_sums",
    "doremi_weights",
    "dpo_loss",
    "excess_loss",
    "generalized_advantage_estimate",
    "group_advantages",
    "group_deviations",
    "importance_ratio",
    "ipo_loss",
    "kl_estimate",
    "kto_loss",
    "kto_reference_point",
    "log_odds",
    "masked_lm_loss",
    "orpo_loss",
    "ppo_policy_loss",
    "ppo_value_loss",
    "token_rewards",
    "whiten",
]
