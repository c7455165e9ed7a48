"""Decode over a static cache in steps of fixed shapes, which CUDA captures as one graph and replays.

A step of a small model is dozens of kernels that take less time than it takes the host to launch them. A captured step
is launched as a whole. Nothing in it is read by the host: every [`CHECK_EVERY`] steps the loop looks which rows have
ended, and when half of them have, it goes on with the rest of the rows and captures a step of the smaller batch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

from lifecycle_hf.data.collators import pad_sequences
from lifecycle_hf.models.packed_attention import PREFIX

CHECK_EVERY = 16
"""Steps between two looks at which rows have ended."""
COMPACT_FROM = 1 / 2
"""Share of the rows that must have ended before those rows are dropped."""
WARM_UP = 2
"""Steps that run before a step is captured, so that everything that is made at a first call is there."""


def can_be_captured(model: PreTrainedModel) -> bool:
    """Return whether the model decodes in steps of fixed shapes: full attention in all layers, causal, by SDPA."""
    config = model.config.get_text_config()
    implementation = (config._attn_implementation or "").removeprefix(PREFIX)
    if not getattr(model, "_can_compile_fullgraph", False) or implementation != "sdpa":
        return False
    if getattr(config, "attention", "causal") != "causal" or config.is_encoder_decoder:
        return False
    return all(type(layer) is StaticLayer for layer in StaticCache(config, max_cache_len=8).layers)


@dataclass(eq=False)
class DecodingBatch:
    """Hold the rows that are decoded together; each step changes these tensors in place and never their shapes.

    Attributes:
        cache: keys and values of the prompt and of the tokens so far, with room for all new tokens.
        tokens: [B, 1], last token of each row, which is not in the cache yet.
        positions: [B, 1], its position.
        mask: [B, 1, 1, M], true at the places of the cache that the next token sees.
        place: [1], place in the cache of the last tokens.
        written: [1], number of new tokens.
        ended: [B], whether the row has its stop token.
        output: [B, max_new_tokens].
    """

    cache: Cache
    tokens: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    place: torch.Tensor
    written: torch.Tensor
    ended: torch.Tensor
    output: torch.Tensor

    @property
    def buffers(self) -> list[torch.Tensor]:
        """All tensors that a step reads or changes, besides the weights."""
        layers = [x for layer in self.cache.layers for x in (layer.keys, layer.values, layer.cumulative_length)]
        return [x for x in vars(self).values() if isinstance(x, torch.Tensor)] + layers

    def rows(self, kept: torch.Tensor) -> "DecodingBatch":
        """Return the rows `kept` as a batch of their own."""
        cache = static_cache(self.cache, self.cache.layers[0].max_cache_len, kept)
        parts = {name: x for name, x in vars(self).items() if isinstance(x, torch.Tensor)}
        shared = ("place", "written")
        return DecodingBatch(cache, **{name: x.clone() if name in shared else x[kept] for name, x in parts.items()})


def static_cache(cache: Cache, length: int, rows: torch.Tensor | None = None) -> Cache:
    """Return the keys and values of another cache, of the given rows, in a static cache for `length` tokens."""
    layers = []
    for layer in cache.layers:
        keys, values = (x if rows is None else x[rows] for x in (layer.keys, layer.values))
        layers.append(StaticLayer(length))
        layers[-1].lazy_initialization(keys, values)
        layers[-1].keys[:, :, : keys.shape[2]], layers[-1].values[:, :, : keys.shape[2]] = keys, values
        layers[-1].cumulative_length.fill_(layer.get_seq_length())
    return Cache(layers=layers)


class DecodingStep:
    """Decode one token of every row: `step()` is the same on every device, and [`run`] replays it on CUDA.

    Args:
        choose: function from logits [B, V] to tokens [B, 1].
        stops: [S], stop tokens.
        pad: token of rows that have ended.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batch: DecodingBatch,
        choose: Callable[[torch.Tensor], torch.Tensor],
        stops: torch.Tensor,
        pad: int,
    ):
        self.model, self.batch, self.choose, self.stops, self.pad = model, batch, choose, stops, pad
        self.graph, self.runs = None, 0

    def step(self) -> None:
        batch = self.batch
        batch.mask.index_fill_(3, batch.place, True)
        inputs = {"attention_mask": batch.mask, "position_ids": batch.positions, "past_key_values": batch.cache}
        logits = self.model(batch.tokens, **inputs, use_cache=True).logits[:, -1].float()
        take(batch, self.choose(logits), self.stops, self.pad)
        batch.positions.add_(1)
        batch.place.add_(1)

    def run(self) -> None:
        """Make a step: at first as it is, then, on CUDA, as a captured graph."""
        self.runs += 1
        if self.batch.tokens.device.type != "cuda" or self.runs <= WARM_UP:
            self.step()
            return
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # which records the step and does not run it
                self.step()
        self.graph.replay()


def take(batch: DecodingBatch, chosen: torch.Tensor, stops: torch.Tensor, pad: int) -> None:
    """Write the next tokens [B, 1] of all rows that have not ended."""
    chosen = torch.where(batch.ended[:, None], pad, chosen)
    batch.output.index_copy_(1, batch.written, chosen)
    batch.ended.logical_or_((chosen == stops).any(1))
    batch.tokens.copy_(chosen)
    batch.written.add_(1)


def decode_captured(
    model, input_ids, logits_processor, stopping_criteria, generation_config, repeats: int = 1, **inputs
) -> torch.Tensor:
    """Run the decoding loop of transformers' sampling in captured steps.

    Args:
        logits_processor: it must not read the tokens before, as that of a temperature does not.
        repeats: completions N of each of the B prompts, which are rows in a row.

    Returns:
        [B·N, L + T], padded.
    """
    device, room, pad = input_ids.device, generation_config.max_new_tokens, generation_config.pad_token_id
    stops = torch.as_tensor(generation_config.eos_token_id, device=device)

    def choose(logits):
        scores = logits_processor(None, logits)
        return torch.multinomial(scores.softmax(-1), 1) if generation_config.do_sample else scores.argmax(-1, True)

    mask = inputs.get("attention_mask")  # `generate` leaves out a mask without padding
    batch, logits = prefill(model, input_ids, torch.ones_like(input_ids) if mask is None else mask, room, repeats)
    input_ids = input_ids.repeat_interleave(repeats, 0)
    rows, results = torch.arange(len(input_ids)), [None] * len(input_ids)
    take(batch, choose(logits), stops, pad)
    stepper, steps = DecodingStep(model, batch, choose, stops, pad), 1
    while len(rows):
        ended = batch.ended.cpu() | torch.tensor(steps >= room)
        if ended.all() or ended.float().mean() >= COMPACT_FROM:
            output = batch.output.cpu()
            for i in ended.nonzero()[:, 0].tolist():
                results[rows[i]] = output[i, :steps]
            rows, kept = rows[~ended], (~ended).nonzero()[:, 0].to(device)
            if len(rows):
                batch = batch.rows(kept)
                stepper = DecodingStep(model, batch, choose, stops, pad)
        for _ in range(min(CHECK_EVERY, room - steps) if len(rows) else 0):
            stepper.run()
            steps += 1
    output = pad_sequences([row.tolist() for row in results], pad).to(device)
    return torch.cat([input_ids, output], 1)


def prefill(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, room: int, repeats: int = 1
) -> tuple[DecodingBatch, torch.Tensor]:
    """Return the batch after the prompts [B, L], which are padded on the left, and the logits [B·N, V] after them."""
    (size, length), device, cache = input_ids.shape, input_ids.device, DynamicCache(config=model.config)
    positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
    options = {"position_ids": positions, "past_key_values": cache, "use_cache": True}
    logits = model(input_ids, attention_mask=attention_mask, logits_to_keep=1, **options).logits[:, -1].float()
    each = torch.arange(size, device=device).repeat_interleave(repeats)
    mask = torch.zeros(len(each), 1, 1, length + room, dtype=torch.bool, device=device)
    mask[:, 0, 0, :length] = attention_mask.bool()[each]
    batch = DecodingBatch(
        static_cache(cache, length + room, each if repeats > 1 else None),
        tokens=torch.zeros(len(each), 1, dtype=torch.long, device=device),
        positions=positions[each, -1:] + 1,
        mask=mask,
        place=torch.tensor([length], device=device),
        written=torch.tensor([0], device=device),
        ended=torch.zeros(len(each), dtype=torch.bool, device=device),
        output=torch.full((len(each), room), 0, device=device),
    )
    return batch, logits[each]
