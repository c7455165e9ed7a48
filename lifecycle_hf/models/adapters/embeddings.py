"""Read and merge models whose adapter is on the embeddings or on the head."""

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel


def embedding_rows(model: PreTrainedModel | PeftModel) -> int:
    """Return the number of rows of a model's input embeddings, with or without an adapter on them."""
    layer = model.get_input_embeddings()
    while not hasattr(layer, "num_embeddings"):
        layer = getattr(layer, "token_adapter", layer).get_base_layer()  # PEFT wraps trainable tokens twice
    return layer.num_embeddings


def merge_and_untie(model: PeftModel) -> PreTrainedModel:
    """Merge the adapter and return the base; if it changes embeddings or head alone, they are no longer tied.

    PEFT's `merge_and_unload` adds the product of one of two tied layers to both.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and any(isinstance(layer, BaseTunerLayer) for layer in (embeddings, head)):
        head = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    merged = model.merge_and_unload()
    head = merged.get_output_embeddings()
    if head is not None and head.weight is not merged.get_input_embeddings().weight:
        merged.config.get_text_config().tie_word_embeddings = merged.config.tie_word_embeddings = False
    return merged
