"""Options of preference optimisation."""

from dataclasses import dataclass

from transformers import TrainingArguments

from lifecycle_hf.trainers.base.options import PolicyConfig, option


@dataclass
class CompletionConfig(PolicyConfig):
    """Hold the options of the trainers on given completions, with TRL's names and defaults if TRL has the option."""

    refused = PolicyConfig.refused | {
        "neftune_noise_alpha": "would add noise to the log-ratios: leave it out; SFT takes it.",
    }
    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    model_init_kwargs: dict | str | None = option(None, "Options of from_pretrained if the model is given by name.")
    max_length: int | None = option(1024, "Cut prompt and completion together to this many tokens; None: no cut.")
    precompute_ref_log_probs: bool = option(
        False, "Compute the reference's log-probs once before training, and remove the reference from memory."
    )
    precompute_ref_batch_size: int | None = option(
        None, "Rows per device in that computation; that of training or evaluation by default."
    )
    ref_log_probs_path: str | None = option(
        None, "Folder for these log-probs; a file that is there already is read if it is of the same model and data."
    )
    displacement_patience: int = option(
        100, "Warn once when chosen answers have been less likely than at the start for this many steps; 0: never."
    )

    def conflicts(self) -> list[tuple[bool, str]]:
        short = f"max_length={self.max_length} leaves no room for a prompt and a completion: raise it."
        idle = "ref_log_probs_path is set, but precompute_ref_log_probs is off: turn it on."
        return [
            (self.max_length is not None and self.max_length < 2, short),
            (bool(self.ref_log_probs_path) and not self.precompute_ref_log_probs, idle),
        ]


@dataclass
class PreferenceConfig(CompletionConfig):
    """Hold the options of [`PreferenceTrainer`]: DPO, IPO, ORPO and objectives that you add."""

    refused = CompletionConfig.refused | {
        "label_smoothing_factor": "has no effect, since it is for labels of tokens: DPO's own is label_smoothing.",
    }

    beta: float = option(0.1, "β of DPO, τ of IPO (both: strength of the pull to the reference), λ of ORPO.")
    label_smoothing: float = option(0.0, "DPO: probability ε that the two answers of a pair are swapped.")
    length_normalize: bool = option(True, "IPO: take log-ratios per token, as its authors do; False: sum them.")
    nll_on_prompt: bool = option(False, "ORPO: take the NLL on the prompt too, as TRL does.")


@dataclass
class KTOConfig(CompletionConfig):
    """Hold the options of [`KTOTrainer`]."""

    beta: float = option(0.1, "β, how fast the value of an answer saturates with its distance from z₀.")
    desirable_weight: float = option(1.0, "λ_D, weight of desirable answers.")
    undesirable_weight: float = option(1.0, "λ_U, weight of undesirable answers; λ_U > λ_D is loss aversion.")
    reference_point: str = option(
        "mismatched",
        "z₀: the KL, estimated on answers under other prompts ('mismatched'), or the 'running_mean' of the log-ratios "
        "of earlier steps, which needs no extra forward pass.",
        choices=("mismatched", "running_mean"),
    )
