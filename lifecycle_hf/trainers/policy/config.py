"""Options of [`PPOTrainer`], of which [`RLOOTrainer`] and [`GRPOTrainer`] have other defaults."""

from dataclasses import dataclass

from transformers import TrainingArguments

from lifecycle_hf.trainers.base.options import PolicyConfig, SamplingOptions, option

GROUPED = ("rloo", "grpo")
"""Advantage estimators that compare the completions of one prompt."""


@dataclass
class PPOConfig(SamplingOptions, PolicyConfig):
    """Hold the options of PPO and those of `transformers.TrainingArguments`; `--help` of the recipe describes each.

    One *update* is a rollout of `per_device_train_batch_size × gradient_accumulation_steps × num_mini_batches`
    completions per process, `num_generations` of each prompt, and the `ppo_epochs × num_mini_batches` optimizer steps
    on it. `max_steps`, `logging_steps`, `save_steps` and `eval_steps` count optimizer steps, as everywhere in
    transformers.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "chat_template_kwargs"]

    refused = PolicyConfig.refused | {
        "auto_find_batch_size": "would change the rollout's size: leave it out.",
        "neftune_noise_alpha": "makes the first ratio differ from 1: leave it out.",
        "label_smoothing_factor": "has no effect, as PPO has no labels: leave it out.",
        "include_num_input_tokens_seen": "has no effect: PPO logs tokens_per_second; leave it out.",
        "train_sampling_strategy": "has no effect, since rollouts draw their prompts at random: leave it out.",
        "dataloader_drop_last": "has no effect, since the last rollout is filled up with prompts: leave it out.",
    }

    value_learning_rate: float | None = option(None, "Learning rate of the value function; the policy's by default.")
    value: str | None = option(
        None,
        "Value function: a 'head' on the reference's hidden states, an 'adapter' on the policy's base, or a separate "
        "'model'; by default 'adapter' with PEFT, else 'model'.",
        choices=("head", "adapter", "model"),
    )
    num_generations: int = option(1, "Completions of each prompt in a rollout; an evaluation samples one.")
    ppo_epochs: int = option(4, "Passes over each rollout.")
    num_mini_batches: int = option(1, "Optimizer steps per pass over a rollout.")
    cliprange: float = option(0.2, "Clip range ε of the probability ratio.")
    cliprange_high: float | None = option(
        None, "Clip range above 1, by default cliprange; a larger one ('clip-higher') lets unlikely tokens gain more."
    )
    importance_sampling_level: str = option(
        "token",
        "Probability ratio of each 'token', of the 'sequence' (the geometric mean over tokens, as in GSPO), or of the "
        "'trajectory' (the product over tokens).",
        choices=("token", "sequence", "trajectory"),
    )
    loss_aggregation: str = option(
        "token",
        "Policy loss: mean over the mini-batch's 'token's; 'sequence': mean over completions of their means; "
        "'constant': sum over tokens / (completions × max_completion_length).",
        choices=("token", "sequence", "constant"),
    )
    cliprange_value: float = option(0.2, "Clip range of the value loss.")
    vf_coef: float = option(0.1, "Weight of the value loss.")
    entropy_coef: float = option(0.0, "Weight of the entropy bonus.")
    gamma: float = option(1.0, "Discount per token.")
    lam: float = option(0.95, "λ of the generalised advantage estimate.")
    whiten_advantages: bool | None = option(
        None,
        "Whiten advantages over all completion tokens of a rollout on all ranks; by default with 'gae' and "
        "'reinforce'.",
    )
    advantage_estimator: str = option(
        "gae",
        "'gae' with a critic. Without: 'reinforce', return minus mean return; 'rloo', minus the mean of the prompt's "
        "other completions; 'grpo', minus the prompt's mean, divided as scale_rewards says.",
        choices=("gae", "reinforce", *GROUPED),
    )
    scale_rewards: str = option(
        "group",
        "GRPO: divide by the deviation of the prompt's 'group' or of the 'batch', or not ('none', Dr. GRPO).",
        choices=("group", "batch", "none"),
    )
    bootstrap_truncated: bool = option(
        False, "If max_completion_length cuts a completion off, bootstrap with the value after its last token."
    )

    kl_coef: float = option(0.05, "β, weight of the KL; at the start, if β changes.")
    kl_in_loss: bool = option(
        False, "Put the KL into the loss of every token (k3), and not into the rewards (k1); their gradients differ."
    )
    use_bias_correction_kl: bool = option(
        True, "With kl_in_loss: weigh the KL by the probability ratio, which makes its gradient unbiased."
    )
    kl_control: str = option(
        "fixed",
        "How β changes: 'fixed', 'adaptive' to kl_target ('ziegler': by the classical rule, which overshoots), or "
        "'exponential' in the KL. With 'budget' it rises while the KL is above kl_budget, and the update that "
        "exceeded kl_budget is undone.",
        choices=("fixed", "adaptive", "ziegler", "exponential", "budget"),
    )
    kl_target: float = option(6.0, "Adaptive and ziegler: the KL to reach, sum over a completion's tokens, nats.")
    kl_horizon: int = option(10000, "Adaptive and ziegler: completions over which β may change by 20 to 30 %.")
    kl_budget: float | None = option(None, "Budget: maximum KL, sum over a completion's tokens, nats.")
    kl_rate: float = option(0.1, "Exponential: β = kl_coef·exp(kl_rate·KL). Budget: β rises by kl_rate per nat.")
    kl_coef_min: float = option(0.0, "Adaptive and exponential: minimum of β.")
    kl_coef_max: float = option(1.0, "Exponential and budget: maximum of β.")

    reward_normalization: str = option(
        "none",
        "Normalise scores by the mean and deviation of the 'batch', by 'running' ones, or not ('none').",
        choices=("none", "batch", "running"),
    )
    reward_clip: float | None = option(None, "Clip scores to ± this value, after normalisation.")

    on_fault: str = option(
        "stop",
        "If a loss, gradient or reward is not finite, the policy has collapsed, or the KL is too large: 'stop', or "
        "'skip' the optimizer step (all steps, if the rollout is at fault). Skipping does not change the policy, so a "
        "collapse or a large KL ends only if other samples are better.",
        choices=("stop", "skip"),
    )
    max_faults: int = option(5, "With 'skip': stop after this many skipped steps, or rollouts, in a row.")
    max_kl: float | None = option(
        None, "A rollout with a larger KL is a fault; with adaptive control 10 × kl_target by default."
    )
    min_entropy: float = option(
        1e-4,
        "A rollout is a fault (the policy has collapsed) if its mean entropy per token is lower than this, or if each "
        "completion is a single token. 0 switches both checks off, for tasks with answers of one token.",
    )

    def conflicts(self) -> list[tuple[bool, str]]:
        control, coef = self.kl_control, self.kl_coef
        best, estimator = self.metric_for_best_model, self.advantage_estimator
        steered = control in ("adaptive", "ziegler")
        stays = coef == 0 and (steered or control == "exponential")
        unmatched = (control == "budget") != (self.kl_budget is not None)
        too_low = steered and self.kl_limit <= self.kl_target
        floor, floored = self.kl_coef_min, control in ("adaptive", "exponential")
        too_high = control in ("exponential", "budget") and coef > self.kl_coef_max
        return [
            (
                estimator in GROUPED and self.num_generations < 2,
                f"advantage_estimator={estimator!r} compares completions of one prompt, and num_generations="
                f"{self.num_generations}: set it to 2 or more.",
            ),
            *whole_groups(self),
            (stays, f"kl_coef=0 would stay 0 with kl_control={control!r}: start above 0."),
            (unmatched, f"kl_control={control!r} and kl_budget={self.kl_budget} do not fit: set both or neither."),
            (too_high, f"kl_coef={coef} is above kl_coef_max={self.kl_coef_max}: raise one or lower the other."),
            (
                floor > 0 and not floored,
                f"kl_coef_min={floor} has no effect with kl_control={control!r}: leave it out.",
            ),
            (floor > coef, f"kl_coef_min={floor} is above kl_coef={coef}: lower it."),
            (too_low, f"max_kl={self.max_kl} must be above kl_target={self.kl_target}."),
            *self.sampling_conflicts(),
            (best in ("loss", "eval_loss"), f"metric_for_best_model: PPO measures no {best}; name one, as 'score'."),
            (self.accelerator_config.split_batches, "split_batches would split a rollout: leave it out."),
        ]

    @property
    def whitens(self) -> bool:
        """Whether advantages are whitened over tokens."""
        return self.advantage_estimator not in GROUPED if self.whiten_advantages is None else self.whiten_advantages

    @property
    def needs_reference(self) -> bool:
        """Whether a reference is kept. Without a critic and with β = 0 nothing but the KL in the log would need it."""
        return self.advantage_estimator not in GROUPED or self.kl_coef > 0 or bool(self.max_kl or self.kl_budget)

    @property
    def kl_limit(self) -> float | None:
        """KL above which a rollout is a fault."""
        steered = self.kl_control in ("adaptive", "ziegler")
        return 10 * self.kl_target if self.max_kl is None and steered else self.max_kl

    @property
    def steps_per_update(self) -> int:
        """Optimizer steps per rollout."""
        return self.ppo_epochs * self.num_mini_batches

    @property
    def local_rollout_size(self) -> int:
        """Completions per rollout and process."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.num_mini_batches

    @property
    def rollout_size(self) -> int:
        """Completions per rollout."""
        return self.local_rollout_size * self.world_size

    @property
    def local_prompts(self) -> int:
        """Prompts per rollout and process."""
        return self.local_rollout_size // self.num_generations


def whole_groups(args: PPOConfig) -> list[tuple[bool, str]]:
    """Return whether mini-batches would cut the completions of a prompt apart, and the sizes that do not.

    A micro-batch may hold a part of them, if all parts are in one mini-batch, which is then the whole rollout.
    """
    size, n, steps = args.per_device_train_batch_size, args.num_generations, args.gradient_accumulation_steps
    unit, name = (size * steps, " × gradient_accumulation_steps") if args.num_mini_batches == 1 else (size, "")
    near = " or ".join(str(k * n) for k in (unit // n, unit // n + 1) if k)
    message = (
        f"per_device_train_batch_size{name} is {unit}, and num_generations={n} does not divide it, so that the "
        f"completions of a prompt would part: make it {near}."
    )
    return [(unit % n != 0, message)]
