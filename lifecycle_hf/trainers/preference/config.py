"""Options of preference optimisation."""

from dataclasses import dataclass

from transformers import TrainingArguments

from lifecycle_hf.trainers.base.options import PolicyConfig, option


@dataclass
class CompletionConfig(PolicyConfig):
    """Options of the trainers that learn from given completions, with TRL's names and defaults where TRL has them."""

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    model_init_kwargs: dict | str | None = option(
        None, "Keyword arguments of from_pretrained, used where the model is given by name."
    )
    max_length: int | None = option(
        1024, "Cut prompt and completion to this many tokens, at the end; None cuts nothing."
    )
    precompute_ref_log_probs: bool = option(
        False, "Compute the reference's log-probs once before training, then let go of the reference model."
    )
    precompute_ref_batch_size: int | None = option(
        None, "Rows per device while doing so; that of training or evaluation by default."
    )
    ref_log_probs_path: str | None = option(
        None, "Folder to keep them in; where they are there already they are read, if model and data are the same."
    )
    displacement_patience: int = option(
        100, "Warn once when chosen answers have lost likelihood for this many steps in a row; 0: never."
    )

    def conflicts(self) -> list[tuple[bool, str]]:
        return [
            (
                self.max_length is not None and self.max_length < 2,
                f"max_length={self.max_length} leaves no room for a prompt and a completion.",
            ),
            (
                bool(self.ref_log_probs_path) and not self.precompute_ref_log_probs,
                "ref_log_probs_path is set, but precompute_ref_log_probs is off: turn it on.",
            ),
        ]


@dataclass
class PreferenceConfig(CompletionConfig):
    """Options of [`PreferenceTrainer`]: DPO, IPO, ORPO and objectives of your own."""

    beta: float = option(
        0.1, "β of DPO, τ of IPO, λ of ORPO: how closely the policy is held to the reference or data."
    )
    label_smoothing: float = option(0.0, "DPO: probability ε that a preference is the wrong way round.")
    length_normalize: bool = option(True, "IPO: log-ratios per token, as its authors do; False sums them.")
    nll_on_prompt: bool = option(False, "ORPO: the NLL covers the prompt too, as in TRL.")


@dataclass
class KTOConfig(CompletionConfig):
    """Options of [`KTOTrainer`]."""

    beta: float = option(0.1, "β, how fast the value of an answer saturates away from the reference point.")
    desirable_weight: float = option(1.0, "λ_D, weight of desirable answers.")
    undesirable_weight: float = option(1.0, "λ_U, weight of the others; above λ_D it is loss aversion.")
    reference_point: str = option(
        "mismatched",
        "z₀: the KL estimated on answers under other prompts ('mismatched'), or the 'running_mean' of the log-ratios "
        "of earlier steps, which costs no extra forward.",
        choices=("mismatched", "running_mean"),
    )
