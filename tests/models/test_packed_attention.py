"""Test packed trees: what each attention implementation sees equals a table written by hand, or sdpa."""

import copy
import functools

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.integrations import flex_attention as flex_integration
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lifecycle_hf.completions.scoring import Completions, completion_logprobs
from lifecycle_hf.models import packed_attention
from lifecycle_hf.models.packed_attention import Segments, disable_packing, enable_packing

close = torch.testing.assert_close
TREES = [(2, [2, 1]), (1, [2])]  # x x a a b, x a a
PROMPTS = [[7, 8, 9, 10, 11], [12], [7, 8, 9, 10, 11], [12], [7, 8, 9, 10, 11]]
COMPLETIONS = [[20, 21], [22, 23, 24, 25, 26, 27, 28], [29], [30, 31], [32, 33, 34, 35]]
WINDOWED = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {"llama": {}, "gemma3_text": WINDOWED, "gemma2": {**WINDOWED, "attn_logit_softcapping": None}}


def tiny(family, implementation="sdpa", **config):
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(sizes | heads | config)))
    model.config._attn_implementation = implementation
    return model.eval()


def scores(model):
    batch = Completions.from_lists(PROMPTS, COMPLETIONS, 0, groups=[0, 1, 0, 1, 0])
    return completion_logprobs(model, batch, entropy=True, prompts=True)


def visible(slices, length, window=None):
    """Return which tokens see which by [`Segments.slices`], [N, N]."""
    table = torch.zeros(length, length, dtype=torch.bool)
    for start, end, prompt_start, prompt_end in slices:
        keys = [*range(prompt_start, prompt_end), *range(start, end)]
        mask = Segments(TREES).mask(end - start, len(keys), window, None)[0, 0]
        for i, query in enumerate(range(start, end)):
            table[query, keys] = mask[i]
    return table


def table(text):
    return torch.tensor([[mark == "1" for mark in row.split()] for row in text.strip().splitlines()])


FULL = table(
    """
    1 0 0 0 0 0 0 0
    1 1 0 0 0 0 0 0
    1 1 1 0 0 0 0 0
    1 1 1 1 0 0 0 0
    1 1 0 0 1 0 0 0
    0 0 0 0 0 1 0 0
    0 0 0 0 0 1 1 0
    0 0 0 0 0 1 1 1
    """
)
WINDOW_OF_TWO = table(
    """
    1 0 0 0 0 0 0 0
    1 1 0 0 0 0 0 0
    0 1 1 0 0 0 0 0
    0 0 1 1 0 0 0 0
    0 1 0 0 1 0 0 0
    0 0 0 0 0 1 0 0
    0 0 0 0 0 1 1 0
    0 0 0 0 0 0 1 1
    """
)


def test_slices_positions_and_offsets_by_hand():
    segments = Segments(TREES)
    # a prompt goes with its first completion; the second completion sees the prompt at 0..2 besides itself
    assert segments.slices == [(0, 4, 0, 0), (4, 5, 0, 2), (5, 8, 0, 0)]
    assert segments.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 1, 2]]
    assert segments.dummy_mask.shape == (1, 1, 0, 0)
    varlen = segments.varlen
    assert varlen["keys"].tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 6, 7]
    assert varlen["cu_seq_lens_q"].tolist() == [0, 4, 5, 8] and varlen["cu_seq_lens_q"].dtype == torch.int32
    assert varlen["cu_seq_lens_k"].tolist() == [0, 4, 7, 10] and varlen["cu_seq_lens_k"].dtype == torch.int32
    assert (varlen["max_length_q"], varlen["max_length_k"]) == (4, 4)


def test_a_prompt_within_the_row_is_found():
    slices = Segments([(1, [1]), (3, [1, 2, 4])]).slices
    assert slices == [(0, 2, 0, 0), (2, 6, 0, 0), (6, 8, 2, 5), (8, 12, 2, 5)]


def test_masks_are_aligned_at_the_bottom_right():
    segments = Segments(TREES)
    assert segments.mask(2, 4, None, None)[0, 0].int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert segments.mask(2, 4, 2, None)[0, 0].int().tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]
    low = torch.finfo(torch.bfloat16).min
    additive = segments.mask(1, 3, 2, torch.bfloat16)
    assert additive.dtype == torch.bfloat16 and additive.tolist() == [[[[low, 0.0, 0.0]]]]
    assert segments.mask(2, 4, 2, None) is segments.mask(2, 4, 2, None)


@pytest.mark.parametrize(("window", "expected"), [(None, FULL), (2, WINDOW_OF_TWO)])
def test_slices_and_the_block_mask_show_what_a_table_by_hand_does(window, expected):
    segments = Segments(TREES)
    assert torch.equal(visible(segments.slices, 8, window), expected)
    see = segments.block_mask(window).mask_mod
    places = torch.arange(8)
    assert torch.equal(see(0, 0, places[:, None], places), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_flex_attention_equals_sdpa(monkeypatch, name):
    # Compiled for the CPU it takes half a minute or fails, as of torch 2.13; what it computes is the same uncompiled.
    def uncompiled(query, key, value, training=False, **kwargs):
        return flex_attention(query, key, value, **kwargs)

    monkeypatch.setattr(flex_integration, "compile_friendly_flex_attention", uncompiled)
    model, expected = tiny(name, "flex_attention", **FAMILIES[name]), tiny(name, **FAMILIES[name])
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        got, wanted = scores(model), scores(expected)
    assert model.config._attn_implementation == "packed_flex_attention"
    for one, other in zip(got, wanted):
        close(one, other, atol=1e-5, rtol=0)


def varlen_kernel(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
):
    """Compute naively what flash_attn_varlen_func computes on q [N, heads, d] and k, v [K, kv heads, d]."""
    outputs, (qs, ks) = [], (cu_seqlens_q.tolist(), cu_seqlens_k.tolist())
    assert causal and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert (len(q), len(k)) == (qs[-1], ks[-1])
    for a, b, c, d in zip(qs, qs[1:], ks, ks[1:]):
        assert b - a <= max_seqlen_q and d - c <= max_seqlen_k
        key, value = (x[c:d].repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        ahead = torch.arange(d - c) - torch.arange(d - c - b + a, d - c)[:, None]
        seen = (ahead <= 0) & ((ahead >= -window_size[0]) | torch.tensor(window_size[0] < 0))
        logits = torch.einsum("qhe,khe->hqk", q[a:b], key) * softmax_scale
        weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khe->qhe", weights, value))
    return torch.cat(outputs)


def kernel(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)):
    """Compute naively what flash_attn_func computes."""
    how = {"softmax_scale": softmax_scale, "causal": causal, "window_size": window_size}
    offsets, length = torch.tensor([0, q.shape[1]], dtype=torch.int32), q.shape[1]
    return torch.stack([varlen_kernel(*row, offsets, offsets, length, length, **how) for row in zip(q, k, v)])


def stand_in(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs):
    """Stand for a variable-length kernel; it is sdpa if there are no lengths."""
    if "cu_seq_lens_q" not in kwargs:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    assert attention_mask is None and len(query) == 1
    output = varlen_kernel(
        *(x[0].transpose(0, 1) for x in (query, key, value)),
        *(kwargs[name] for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")),
        softmax_scale=scaling,
        causal=True,
        window_size=(-1, -1) if sliding_window is None else (sliding_window - 1, 0),
    )
    return output[None], None


@pytest.mark.parametrize("name", FAMILIES)
def test_lengths_handed_to_a_variable_length_kernel_equal_sdpa(name):
    AttentionInterface.register("flash_stand_in", stand_in)
    AttentionMaskInterface.register("flash_stand_in", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model, expected = tiny(name, "flash_stand_in", **FAMILIES[name]), tiny(name, **FAMILIES[name])
    got, wanted = scores(model), scores(expected)
    assert model.config._attn_implementation == "packed_flash_stand_in"
    for one, other in zip(got, wanted):
        close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_flash_attention_2_of_transformers_with_naive_kernels_equals_sdpa(monkeypatch, name):
    def imports(implementation, *args, **kwargs):
        assert implementation == "flash_attention_2"
        return kernel, varlen_kernel, None, flash_utils._pad_input, flash_utils._unpad_input

    monkeypatch.setattr(flash_utils, "_lazy_imports", imports)
    for state in ("_flash_fn", "_flash_varlen_fn", "_flash_with_kvcache_fn", "_pad_fn", "_unpad_fn"):
        monkeypatch.setattr(flash_utils, state, None)
    for state in ("_loaded_implementation", "_process_flash_kwargs_fn", "_process_with_kvcache_kwargs_fn"):
        monkeypatch.setattr(flash_utils, state, None)
    model, expected = tiny(name, "flash_attention_2", **FAMILIES[name]), tiny(name, **FAMILIES[name])
    got, wanted = scores(model), scores(expected)
    for one, other in zip(got, wanted):
        close(one, other, atol=1e-5, rtol=0)
    assert model.config._attn_implementation == "packed_flash_attention_2"
    ids = torch.tensor([[7, 8, 9, 10, 11, 12]])
    close(model(ids).logits, expected(ids).logits, atol=1e-5, rtol=1e-5)  # without packing, too


def of_torch_2_13(query, key, value, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    """Stand for `torch.nn.attention.varlen.varlen_attn`."""
    assert enable_gqa == (query.shape[1] != key.shape[1])
    options = {"softmax_scale": scale, "causal": window_size[1] == 0, "window_size": window_size}
    return varlen_kernel(query, key, value, cu_q, cu_k, max_q, max_k, **options)


def of_torch_2_10(query, key, value, cu_q, cu_k, max_q, max_k, is_causal=False, *, scale=None):
    """Stand for an earlier version of it."""
    assert query.shape[1] == key.shape[1]
    return varlen_kernel(query, key, value, cu_q, cu_k, max_q, max_k, softmax_scale=scale, causal=is_causal)


def at_the_top_left(query, key, value, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """Stand for a version whose causal masks begin at the first key."""
    cut = [x[: len(query)] for x in (key, value)]
    return varlen_kernel(query, *cut, cu_q, cu_q, max_q, max_q, softmax_scale=scale, causal=True)


def missing(*args, **kwargs):
    raise RuntimeError("no kernel for this card")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("version", [of_torch_2_13, of_torch_2_10, at_the_top_left, missing])
def test_the_kernel_of_torch_stands_in_for_sdpa_where_it_agrees(monkeypatch, name, version):
    calls = []

    def counted(query, *args, **kwargs):
        calls.append(len(query))
        return version(query, *args, **kwargs)

    functools.update_wrapper(counted, version)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", counted)
    monkeypatch.setattr(packed_attention, "KERNEL_DEVICES", {"cpu"})
    monkeypatch.setattr(packed_attention, "KERNEL_DTYPES", {torch.float32})
    packed_attention.torch_kernel.cache_clear()
    model, expected = tiny(name, **FAMILIES[name]), tiny(name, "eager", **FAMILIES[name])
    got, wanted = scores(model), scores(expected)
    packed_attention.torch_kernel.cache_clear()
    assert model.config._attn_implementation == "packed_sdpa"
    for one, other in zip(got, wanted):
        close(one, other, atol=1e-5, rtol=0)
    row = 5 + sum(map(len, COMPLETIONS)) + 1  # both prompts once
    # One layer of two is windowed but in the first family; a window is more than the earlier version can do.
    layers = {of_torch_2_13: 2, of_torch_2_10: 2 if name == "llama" else 1}.get(version, 0)
    assert calls.count(row) == layers


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_enabling_and_disabling_are_inverse_and_idempotent(implementation):
    config = tiny("llama", implementation).config
    for change, expected in ((enable_packing, f"packed_{implementation}"), (disable_packing, implementation)):
        for _ in range(2):
            change(config)
            assert config._attn_implementation == expected
    assert f"packed_{implementation}" in ALL_ATTENTION_FUNCTIONS


def test_without_segments_the_packed_twin_is_the_implementation_before():
    model = tiny("llama")
    twin, ids = copy.deepcopy(model), torch.tensor([[0, 0, 7, 8], [9, 10, 11, 12]])
    enable_packing(twin.config)
    outputs = [one(ids, attention_mask=(ids != 0).long()).logits for one in (model, twin)]
    assert torch.equal(*outputs)
