"""RLOO and GRPO: policy optimisation without a critic, by comparing several completions of one prompt."""

from dataclasses import dataclass, field

from lifecycle_hf.trainers.base.options import option
from lifecycle_hf.trainers.policy.config import PPOConfig
from lifecycle_hf.trainers.policy.ppo import PPOTrainer

OF_TRL = {
    "beta": "kl_coef", "epsilon": "cliprange", "epsilon_high": "cliprange_high", "num_iterations": "ppo_epochs",
    "loss_type": "loss_aggregation",
}  # fmt: skip
"""TRL's names of options that PPO has under other names."""
AGGREGATIONS = {"grpo": "sequence", "dapo": "token", "bnpo": "token", "dr_grpo": "constant"}
"""The aggregation that each `loss_type` of TRL stands for."""


def of_ppo(name: str, default):
    """Return the field of an option of [`PPOConfig`] with another default."""
    return field(default=default, metadata=PPOConfig.__dataclass_fields__[name].metadata)


@dataclass
class GroupConfig(PPOConfig):
    """Hold the options of RLOO and GRPO: those of [`PPOConfig`], some of which TRL's names set, too.

    Raises:
        ValueError: an option is set under both of its names.
    """

    ppo_epochs: int = of_ppo("ppo_epochs", 1)
    max_completion_length: int = of_ppo("max_completion_length", 512)
    beta: float | None = option(None, "TRL's name of kl_coef.")
    epsilon: float | None = option(None, "TRL's name of cliprange.")
    epsilon_high: float | None = option(None, "TRL's name of cliprange_high.")
    num_iterations: int | None = option(None, "TRL's name of ppo_epochs.")

    def __post_init__(self):
        for theirs, ours in OF_TRL.items():
            value, own = getattr(self, theirs, None), getattr(self, ours)
            if value is None:
                continue
            if own != self.__dataclass_fields__[ours].default:
                raise ValueError(f"{theirs}={value} and {ours}={own} are one option: set one of them.")
            setattr(self, ours, AGGREGATIONS.get(value, value) if theirs == "loss_type" else value)
            setattr(self, theirs, None)
        super().__post_init__()


@dataclass
class RLOOConfig(GroupConfig):
    """Hold the options of RLOO and those of `transformers.TrainingArguments`, with the defaults of TRL's RLOO."""

    advantage_estimator: str = of_ppo("advantage_estimator", "rloo")
    num_generations: int = of_ppo("num_generations", 2)
    importance_sampling_level: str = of_ppo("importance_sampling_level", "trajectory")
    loss_aggregation: str = of_ppo("loss_aggregation", "sequence")


@dataclass
class GRPOConfig(GroupConfig):
    """Hold the options of GRPO and those of `transformers.TrainingArguments`, with the defaults of TRL's GRPO."""

    advantage_estimator: str = of_ppo("advantage_estimator", "grpo")
    num_generations: int = of_ppo("num_generations", 8)
    kl_coef: float = of_ppo("kl_coef", 0.0)
    kl_in_loss: bool = of_ppo("kl_in_loss", True)
    loss_type: str | None = option(
        None,
        "TRL's names of loss_aggregation: 'dapo' and 'bnpo' mean 'token', 'grpo' 'sequence', 'dr_grpo' 'constant'.",
        choices=tuple(AGGREGATIONS),
    )


class RLOOTrainer(PPOTrainer):
    """Train a policy with rewards by REINFORCE, leave-one-out: each completion against the others of its prompt.

    Â_i = R_i − mean_{j≠i} R_j, R = r(x, y) − β·log(π/π_ref) (https://arxiv.org/abs/2402.14740, Eq. 8). By default a
    completion is one action: its ratio is the product over its tokens, clipped as a whole. There is no value function.

    Args:
        args: [`RLOOConfig`]; the other arguments are those of [`PPOTrainer`], without `value_model`.
    """

    config_class = RLOOConfig
    card_objective = (
        "Maximise E[r(x, y) − β·log(π/π_ref)] + γ_ptx·E_pretrain[log π] by REINFORCE with a clipped ratio; the "
        "baseline of a completion is the mean of the prompt's other completions (leave-one-out)."
    )
    card_paper = ("Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs",
                  "2402.14740")  # fmt: skip


class GRPOTrainer(PPOTrainer):
    """Train a policy with rewards by GRPO: each completion against the mean and deviation of its prompt's.

    Â_i = (R_i − mean R) / (std R + 1e-4) at every token, in the clipped surrogate of PPO, minus β times the KL (k3) in
    the loss (https://arxiv.org/abs/2402.03300, Eq. 3). The deviation is that of the sample, as in TRL. By default, as
    in TRL, the loss is a mean over tokens (DAPO) and β is 0. There is no value function.

    Args:
        args: [`GRPOConfig`]; the other arguments are those of [`PPOTrainer`], without `value_model`.
    """

    config_class = GRPOConfig
    card_objective = (
        "Maximise E[r(x, y)] − β·KL(π‖π_ref) + γ_ptx·E_pretrain[log π] by the clipped surrogate; the advantage of a "
        "completion is its reward minus the mean of the prompt's completions, divided by their deviation."
    )
    card_paper = ("DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models", "2402.03300")
