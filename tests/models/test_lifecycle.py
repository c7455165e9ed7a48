"""Test the backbone: Llama's numbers in causal mode, which tokens see which in every mode, and generation."""

import itertools
import os
from pathlib import Path

import pytest
import torch
from lifecycle_setting import padded, tiny, tokens, twins
from torch.nn.attention.flex_attention import flex_attention
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.integrations import flex_attention as flex_integration

from lifecycle_hf import LifecycleConfig, LifecycleForCausalLM, LifecycleModel
from lifecycle_hf.models.lifecycle import modeling_lifecycle

close = torch.testing.assert_close
SMOLLM2 = Path(os.environ.get("LIFECYCLE_HF_SMOLLM2", "/tmp/smollm/model"))
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
SHAPES = {
    "grouped": {},
    "multi-head": {"num_key_value_heads": 4},
    "one key head, tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "wide heads, biases": {"head_dim": 16, "attention_bias": True, "mlp_bias": True},
    "rope: linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    "rope: dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
    "rope: yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}},
    "rope: llama3": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5} | LLAMA3},
}
PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2], [0, 1, 0, 1, 2, 3, 4]])


def inputs(kind):
    if kind in ("left", "right"):
        ids, mask = padded([7, 4, 1], kind)
        return {"input_ids": ids, "attention_mask": mask}
    if kind == "packed":
        return {"input_ids": tokens(2, 7), "position_ids": PACKED, "use_cache": False}
    return {"input_ids": tokens(2, 7)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_causal_logits_are_llamas(shape, implementation):
    llama, model = twins(**SHAPES[shape])
    assert model.config.rope_parameters == llama.config.rope_parameters
    for one in (llama, model):
        one.set_attn_implementation(implementation)
    for kind in ("plain", "left", "right", "packed"):
        given = inputs(kind)
        labels = given["input_ids"].masked_fill(given["input_ids"] == 0, -100)
        expected, got = (one(**given, labels=labels) for one in (llama, model))
        close(got.logits, expected.logits, atol=1e-5, rtol=0)
        close(got.loss, expected.loss)


@pytest.mark.parametrize("side", ["left", "right"])
def test_with_a_cache_logits_are_llamas(side):
    llama, model = twins()
    ids, mask = padded([7, 4], side)
    cached = []
    for one in (llama, model):
        cache = DynamicCache(config=one.config)
        first = one(ids[:, :3], attention_mask=mask[:, :3], past_key_values=cache).logits
        cached.append(torch.cat([first, one(ids[:, 3:], attention_mask=mask, past_key_values=cache).logits], 1))
    close(cached[1], cached[0], atol=1e-5, rtol=0)
    real = mask.bool()
    close(cached[1][real], model(ids, attention_mask=mask).logits[real], atol=1e-5, rtol=0)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"use_cache": False}])
def test_causal_generation_is_llamas(how):
    llama, model = twins()
    ids, mask = padded([7, 4], "left")
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, **how}
    assert torch.equal(model.generate(ids, **options), llama.generate(ids, **options))


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2.is_dir(), reason=f"SmolLM2 not found at {SMOLLM2}")
def test_smollm2_loads_and_says_the_same():
    config = LifecycleConfig.from_llama(AutoConfig.from_pretrained(SMOLLM2), attention="causal")
    model, info = LifecycleForCausalLM.from_pretrained(
        SMOLLM2, config=config, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    llama = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    close(model(**prompt).logits, llama(**prompt).logits, atol=1e-5, rtol=0)
    answers = [one.generate(**prompt, max_new_tokens=24, do_sample=False) for one in (llama, model)]
    assert torch.equal(*answers)
    assert "Paris" in tokenizer.decode(answers[1][0])


# Who sees whom, one row at a time, written down by hand: a row is a list of documents, each (start, length, prefix).
ROWS = {
    "plain": [[(0, 7, 3)], [(0, 7, 7)], [(0, 7, 0)]],
    "left": [[(0, 7, 4)], [(3, 4, 2)], [(5, 2, 2)]],
    "right": [[(0, 7, 4)], [(0, 4, 2)], [(0, 2, 2)]],
    "packed": [[(0, 3, 2), (3, 4, 3)], [(0, 5, 0), (5, 2, 2)], [(0, 1, 1), (1, 6, 2)]],
}


def sees(rows, attention):
    """Return whether token i sees token j, [B, 7, 7]; the rows of padding do not matter."""
    table = torch.zeros(len(rows), 7, 7, dtype=torch.bool)
    for row, documents in enumerate(rows):
        for start, length, prefix in documents:
            for i, j in itertools.product(range(length), repeat=2):
                allowed = {"causal": j <= i, "bidirectional": True, "prefix": j <= i or (i < prefix and j < prefix)}
                table[row, start + i, start + j] = allowed[attention]
    return table


def layout(kind):
    """Return the inputs that describe ROWS[kind], without the ids."""
    rows = ROWS[kind]
    if kind == "plain":
        return {}
    real = torch.zeros(len(rows), 7, dtype=torch.long)
    positions = torch.zeros(len(rows), 7, dtype=torch.long)
    for row, documents in enumerate(rows):
        for start, length, _ in documents:
            real[row, start : start + length] = 1
            positions[row, start : start + length] = torch.arange(length)
    return {"position_ids": positions} if kind == "packed" else {"attention_mask": real}


def prefixes(kind):
    lengths = [[prefix for _, _, prefix in documents] for documents in ROWS[kind]]
    return torch.tensor(lengths if kind == "packed" else [row[0] for row in lengths])


def influence(model, **given):
    """Return whether the output at position i changes with the token at position j, [B, 7, 7]."""
    embeds = model.embed_tokens(tokens(3, 7))
    with torch.no_grad():
        states = model(inputs_embeds=embeds, use_cache=False, **given).last_hidden_state
        columns = []
        for j in range(7):
            other = embeds.clone()
            other[:, j] += torch.randn(32)
            moved = model(inputs_embeds=other, use_cache=False, **given).last_hidden_state
            columns.append((moved - states).abs().amax(-1) > 1e-6)
    return torch.stack(columns, dim=-1)


@pytest.fixture
def uncompiled_flex(monkeypatch):
    """Run flex attention uncompiled: with torch 2.13 compiling for the CPU takes half a minute or fails."""

    def uncompiled(query, key, value, training=False, **kwargs):
        return flex_attention(query, key, value, **kwargs)

    monkeypatch.setattr(flex_integration, "compile_friendly_flex_attention", uncompiled)
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("attention", ["causal", "prefix", "bidirectional"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_a_token_changes_exactly_the_outputs_that_may_see_it(uncompiled_flex, implementation, attention, kind):
    # One layer, as in two the influence goes through third tokens; flex wants heads of 16 or more.
    model = tiny(LifecycleModel, attention, num_hidden_layers=1, head_dim=16)
    model.set_attn_implementation(implementation)
    given = layout(kind)
    if attention == "prefix":
        given["prefix_lengths"] = prefixes(kind)
    changed, expected = influence(model, **given), sees(ROWS[kind], attention)
    real = expected.any(-1)
    assert torch.equal(changed[real], expected[real])


def test_the_first_documents_alone_may_have_a_prefix():
    model = tiny(LifecycleModel, "prefix", num_hidden_layers=1)
    rows = [[(start, length, prefix if start == 0 else 0) for start, length, prefix in row] for row in ROWS["packed"]]
    changed = influence(model, **layout("packed"), prefix_lengths=prefixes("packed")[:, 0])
    assert torch.equal(changed, sees(rows, "prefix"))


def test_a_packed_prefix_row_equals_its_documents_one_by_one():
    model = tiny(attention="prefix")
    ids, given = tokens(3, 7), layout("packed")
    packed = model(ids, **given, prefix_lengths=prefixes("packed"), use_cache=False).logits
    for row, documents in enumerate(ROWS["packed"]):
        for start, length, prefix in documents:
            part = slice(start, start + length)
            alone = model(ids[row : row + 1, part], prefix_lengths=[prefix]).logits
            close(packed[row, part], alone[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("bad", [[3, 5], [3, -1], [[3], [5]]])
def test_a_prefix_that_does_not_fit_its_row_is_named(bad):
    ids, mask = padded([7, 4], "left")
    with pytest.raises(ValueError, match=r"of row 1 is (5|-1), but it has 4 tokens"):
        tiny(attention="prefix")(ids, attention_mask=mask, prefix_lengths=torch.tensor(bad))


def test_a_prefix_that_does_not_fit_its_document_is_named():
    with pytest.raises(ValueError, match="of document 1 of row 1 is 3, but it has 2 tokens"):
        tiny(attention="prefix")(
            tokens(3, 7), **layout("packed"), prefix_lengths=torch.tensor([[2, 3], [0, 3], [1, 2]])
        )


@pytest.mark.parametrize("bad", [[3], [3, 3, 3], 3, [[1] * 8] * 2])
def test_prefixes_of_another_shape_are_refused(bad):
    with pytest.raises(ValueError, match="the batch has 2 rows of 7 tokens"):
        tiny(attention="prefix")(tokens(2, 7), prefix_lengths=torch.tensor(bad))


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_a_prefix_in_another_mode_is_refused(attention):
    with pytest.raises(ValueError, match=f"came with attention='{attention}'"):
        tiny(LifecycleModel, attention)(tokens(1, 3), prefix_lengths=torch.tensor([1]))


def test_a_prefix_beside_a_complete_mask_is_refused():
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="4-D attention_mask"):
        tiny(attention="prefix")(tokens(1, 3), attention_mask=mask, prefix_lengths=torch.tensor([1]))


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flash_attention_3"])
def test_flash_attention_refuses_a_prefix(implementation):
    model = tiny(attention="prefix")
    model.config._attn_implementation = implementation  # set so, as the kernel is not installed here
    for ids, mask in [(tokens(2, 4), None), padded([4, 2], "left")]:
        with pytest.raises(ValueError, match=f"'{implementation}' can't mask a prefix"):
            model(ids, attention_mask=mask, prefix_lengths=torch.tensor([2, 0]))


def test_a_missing_prefix_is_told_once_and_means_causal(monkeypatch):
    llama, model = twins("prefix")
    told = []
    monkeypatch.setattr(modeling_lifecycle.logger, "warning_once", told.append)
    ids = tokens(2, 5)
    close(model(ids).logits, llama(ids).logits, atol=1e-5, rtol=0)
    close(model(ids, prefix_lengths=torch.zeros(2)).logits, llama(ids).logits, atol=1e-5, rtol=0)
    model.generate(ids, max_new_tokens=3)
    assert len(told) == 1 and "uses 0 for every row" in told[0]


def greedy(model, prompt, new, prefix):
    """Generate with a plain loop, without cache and padding."""
    ids = prompt[None]
    for _ in range(new):
        logits = model(ids, prefix_lengths=[prefix]).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    return ids[0, len(prompt) :]


@pytest.mark.parametrize("how", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_the_prompt_is_the_prefix_in_generation(how):
    model = tiny(attention="prefix", eos_token_id=None)
    ids, mask = padded([7, 4], "left")
    got = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, **how)
    for row, length in enumerate([7, 4]):
        assert torch.equal(got[row, 7:], greedy(model, ids[row, -length:], 6, length))
    assert not torch.equal(got[0, 7:], greedy(model, ids[0], 6, 0))  # it matters here


@pytest.mark.parametrize("how", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_a_prefix_can_be_given_to_generation(how):
    model = tiny(attention="prefix", eos_token_id=None)
    ids, mask = padded([7, 4], "left")
    lengths = torch.tensor([2, 3])
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "prefix_lengths": lengths}
    got = model.generate(ids, **options, **how)
    for row, length in enumerate([7, 4]):
        assert torch.equal(got[row, 7:], greedy(model, ids[row, -length:], 6, int(lengths[row])))


def test_generation_without_a_mask_and_from_embeddings():
    model = tiny(attention="prefix", eos_token_id=None)
    ids = tokens(1, 6)
    expected = greedy(model, ids[0], 5, 6)
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(ids, **options)[0, 6:], expected)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeds, **options)[0], expected)


def test_beams_and_several_sequences_are_the_same_cached_and_uncached():
    model = tiny(attention="prefix")
    ids, mask = padded([7, 4], "left")
    options = {"attention_mask": mask, "max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2}
    cached, uncached = (model.generate(ids, **options, do_sample=False, use_cache=on) for on in (True, False))
    assert cached.shape[0] == 4 and torch.equal(cached, uncached)
    options = {"attention_mask": mask, "max_new_tokens": 6, "num_return_sequences": 3, "do_sample": True}
    drawn = []
    for on in (True, False):
        torch.manual_seed(3)
        drawn.append(model.generate(ids, **options, use_cache=on))
    assert torch.equal(*drawn)


def test_a_conversation_goes_on_from_a_cache_that_keeps_the_first_prompt_as_its_prefix():
    model = tiny(attention="prefix", eos_token_id=None)
    ids, more = tokens(1, 5), tokens(1, 3, seed=1)
    options = {"max_new_tokens": 3, "do_sample": False}
    first = model.generate(ids, **options, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, more], 1)
    got = model.generate(longer, past_key_values=first.past_key_values, **options)
    assert torch.equal(got[0, 11:], greedy(model, longer[0], 3, 5))


def test_a_prefix_split_by_the_cache_is_refused():
    model = tiny(attention="prefix")
    cache = DynamicCache(config=model.config)
    model(tokens(1, 4), past_key_values=cache, prefix_lengths=[4])
    with pytest.raises(ValueError, match="is 6, but the cache holds the first 4 tokens"):
        model(tokens(1, 3), past_key_values=cache, prefix_lengths=[6])
    with pytest.raises(ValueError, match="is 6, but it has 4 tokens here.*chunks"):
        model.generate(tokens(1, 6), prefill_chunk_size=4, max_new_tokens=2)


def test_compiled_in_one_graph_with_a_prefix():
    model = tiny(attention="prefix")
    ids, mask = padded([7, 4], "left")
    given = {"attention_mask": mask, "prefix_lengths": torch.tensor([3, 4]), "use_cache": False}
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        close(compiled(ids, **given).logits, model(ids, **given).logits, atol=1e-5, rtol=0)
