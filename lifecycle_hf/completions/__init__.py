"""Sampling of completions, and their log-probs and rewards."""

from lifecycle_hf.completions.rewards import CallableReward, Samples, find_reward
from lifecycle_hf.completions.sampling import generate, stop_token_ids
from lifecycle_hf.completions.scoring import Completions, completion_hidden_states, completion_logprobs

__all__ = [
    "CallableReward",
    "Completions",
    "Samples",
    "completion_hidden_states",
    "completion_logprobs",
    "find_reward",
    "generate",
    "stop_token_ids",
]
