"""The objective of reward models, which turns the scores of pairs into one loss per pair."""

import torch


def bradley_terry_loss(
    chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor, *, margin: torch.Tensor | float | None = None
) -> torch.Tensor:
    """Return the negative log-likelihood of the preference: −log σ(r_w − r_l − m).

    Args:
        chosen_rewards, rejected_rewards: [B], scores of the preferred and the other answer.
        margin: m, [B] or a number; 0 by default.

    Returns:
        [B], nats.

    Reference: Bradley and Terry 1952; InstructGPT, https://arxiv.org/abs/2203.02155, Eq. 1; margins as in Llama 2,
    https://arxiv.org/abs/2307.09288, Eq. 2.
    """
    difference = chosen_rewards - rejected_rewards
    return -torch.nn.functional.logsigmoid(difference if margin is None else difference - margin)
