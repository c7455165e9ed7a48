"""Options of [`PPOTrainer`]."""

from dataclasses import dataclass

from lifecycle_hf.trainers.options import PolicyConfig, option

CHOICES = {
    "kl_control": ("fixed", "adaptive", "exponential"),
    "advantage_estimator": ("gae", "reinforce"),
    "reward_normalization": ("none", "batch", "running"),
}


@dataclass
class PPOConfig(PolicyConfig):
    """Options of PPO beside those of `transformers.TrainingArguments`; `--help` of the recipe describes each.

    One *update* is a rollout of `per_device_train_batch_size × gradient_accumulation_steps × num_mini_batches` prompts
    per process and its optimisation in `ppo_epochs × num_mini_batches` optimizer steps. `max_steps`, `logging_steps`,
    `save_steps` and `eval_steps` count optimizer steps, as everywhere in transformers.
    """

    value_learning_rate: float | None = option(
        None, "Learning rate of the value function; that of the policy by default."
    )
    max_prompt_length: int | None = option(512, "Drop prompts with more tokens than this; None keeps all.")
    max_completion_length: int = option(256, "Most tokens a completion may have.")
    temperature: float = option(1.0, "Sampling temperature, applied to old, new and reference log-probs alike.")
    stop_tokens: list[str] | None = option(
        None, "Tokens that end a completion; by default the EOS tokens of the tokenizer and of the model."
    )
    generation_batch_size: int | None = option(None, "Prompts decoded together; a whole rollout by default.")

    ppo_epochs: int = option(4, "Passes over each rollout.")
    num_mini_batches: int = option(1, "Optimizer steps per pass over a rollout.")
    cliprange: float = option(0.2, "Clip range ε of the policy's ratio.")
    cliprange_value: float = option(0.2, "Clip range of the value loss.")
    vf_coef: float = option(0.1, "Weight of the value loss.")
    entropy_coef: float = option(0.0, "Weight of the entropy bonus.")
    gamma: float = option(1.0, "Discount per token.")
    lam: float = option(0.95, "λ of the generalised advantage estimate.")
    whiten_advantages: bool = option(True, "Whiten advantages over all completion tokens of the rollout, all ranks.")
    advantage_estimator: str = option(
        "gae",
        "'gae' with a critic, or 'reinforce': return minus its mean, no critic.",
        choices=CHOICES["advantage_estimator"],
    )
    bootstrap_truncated: bool = option(
        False, "Treat a completion cut off by max_completion_length as unfinished: bootstrap with its last value."
    )
    missing_eos_penalty: float | None = option(
        None, "Subtract this from the score of completions that did not end with a stop token."
    )

    kl_coef: float = option(0.05, "β, weight of the per-token KL (k1) in the reward; the start of a controlled β.")
    kl_control: str = option(
        "fixed",
        "How β moves: 'fixed', 'adaptive' to kl_target, 'exponential' in the KL.",
        choices=CHOICES["kl_control"],
    )
    kl_target: float = option(6.0, "Adaptive: KL to hold, sum over a completion's tokens, nats.")
    kl_horizon: int = option(10000, "Adaptive: completions over which β may change by a fifth.")
    kl_rate: float = option(0.1, "Exponential: β = kl_coef·exp(kl_rate·KL), within kl_coef_max.")
    kl_coef_max: float = option(1.0, "Exponential: most that β becomes.")

    reward_weights: list[float] | None = option(None, "Weight of each reward function; 1 each by default.")
    reward_normalization: str = option(
        "none",
        "Scale scores by their mean and deviation in the 'batch', by 'running' ones, or 'none'.",
        choices=CHOICES["reward_normalization"],
    )
    reward_clip: float | None = option(None, "Clip scores to ± this, after normalisation.")

    ptx_coef: float = option(0.0, "γ_ptx, weight of the pretraining loss (mean NLL per token); needs a ptx_dataset.")
    ptx_batch_size: int | None = option(
        None, "Pretraining rows per device and micro-batch; per_device_train_batch_size by default."
    )
    ptx_max_length: int = option(512, "Cut pretraining rows to this many tokens.")

    log_completions: bool = option(True, "Print a table of sample completions every logging_steps.")
    num_completions_to_print: int = option(4, "Rows of that table.")

    def check(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: choose one of {', '.join(choices)}.")
        for name in ("ppo_epochs", "num_mini_batches", "max_completion_length", "ptx_max_length", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0.")
        for name in ("cliprange", "cliprange_value", "vf_coef", "entropy_coef", "ptx_coef", "kl_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative.")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie between 0 and 1.")
        if self.bootstrap_truncated and self.advantage_estimator == "reinforce":
            raise ValueError("bootstrap_truncated needs a value function: advantage_estimator='gae', or turn it off.")

    @property
    def steps_per_update(self) -> int:
        """Optimizer steps per rollout."""
        return self.ppo_epochs * self.num_mini_batches

    @property
    def local_rollout_size(self) -> int:
        """Prompts per rollout and process."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.num_mini_batches
