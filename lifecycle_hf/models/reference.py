"""The model that a policy is compared with."""

import copy

from transformers import PreTrainedModel


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `model` as it is, in eval mode and without gradients.

    Raises:
        ValueError: if ZeRO-3 has sharded the model, of which each process could copy its share alone.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            "Under DeepSpeed ZeRO-3 a model that is loaded already can't be copied as reference: pass the model by "
            "its name or path, or pass a ref_model."
        )
    return copy.deepcopy(model).eval().requires_grad_(False)
