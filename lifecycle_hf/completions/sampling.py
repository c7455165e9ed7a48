"""Sampling of completions with transformers' generation or a vLLM server.

Several completions of a prompt share its prefill: the prompt runs through the model once, and its cache is repeated.
"""

import warnings
from contextlib import contextmanager
from functools import partial
from weakref import WeakKeyDictionary

import torch
from accelerate.utils import broadcast_object_list, gather_object
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from lifecycle_hf.completions.captured import can_be_captured, decode_captured
from lifecycle_hf.data.collators import length_mask, pad_sequences

COMPACT_FROM = 1 / 8
"""Share of the rows of a batch that must have finished before those rows are dropped."""
_shares_prompts: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def stop_token_ids(model: PreTrainedModel, tokenizer, stop_tokens: list[str] | None = None) -> list[int]:
    """Return the ids of the tokens that end a completion: `stop_tokens`, or the EOS tokens of tokenizer and model.

    Raises:
        ValueError: a stop token is not one token of the vocabulary, or there is no EOS token.
    """
    if stop_tokens:
        ids = [tokenizer.convert_tokens_to_ids(token) for token in stop_tokens]
        for token, i in zip(stop_tokens, ids, strict=True):
            if i is None or (i == tokenizer.unk_token_id and token != tokenizer.unk_token):
                raise ValueError(f"stop_tokens: {token!r} is not a token of the vocabulary: give one that is.")
        return sorted(set(ids))
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    if not ids:
        raise ValueError(
            "The tokenizer has no EOS token and the model's generation config has none, so no completion would end: "
            "set tokenizer.eos_token, or give stop_tokens."
        )
    return sorted(ids)


def shares_prompts(model: PreTrainedModel) -> bool:
    """Return whether the state after a prompt can be repeated for several completions; the first call probes it.

    Recurrent and hybrid models keep a state of another kind, and a warning says that each completion reads the prompt.
    """
    if model not in _shares_prompts:
        tokens = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
        _shares_prompts[model] = _can_drop_rows(dict(model(tokens, use_cache=True, return_dict=True).items()))
        if not _shares_prompts[model]:
            warnings.warn(
                f"The state of {type(model).__name__} after a prompt can't be repeated: the prompt is read again for "
                "each of its completions, which is slower.",
                stacklevel=3,
            )
    return _shares_prompts[model]


def _decode(
    model, input_ids, logits_processor, stopping_criteria, generation_config, repeats: int = 1, **inputs
) -> torch.Tensor:
    """Run the decoding loop of transformers' sampling, but drop finished rows from the batch.

    When an eighth of the current rows have finished, they are removed from the cache.

    Args:
        repeats: completions N of each of the B prompts, which are rows in a row.

    Returns:
        [B·N, L], padded.
    """
    size = len(input_ids) * repeats
    rows, finished = torch.arange(size), torch.zeros(size, dtype=torch.bool)
    results, ids, first = [None] * size, input_ids, True
    while len(rows):
        step = {"next_sequence_length": 1 if inputs["use_cache"] and not first else None, "is_first_iteration": first}
        prepared = model.prepare_inputs_for_generation(ids, **step, **inputs)
        outputs = model(**prepared, return_dict=True)
        inputs, logits = model._update_model_kwargs_for_generation(outputs, inputs), outputs.logits[:, -1].float()
        if first and repeats > 1:
            each = torch.arange(len(ids), device=ids.device).repeat_interleave(repeats)
            inputs, ids, logits = _select_rows(inputs, each, len(ids)), ids[each], logits[each]
        scores, first = logits_processor(ids, logits), False
        if generation_config.do_sample:
            tokens = torch.multinomial(scores.softmax(-1), 1)
        else:
            tokens = scores.argmax(-1, keepdim=True)
        ids = torch.cat([ids, tokens], 1)
        finished = finished | stopping_criteria(ids, None).cpu()
        if finished.all() or (finished.float().mean() >= COMPACT_FROM and _can_drop_rows(inputs)):
            for i in finished.nonzero()[:, 0].tolist():
                results[rows[i]] = ids[i]
            rows, kept = rows[~finished], (~finished).nonzero()[:, 0].to(ids.device)
            inputs = _select_rows(inputs, kept, len(ids))
            ids, finished = ids[kept], finished[~finished]
    return pad_sequences([row.tolist() for row in results], generation_config.pad_token_id).to(ids.device)


def _can_drop_rows(inputs: dict) -> bool:
    """Return whether rows can be removed from the cache of a model; recurrent states don't allow it."""
    cache = inputs.get("past_key_values")
    if cache is None:
        return not any(isinstance(value, Cache) or name == "cache_params" for name, value in inputs.items())
    return isinstance(cache, DynamicCache) and all(
        isinstance(layer, DynamicLayer) and not isinstance(layer, LinearAttentionCacheLayerMixin)
        for layer in cache.layers
    )


def _select_rows(inputs: dict, kept: torch.Tensor, rows: int) -> dict:
    """Return the inputs of the next decoding step for the rows `kept` out of `rows`; a row may be there repeatedly."""
    if len(kept) and inputs.get("past_key_values") is not None:
        inputs["past_key_values"].batch_select_indices(kept)
    of_rows = {k for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.ndim and len(v) == rows}
    return inputs | {name: inputs[name][kept] for name in of_rows}


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompt_ids: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    stop_token_ids: list[int],
    pad_token_id: int,
    num_generations: int = 1,
    generator_seed: int | None = None,
    batch_size: int | None = None,
    captured: bool | None = None,
) -> list[list[int]]:
    """Sample completions of each prompt from softmax(logits / temperature), untruncated (top_k=0, top_p=1).

    The model's own generation config is not used. A completion ends with its stop token if it has one; its length is
    determined by that token and not by padding.

    Args:
        model: causal LM or PEFT model over one.
        prompt_ids: token lists.
        temperature: above 0, or 0 for greedy decoding.
        num_generations: completions N of each prompt, which share its prefill. They are those that N copies of the
            prompt in a row would get from the same random numbers.
        generator_seed: seed of this call, which then leaves torch's random state unchanged.
        batch_size: number of prompts decoded together; by default all.
        captured: decode in steps of fixed shapes over a static cache, which CUDA replays as a graph; by default where
            there is CUDA and the model can.

    Returns:
        P·N token lists, the N completions of a prompt in a row.

    Raises:
        ValueError: `captured` is set, and the model can't.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    device = next(model.parameters()).device
    if captured is None:
        captured = device.type == "cuda" and can_be_captured(model)
    elif captured and not can_be_captured(model):
        raise ValueError(f"captured=True: {type(model).__name__} does not decode in steps of fixed shapes by SDPA.")
    options = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
    options |= {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0, "pad_token_id": pad_token_id}
    config, completions = GenerationConfig(**options, eos_token_id=list(stop_token_ids)), []
    cuda, size = [device.index or 0] if device.type == "cuda" else [], batch_size or len(prompt_ids)
    if num_generations > 1 and not shares_prompts(model):
        prompt_ids = [row for row in prompt_ids for _ in range(num_generations)]
        size, num_generations = size * num_generations, 1
    decode = partial(decode_captured if captured else _decode, repeats=num_generations)
    with decoding(model, config), torch.random.fork_rng(cuda, enabled=generator_seed is not None):
        if generator_seed is not None:
            torch.manual_seed(generator_seed)
        for start in range(0, len(prompt_ids), size):
            rows = prompt_ids[start : start + size]
            ids = pad_sequences(rows, pad_token_id, side="left").to(device)
            mask = length_mask(torch.tensor([len(row) for row in rows]), ids.shape[1]).flip(1).to(device)
            output = model.generate(input_ids=ids, attention_mask=mask.long(), custom_generate=decode)
            completions += [until_stop(row, stop_token_ids) for row in output[:, ids.shape[1] :].tolist()]
    return completions


@contextmanager
def decoding(model: PreTrainedModel, config: GenerationConfig):
    """Put the model in eval mode with the generation config `config`.

    `generate` fills the unset options of a config that it is given from the model's own, so the own one is replaced.
    """
    own, training = model.generation_config, model.training
    model.generation_config = config
    model.eval()
    try:
        yield
    finally:
        model.generation_config = own
        model.train(training)


def until_stop(tokens: list[int], stop_token_ids: list[int]) -> list[int]:
    """Return the tokens up to the first stop token, which stays; all tokens if there is none."""
    end = next((i + 1 for i, token in enumerate(tokens) if token in stop_token_ids), len(tokens))
    return tokens[:end]


class VLLMSampler:
    """Sample from a vLLM server through TRL's client, with the arguments of [`generate`] and the policy's weights.

    Only the main process connects to the server, on behalf of all processes.

    Args:
        base_url: URL of `vllm serve`.
        timeout: seconds to wait for the server to start.
    """

    def __init__(self, accelerator, base_url: str, timeout: float):
        self.accelerator, self.client = accelerator, None
        if accelerator.is_main_process:
            from trl.generation.vllm_client import VLLMClient

            self.client = VLLMClient(base_url=base_url, connection_timeout=timeout)
            self.client.init_communicator(device=accelerator.device)

    @torch.no_grad()
    def __call__(
        self,
        weights: dict[str, torch.Tensor],
        prompt_ids: list[list[int]],
        *,
        max_new_tokens: int,
        temperature: float,
        stop_token_ids: list[int],
        num_generations: int = 1,
        generator_seed: int | None = None,
    ) -> list[list[int]]:
        """Return `num_generations` completions in a row for each prompt of this process.

        Args:
            weights: the policy's weights under the names of the plain model, tied weights once.
            generator_seed: seed of the server's sampling; by default the server's own.
        """
        rows, found = gather_object([prompt_ids]), [None]
        if self.client is not None:
            kinds = [(name, str(w.dtype).removeprefix("torch."), list(w.shape)) for name, w in weights.items()]
            self.client.update_named_params(kinds, ((name, w.data) for name, w in weights.items()))
            self.client.reset_prefix_cache()
            extra = {"stop_token_ids": list(stop_token_ids)}
            extra |= {} if generator_seed is None else {"seed": generator_seed}
            prompts = [row for part in rows for row in part]
            options = {"max_tokens": max_new_tokens, "temperature": temperature, "logprobs": None}
            options["n"] = num_generations
            found = [self.client.generate(prompts, **options, generation_kwargs=extra)["completion_ids"]]
        completions = iter(broadcast_object_list(found)[0])
        counts = [len(part) * num_generations for part in rows]
        parts = [[until_stop(next(completions), stop_token_ids) for _ in range(count)] for count in counts]
        return parts[self.accelerator.process_index]
