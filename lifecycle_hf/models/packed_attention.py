"""Attention over packed trees: one row holds prompts with several completions each, without padding.

A tree is a prompt followed by its completions. A completion attends to its prompt and to itself. No model code
changes: transformers' models pass the keywords of their forward to their attention function, which they look up by
its name in the config. [`enable_packing`] sets a function that reads the keyword `segments`; without this keyword it
does the same as the function before.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property
from inspect import signature

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lifecycle_hf.data.collators import on_device

PREFIX = "packed_"
KERNEL_DEVICES, KERNEL_DTYPES = {"cuda"}, {torch.bfloat16, torch.float16}
"""Where torch's variable-length attention stands in for SDPA, if it agrees with it there."""


@dataclass(eq=False)
class Segments:
    """Hold where the trees of a packed row begin and end.

    Attributes:
        trees: for each tree the length of its prompt and the lengths of its completions, in the order of the row.
    """

    trees: list[tuple[int, list[int]]]
    device: torch.device = torch.device("cpu")
    _masks: dict = field(default_factory=dict, repr=False)

    @cached_property
    def slices(self) -> list[tuple[int, int, int, int]]:
        """Parts of the row as (start of the queries, their end, start of the prompt that they see too, its end).

        A prompt and its first completion are one part, an ordinary causal sequence.
        """
        slices, at = [], 0
        for prompt, completions in self.trees:
            start, end = at, at + prompt
            for i, completion in enumerate(completions):
                slices.append((at if i else start, end + completion, start if i else 0, start + prompt if i else 0))
                at = end = end + completion
        return slices

    def mask(self, queries: int, keys: int, window: int | None, additive: torch.dtype | None) -> torch.Tensor:
        """Return the causal mask [1, 1, queries, keys], aligned at the bottom right.

        Args:
            window: size of the sliding window, if there is one.
            additive: dtype of a mask of 0 (seen) and the lowest number (hidden); None for a boolean mask, true = seen.
        """
        key = (queries, keys, window, additive)
        if key not in self._masks:
            places = torch.arange(keys, device=self.device)
            ahead = places - places[keys - queries :, None]
            seen = ahead <= 0 if window is None else (ahead <= 0) & (ahead > -window)
            if additive is not None:
                seen = torch.zeros_like(seen, dtype=additive).masked_fill(~seen, torch.finfo(additive).min)
            self._masks[key] = seen[None, None]
        return self._masks[key]

    @cached_property
    def varlen(self) -> dict[str, torch.Tensor | int]:
        """Keywords of the variable-length kernels, and as "keys" the index [K] that repeats the prompts for them."""
        queries = [end - start for start, end, _, _ in self.slices]
        seen = [torch.cat([torch.arange(a, b), torch.arange(s, e)]) for s, e, a, b in self.slices]
        keys = [len(index) for index in seen]

        def offsets(lengths):
            return on_device(torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), self.device)

        return {
            "keys": on_device(torch.cat(seen), self.device),
            "cu_seq_lens_q": offsets(queries),
            "cu_seq_lens_k": offsets(keys),
            "max_length_q": max(queries),
            "max_length_k": max(keys),
        }

    def block_mask(self, window: int | None):
        """Return the mask of the whole row as a BlockMask for flex attention."""
        from torch.nn.attention.flex_attention import create_block_mask

        if window not in self._masks:
            tree, segment, position = self._labels
            length = len(tree)

            def visible(batch, head, query, key):
                own = (tree[query] == tree[key]) & ((segment[key] == 0) | (segment[query] == segment[key]))
                ahead = position[key] - position[query]
                return own & (ahead <= 0) & (ahead > -(length if window is None else window))

            self._masks[window] = create_block_mask(visible, None, None, length, length, device=self.device)
        return self._masks[window]

    @cached_property
    def _labels(self) -> torch.Tensor:
        """Tree, segment (0 is the prompt) and position of every token: [3, N]."""
        columns = []
        for tree, (prompt, completions) in enumerate(self.trees):
            for segment, length in enumerate([prompt, *completions]):
                positions = torch.arange(length) + (prompt if segment else 0)
                columns.append(torch.stack(torch.broadcast_tensors(*torch.tensor([tree, segment]), positions)))
        return on_device(torch.cat(columns, dim=1), self.device)

    @property
    def position_ids(self) -> torch.Tensor:
        """Positions [1, N]; those of a completion continue from its prompt."""
        return self._labels[2:]

    @property
    def dummy_mask(self) -> torch.Tensor:
        """An empty 4-D tensor to pass as `attention_mask`, so that transformers makes no mask; nothing reads it.

        Without it transformers reads the positions that start again as packed sequences, and hides the prompts.
        """
        return torch.empty(1, 1, 0, 0, device=self.device)


def enable_packing(config) -> None:
    """Set the packed version of the attention implementation; it changes nothing in calls without `segments`."""
    config = config.get_text_config()
    base = config._attn_implementation.removeprefix(PREFIX)
    _register(base)
    config._attn_implementation = PREFIX + base


def disable_packing(config) -> None:
    """Undo [`enable_packing`]."""
    config = config.get_text_config()
    config._attn_implementation = config._attn_implementation.removeprefix(PREFIX)


def _register(base: str) -> None:
    if PREFIX + base in ALL_ATTENTION_FUNCTIONS:
        return
    plain = ALL_ATTENTION_FUNCTIONS[base] if base != "eager" else None

    def attention(module, query, key, value, attention_mask, segments: Segments | None = None, **kwargs):
        attend = plain or sys.modules[type(module).__module__].eager_attention_forward
        module.config._attn_implementation = base  # transformers looks up flash kernels by this name
        try:
            if segments is None:
                return attend(module, query, key, value, attention_mask, **kwargs)
            if getattr(module.config, "sliding_window", None) is not None and "sliding_window" not in kwargs:
                raise NotImplementedError("only the mask knows the sliding window")
            if base == "flex_attention":
                return attend(module, query, key, value, segments.block_mask(kwargs.get("sliding_window")), **kwargs)
            if "flash" in base:
                lengths = dict(segments.varlen)
                keys = lengths.pop("keys")
                return attend(module, query, key[:, :, keys], value[:, :, keys], None, **(kwargs | lengths))
            kernel = find_kernel(base, query, key, kwargs)
            if kernel is not None:
                return _attend_by_kernel(kernel, segments, query, key, value, kwargs), None
            return _attend_by_segment(attend, base, segments, module, query, key, value, kwargs), None
        finally:
            module.config._attn_implementation = PREFIX + base

    AttentionInterface.register(PREFIX + base, attention)
    if base in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(PREFIX + base, ALL_MASK_ATTENTION_FUNCTIONS[base])


def _attend_by_segment(attend, base: str, segments: Segments, module: nn.Module, query, key, value, kwargs):
    window, outputs = kwargs.get("sliding_window"), []
    for start, end, prompt_start, prompt_end in segments.slices:
        k, v = key[:, :, start:end], value[:, :, start:end]
        if prompt_end > prompt_start:
            k = torch.cat([key[:, :, prompt_start:prompt_end], k], dim=2)
            v = torch.cat([value[:, :, prompt_start:prompt_end], v], dim=2)
        queries, keys, mask = end - start, k.shape[2], None
        if base != "sdpa" or queries < keys or (window is not None and window < keys):
            mask = segments.mask(queries, keys, window, None if base == "sdpa" else query.dtype)
        outputs.append(attend(module, query[:, :, start:end], k, v, mask, **kwargs)[0])
    return torch.cat(outputs, dim=1)


def find_kernel(base: str, query: torch.Tensor, key: torch.Tensor, kwargs: dict) -> Callable | None:
    """Return torch's variable-length attention if it can take the place of SDPA for this call, else None."""
    right_place = query.device.type in KERNEL_DEVICES and query.dtype in KERNEL_DTYPES
    if base != "sdpa" or not right_place or kwargs.get("dropout"):
        return None
    window = kwargs.get("sliding_window") is not None
    return torch_kernel(query.device, query.dtype, query.shape[1], key.shape[1], query.shape[3], window)


def _attend_by_kernel(kernel: Callable, segments: Segments, query, key, value, kwargs) -> torch.Tensor:
    """Return the attention [1, N, heads, D] of a packed row [1, heads, N, D] by one call of a kernel."""
    lengths = dict(segments.varlen)
    places = lengths.pop("keys")
    tokens = [query[0].transpose(0, 1), key[0].transpose(0, 1)[places], value[0].transpose(0, 1)[places]]
    return kernel(*tokens, *lengths.values(), scale=kwargs.get("scaling"), window=kwargs.get("sliding_window"))[None]


@cache
def torch_kernel(
    device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, head_size: int, windowed: bool
) -> Callable | None:
    """Return `kernel(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window)`, or None if it does not fit.

    It must align causal masks at the bottom right, which is tried once for each kind of head.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn

        kernel = _adapted(varlen_attn)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            fits = _aligns_at_bottom_right(kernel, device, dtype, heads, key_heads, head_size, 4 if windowed else None)
        return kernel if fits else None
    except (ImportError, RuntimeError, ValueError, TypeError):  # this torch or this card has no such kernel
        return None


def _adapted(varlen_attn: Callable) -> Callable:
    """Return `varlen_attn`, whose options differ between versions of torch, as [`torch_kernel`] describes it."""
    options = signature(varlen_attn).parameters

    def kernel(query, key, value, *lengths, scale=None, window=None):
        given = {"scale": scale} if "scale" in options else {}
        if "enable_gqa" in options:
            given["enable_gqa"] = query.shape[1] != key.shape[1]
        elif query.shape[1] != key.shape[1]:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        if "window_size" in options:
            given["window_size"] = (-1 if window is None else window - 1, 0)
        else:
            given["is_causal"] = True
        return varlen_attn(query, key, value, *lengths, **given)

    return kernel


def _aligns_at_bottom_right(kernel, device, dtype, heads, key_heads, head_size, window) -> bool:
    """Return whether `kernel` agrees with SDPA under explicit masks on a row of two small trees."""
    segments, scale = Segments([(5, [3, 4]), (2, [6])], device), 0.3
    draw = torch.Generator(device).manual_seed(0)
    sizes = [(1, n, 20, head_size) for n in (heads, key_heads, key_heads)]
    query, key, value = (torch.randn(size, generator=draw, device=device).to(dtype) for size in sizes)
    got = _attend_by_kernel(kernel, segments, query, key, value, {"scaling": scale, "sliding_window": window})
    expected = []
    for start, end, prompt_start, prompt_end in segments.slices:
        places = torch.tensor([*range(prompt_start, prompt_end), *range(start, end)], device=device)
        mask = segments.mask(end - start, len(places), window, None)
        parts = query[:, :, start:end].float(), key[:, :, places].float(), value[:, :, places].float()
        expected.append(scaled_dot_product_attention(*parts, mask, scale=scale, enable_gqa=True))
    difference = (got.float() - torch.cat(expected, 2).transpose(1, 2)).abs().max()
    return bool(difference <= 0.02)
