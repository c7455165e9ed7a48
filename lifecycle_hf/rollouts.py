"""Prompts in, completions out, by transformers' generation."""

from contextlib import contextmanager

import torch
from transformers import GenerationConfig, PreTrainedModel

from lifecycle_hf.data.collators import length_mask, pad_sequences


@contextmanager
def _only(model: PreTrainedModel, config: GenerationConfig):
    """Puts `config` in the place of the model's own: `generate` fills what a given config leaves unset from it."""
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


def stop_token_ids(model: PreTrainedModel, tokenizer, stop_tokens: list[str] | None = None) -> list[int]:
    """The tokens that end a completion: `stop_tokens` where given, else the tokenizer's and the model's EOS tokens.

    Raises:
        ValueError: if a stop token is not one token of the vocabulary, or there is none at all.
    """
    if stop_tokens:
        ids = [tokenizer.convert_tokens_to_ids(token) for token in stop_tokens]
        for token, i in zip(stop_tokens, ids, strict=True):
            if i is None or (i == tokenizer.unk_token_id and token != tokenizer.unk_token):
                raise ValueError(f"stop_tokens: {token!r} is not a token of the tokenizer's vocabulary.")
        return sorted(set(ids))
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    if not ids:
        raise ValueError(
            "The tokenizer has no EOS token and the model's generation config names none, so no completion could end: "
            "set tokenizer.eos_token, or name `stop_tokens`."
        )
    return sorted(ids)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompt_ids: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    stop_token_ids: list[int],
    pad_token_id: int,
    generator_seed: int | None = None,
    batch_size: int | None = None,
) -> list[list[int]]:
    """Samples one completion for each prompt from softmax(logits / temperature), untruncated (top_k=0, top_p=1).

    The model's own generation config plays no part. A completion ends with its stop token where it produced one;
    lengths are found by that token, never by padding.

    Args:
        model: causal LM or PEFT model over one.
        prompt_ids: token lists.
        temperature: above 0, or 0 for greedy decoding.
        generator_seed: seeds a generator of this call's own and leaves torch's as it was.
        batch_size: prompts decoded together; all by default.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    device = next(model.parameters()).device
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        **({"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}),
        eos_token_id=list(stop_token_ids),
        pad_token_id=pad_token_id,
    )
    training = model.training
    model.eval()
    completions = []
    cuda = [device.index or 0] if device.type == "cuda" else []
    with _only(model, config), torch.random.fork_rng(cuda, enabled=generator_seed is not None):
        if generator_seed is not None:
            torch.manual_seed(generator_seed)
        size = batch_size or len(prompt_ids)
        for start in range(0, len(prompt_ids), size):
            rows = prompt_ids[start : start + size]
            ids = pad_sequences(rows, pad_token_id, side="left").to(device)
            mask = length_mask(torch.tensor([len(row) for row in rows]), ids.shape[1]).flip(1).to(device)
            output = model.generate(input_ids=ids, attention_mask=mask.long())
            completions += [_until_stop(row, stop_token_ids) for row in output[:, ids.shape[1] :].tolist()]
    model.train(training)
    return completions


def _until_stop(tokens: list[int], stop_token_ids: list[int]) -> list[int]:
    end = next((i + 1 for i, token in enumerate(tokens) if token in stop_token_ids), len(tokens))
    return tokens[:end]
