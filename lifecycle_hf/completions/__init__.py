"""Sampling of completions, and their log-probs and rewards."""

from lifecycle_hf.completions.best_of_n import BestOfN, best_of_n, expected_best, kl_bound
from lifecycle_hf.completions.rewards import CallableReward, Samples, find_reward
from lifecycle_hf.completions.sampling import generate, stop_token_ids
from lifecycle_hf.completions.scoring import Completions, completion_hidden_states, completion_logprobs

__all__ = [
    "BestOfN",
    "CallableReward",
    "Completions",
    "Samples",
    "best_of_n",
    "completion_hidden_states",
    "completion_logprobs",
    "expected_best",
    "find_reward",
    "generate",
    "kl_bound",
    "stop_token_ids",
]
