"""Decoding in steps of fixed shapes: the plain loop's tokens, the same addresses, nothing read by the host."""

import pytest
import torch
from host_syncs import HostSyncs
from transformers import AutoConfig, AutoModelForCausalLM

from lifecycle_hf import LifecycleConfig, LifecycleForCausalLM
from lifecycle_hf.completions import captured
from lifecycle_hf.completions.captured import DecodingStep, can_be_captured, prefill, take
from lifecycle_hf.completions.sampling import generate
from lifecycle_hf.models.packed_attention import enable_packing

PROMPTS = [[7, 8, 9], [10], [11, 12], [13, 14, 15, 16], [17], [18, 19]]
OPTIONS = {"max_new_tokens": 40, "temperature": 0.0, "stop_token_ids": [2, 5], "pad_token_id": 0}
SIZES = {
    "vocab_size": 13 * 2, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3,
}  # fmt: skip


def tiny(family="llama", **config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(SIZES | config))).eval()


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2"])
@pytest.mark.parametrize("packed", [False, True])
def test_greedy_tokens_are_those_of_the_plain_loop(monkeypatch, family, packed):
    monkeypatch.setattr(captured, "CHECK_EVERY", 3)
    monkeypatch.setattr(captured, "COMPACT_FROM", 1 / 6)
    model, batches = tiny(family), []
    if packed:  # as scoring leaves it
        enable_packing(model.config)
    rows = captured.DecodingBatch.rows
    monkeypatch.setattr(captured.DecodingBatch, "rows", lambda self, kept: batches.append(kept) or rows(self, kept))
    plain = generate(model, PROMPTS, **OPTIONS, captured=False)
    assert generate(model, PROMPTS, **OPTIONS, captured=True) == plain
    lengths = {len(row) for row in plain}
    assert len(lengths) > 1 and batches, "rows must end at different steps, and leave the batch"


@pytest.mark.parametrize("prompts", [[[7, 8], [9, 10]], [[7]]])
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_prompts_of_one_length_and_few_steps(prompts, steps):
    model, options = tiny(), OPTIONS | {"max_new_tokens": steps}
    assert generate(model, prompts, **options, captured=True) == generate(model, prompts, **options, captured=False)


def test_samples_of_a_seed_are_those_of_the_plain_loop_until_a_row_ends(tiny_llama):
    model = tiny_llama[0]()
    options = OPTIONS | {"temperature": 0.7, "stop_token_ids": [1], "max_new_tokens": 12, "generator_seed": 3}
    plain = generate(model, PROMPTS[:2], **options, captured=False)
    assert {len(row) for row in plain} == {12}
    assert generate(model, PROMPTS[:2], **options, captured=True) == plain


def test_a_step_keeps_its_addresses_and_reads_nothing():
    """What a graph needs: CUDA replays the kernels of one step on the very same memory."""
    model, ids = tiny(), torch.tensor([[0, 7, 8, 9], [3, 4, 5, 6]])

    def choose(logits):
        return logits.argmax(-1, True)

    with torch.no_grad():
        batch, logits = prefill(model, ids, torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]), room=8)
        take(batch, choose(logits), torch.tensor([99]), 0)
        step = DecodingStep(model, batch, choose, torch.tensor([99]), 0)
        addresses = [(x.data_ptr(), x.shape, x.dtype) for x in batch.buffers]
        with HostSyncs() as syncs:
            for _ in range(7):
                step.run()
        assert [(x.data_ptr(), x.shape, x.dtype) for x in batch.buffers] == addresses
        assert syncs.found == []
        # By hand: the model on the whole row, without a cache.
        row = [3, 4, 5, 6]
        for _ in range(8):
            row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
        assert batch.output[1].tolist() == row[4:]


def test_models_that_need_other_steps_are_left_to_the_plain_loop():
    assert can_be_captured(tiny())
    windowed = tiny("gemma3_text", sliding_window=4, layer_types=["sliding_attention", "full_attention"])
    eager = tiny()
    eager.config._attn_implementation = "eager"
    prefix = LifecycleForCausalLM(LifecycleConfig(**SIZES, attention="prefix"))
    for model in (windowed, eager, prefix):
        assert not can_be_captured(model)
    with pytest.raises(ValueError, match="captured=True: Gemma3ForCausalLM does not decode in steps of fixed shapes"):
        generate(windowed, PROMPTS, **OPTIONS, captured=True)
