"""The configuration of the lifecycle models: that of Llama, and the kind of attention."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

_TASKS = ("", "ForCausalLM", "ForMaskedLM", "ForSequenceClassification", "ForQuestionAnswering")


@strict
class LifecycleConfig(LlamaConfig):
    """Llama's configuration with a choice of attention; all other options and their defaults are those of Llama.

    Args:
        attention: "causal" (a token attends to itself and to those before it), "prefix" (the first `prefix_lengths`
            tokens of a row attend to each other in both directions, the others are causal) or "bidirectional". With
            None the model chooses: bidirectional in LifecycleForMaskedLM, causal in the others.

    Raises:
        StrictDataclassFieldValidationError: `attention` is unknown.
    """

    model_type = "lifecycle"

    attention: Literal["causal", "prefix", "bidirectional"] | None = None

    @classmethod
    def from_llama(cls, config: LlamaConfig, attention: str | None = None) -> "LifecycleConfig":
        """Return the configuration with which the weights of a Llama with `config` load unchanged."""
        own = ("model_type", "architectures", "auto_map", "transformers_version")
        return cls(**{name: value for name, value in config.to_dict().items() if name not in own}, attention=attention)

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """Save as in transformers; if the model's code is saved too, name its class for every task."""
        if getattr(self, "auto_map", None):
            self.auto_map |= {f"AutoModel{task}": f"modeling_lifecycle.Lifecycle{task or 'Model'}" for task in _TASKS}
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
