"""Search for the most probable completion, greedily or with beams, in decoders and in encoder-decoders."""

import copy

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel

from lifecycle_hf.completions.sampling import decoding, until_stop
from lifecycle_hf.data.collators import length_mask, pad_sequences


@torch.no_grad()
def beam_search(
    model: PreTrainedModel | PeftModel,
    prompt_ids: list[list[int]],
    *,
    max_new_tokens: int,
    stop_token_ids: list[int],
    pad_token_id: int,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    synced_gpus: bool | None = None,
) -> list[list[int]]:
    """Return for each prompt the completion with the highest Σ log p / length^length_penalty that the search finds.

    It is transformers' generation. One beam is greedy decoding. A decoder's own generation config is not used; that of
    an encoder-decoder is, since it says which tokens a text begins with, but for the options given here.

    Args:
        model: a causal LM or an encoder-decoder, or an adapter of one.
        prompt_ids: token lists, decoded as one batch.
        max_new_tokens: most tokens of a completion.
        stop_token_ids: tokens that end a completion, which is cut behind the first.
        length_penalty: of beams; above 0 it prefers long completions.
        synced_gpus: keep all processes in step, which sharded weights need.

    Returns:
        token lists with their stop tokens, without the token that starts the text of a decoder behind an encoder.
    """
    virtual = isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    seq2seq = base.config.is_encoder_decoder
    config = copy.deepcopy(base.generation_config) if seq2seq else GenerationConfig()
    beams = {"length_penalty": length_penalty} if num_beams > 1 else {"length_penalty": 1.0, "early_stopping": False}
    limits = {"max_length": None, "max_new_tokens": max_new_tokens, "eos_token_id": list(stop_token_ids)}
    config.update(**limits, **beams, num_beams=num_beams, do_sample=False, pad_token_id=pad_token_id)
    side, device = "right" if seq2seq else "left", next(base.parameters()).device
    ids = pad_sequences(prompt_ids, pad_token_id, side=side)
    mask = length_mask(torch.tensor([len(row) for row in prompt_ids]), ids.shape[1]).long()
    given = {"input_ids": ids.to(device), "attention_mask": (mask if seq2seq else mask.flip(1)).to(device)}
    with decoding(base, config):
        output = (model if virtual else base).generate(**given, synced_gpus=synced_gpus)
    start = 1 if seq2seq else ids.shape[1]
    return [until_stop(row, stop_token_ids) for row in output[:, start:].tolist()]
