"""Tell what the PEFT method of a model can't do: merging, gradient checkpointing, packed rows."""

from peft import PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer


def can_merge(model: PeftModel) -> bool:
    """Return whether the adapters of a model can be added to the weights of its base.

    Those that are not linear (bottleneck adapters) or that change no layer (prompt learning) can't.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return bool(layers) and all(type(layer).merge is not BaseTunerLayer.merge for layer in layers)


def check_virtual_tokens(model, *, checkpointing: bool, packed: bool) -> None:
    """Check that the virtual tokens of prompt learning, if `model` has any, would reach every row of the run.

    Args:
        checkpointing: whether gradient checkpointing is on. It drops the cache in which prefix tuning puts its tokens.
        packed: whether a row holds several texts. PEFT then ignores their positions, and they would see each other.

    Raises:
        ValueError: they would not.
    """
    if not isinstance(model, PeftModel) or not model.active_peft_config.is_prompt_learning:
        return
    kind = model.active_peft_config.peft_type
    if checkpointing and kind == PeftType.PREFIX_TUNING:
        raise ValueError(
            f"{kind.value} does not work with gradient checkpointing, which drops the cache that holds its virtual "
            "tokens: set activation_checkpointing=False (TRL's default is True), or train LoRA."
        )
    if packed:
        raise ValueError(
            f"{kind.value} does not work with packed rows, whose texts would see each other: set packing=False and "
            "padding_free=False, or train LoRA."
        )
