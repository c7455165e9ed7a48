"""Options of [`PPOTrainer`]."""

from dataclasses import dataclass

from lifecycle_hf.trainers.base.options import PolicyConfig, option


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
    value: str | None = option(
        None,
        "Value function: 'head' on the reference's hidden states, 'adapter' on the policy's base, or a 'model' of its "
        "own; by default an adapter with PEFT, else a model.",
        choices=("head", "adapter", "model"),
    )
    max_prompt_length: int | None = option(512, "Drop prompts with more tokens than this; None keeps all.")
    max_completion_length: int = option(256, "Most tokens a completion may have.")
    temperature: float = option(1.0, "Sampling temperature, applied to old, new and reference log-probs alike.")
    stop_tokens: list[str] | None = option(
        None, "Tokens that end a completion; by default the EOS tokens of the tokenizer and of the model."
    )
    generation_batch_size: int | None = option(None, "Prompts decoded together; a whole rollout by default.")
    merge_adapter: bool | None = option(
        None,
        "Decode with the adapter merged into a copy of its layers' weights: faster; by default where these are fp32, "
        "as bf16 would round small changes away.",
    )

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
        choices=("gae", "reinforce"),
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
        "How β moves: 'fixed', 'adaptive' to kl_target, 'exponential' in the KL; under a 'budget' it rises where the "
        "KL lies above kl_budget, and the update that led there is taken back.",
        choices=("fixed", "adaptive", "exponential", "budget"),
    )
    kl_target: float = option(6.0, "Adaptive: KL to hold, sum over a completion's tokens, nats.")
    kl_horizon: int = option(10000, "Adaptive: completions over which β may change by a fifth.")
    kl_budget: float | None = option(None, "Budget: most KL of the policy, sum over a completion's tokens, nats.")
    kl_rate: float = option(
        0.1, "Exponential: β = kl_coef·exp(kl_rate·KL); budget: β rises by kl_rate per nat; both within kl_coef_max."
    )
    kl_coef_max: float = option(1.0, "Exponential and budget: most that β becomes.")

    reward_weights: list[float] | None = option(None, "Weight of each reward function; 1 each by default.")
    reward_normalization: str = option(
        "none",
        "Scale scores by their mean and deviation in the 'batch', by 'running' ones, or 'none'.",
        choices=("none", "batch", "running"),
    )
    reward_clip: float | None = option(None, "Clip scores to ± this, after normalisation.")

    log_completions: bool = option(True, "Print a table of sample completions every logging_steps.")
    num_completions_to_print: int = option(4, "Rows of that table.")

    on_fault: str = option(
        "stop",
        "At a loss, gradient or reward that is not finite, a collapsed policy, or too much KL: 'stop', or 'skip' the "
        "optimizer step (of a faulty rollout, all its steps). Skipping leaves the policy where it is, so that a "
        "collapse, or a KL out of hand, ends only where other samples are better.",
        choices=("stop", "skip"),
    )
    max_faults: int = option(5, "Under 'skip': stop when this many steps in a row, or rollouts, were skipped.")
    max_kl: float | None = option(
        None, "A rollout of more KL than this is a fault; ten times kl_target by default under adaptive control."
    )
    min_entropy: float = option(
        1e-4,
        "A rollout of less mean entropy per token than this, or whose completions all are one token, is a fault: the "
        "policy has collapsed; 0 switches both off, as answers of one token need it.",
    )
    reward_timeout: float | None = option(
        None,
        "Seconds that a reward callable may take for a rollout; None: any. A call that takes longer may still run "
        "when the callable is called again, which it must bear.",
    )
    reward_retries: int = option(0, "How often a reward callable that raised or timed out is called again.")

    use_vllm: bool = option(
        False, "Sample with a vLLM server, which needs a GPU of its own; docs/scaling.md has its command."
    )
    vllm_server_base_url: str = option("http://localhost:8000", "Where that server listens.")
    vllm_server_timeout: float = option(240.0, "Seconds to wait until that server is up.")

    def conflicts(self) -> list[tuple[bool, str]]:
        critic, adaptive = self.advantage_estimator == "gae", self.kl_control == "adaptive"
        return [
            (
                self.bootstrap_truncated and not critic,
                "bootstrap_truncated needs a value function: advantage_estimator='gae', or turn it off.",
            ),
            (
                self.value is not None and not critic,
                f"value={self.value!r} names a value function, and advantage_estimator='reinforce' has none: leave "
                "one of them out.",
            ),
            (
                self.value_learning_rate is not None and not critic,
                f"value_learning_rate={self.value_learning_rate} is set, and advantage_estimator='reinforce' has no "
                "value function: leave one of them out.",
            ),
            (
                self.kl_control in ("adaptive", "exponential") and not self.kl_coef > 0,
                f"kl_coef={self.kl_coef} would stay 0 under kl_control={self.kl_control!r}: start above 0.",
            ),
            (
                (self.kl_control == "budget") != (self.kl_budget is not None),
                f"kl_control={self.kl_control!r} and kl_budget={self.kl_budget} don't match: set both or neither.",
            ),
            (
                self.kl_control in ("exponential", "budget") and self.kl_coef > self.kl_coef_max,
                f"kl_coef={self.kl_coef} lies above kl_coef_max={self.kl_coef_max}: raise the one or lower the other.",
            ),
            (
                adaptive and self.max_kl is not None and self.max_kl <= self.kl_target,
                f"max_kl={self.max_kl} must lie above kl_target={self.kl_target}, which the control steers to.",
            ),
            (
                self.use_vllm and self.merge_adapter is False,
                "use_vllm takes merged weights, so merge_adapter=False can't be had: leave it out.",
            ),
            (
                self.use_vllm and self.generation_batch_size is not None,
                f"use_vllm hands a whole rollout to the server, so generation_batch_size={self.generation_batch_size} "
                "would do nothing: leave it out.",
            ),
            (
                self.auto_find_batch_size,
                "auto_find_batch_size would change the size of rollouts in mid-run: set per_device_train_batch_size.",
            ),
            (
                self.neftune_noise_alpha is not None,
                "neftune_noise_alpha would make the ratio differ from 1 before anything is learnt: leave it out.",
            ),
            (
                self.label_smoothing_factor != 0,
                f"label_smoothing_factor={self.label_smoothing_factor} has no labels to smooth in PPO: leave it 0.",
            ),
        ]

    @property
    def kl_limit(self) -> float | None:
        """KL from which on a rollout is a fault."""
        return 10 * self.kl_target if self.max_kl is None and self.kl_control == "adaptive" else self.max_kl

    @property
    def steps_per_update(self) -> int:
        """Optimizer steps per rollout."""
        return self.ppo_epochs * self.num_mini_batches

    @property
    def local_rollout_size(self) -> int:
        """Prompts per rollout and process."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.num_mini_batches
