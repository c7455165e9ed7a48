"""Packed scores, padded scores and one unpadded row at a time in float64 are the same numbers."""

import contextlib
import copy
import functools
import os
import random
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lifecycle_setting import SIZES, VOCAB, shake
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from lifecycle_hf import BottleneckConfig
from lifecycle_hf.completions import scoring
from lifecycle_hf.completions.scoring import Completions, completion_hidden_states, completion_logprobs
from lifecycle_hf.models.lm_head import CHUNK_LOGITS, token_logprobs
from lifecycle_hf.models.loading import load_causal_lm

close = torch.testing.assert_close
SMOLLM2 = Path(os.environ.get("LIFECYCLE_HF_SMOLLM2", "/tmp/smollm/model"))
PROMPTS = [[7, 8, 9], [10], [7, 8, 9], [11, 12, 13, 14, 15]]
COMPLETIONS = [[20, 21], [22, 23, 24, 2], [25], [26, 27, 28, 29, 30, 31, 32]]
GROUPS = [5, 0, 5, 3]
SIZES = SIZES | {"max_position_embeddings": 128}
WINDOWED = {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
PACKABLE = {
    "llama": {},
    "lifecycle": {"attention": "causal"},
    "qwen3": {"head_dim": 8},
    "gemma3_text": {**WINDOWED, "final_logit_softcapping": 3.0},
    "gemma2": {**WINDOWED, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "eager": True},
}
HEADS = {
    "llama": {},
    "lifecycle": {},
    "gemma3_text": {"head_dim": 8, "final_logit_softcapping": 3.0},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
WRONG_WHEN_PACKED = {
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "expand": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "jamba": {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4},
    "qwen3_next": {**LINEAR, **EXPERTS, "head_dim": 8, "shared_expert_intermediate_size": 16},
}
RAISE_WHEN_PACKED = {
    "bloom": {"n_head": 4, "n_layer": 2},
    "falcon": {},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 4},
    "stablelm": {},
}


def tiny(family, eager=False, **config):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(SIZES | config))
    how = {"attn_implementation": "eager" if eager else None, "experts_implementation": "eager"}  # known to float64
    model = AutoModelForCausalLM.from_config(config, **how).eval()
    if family == "lifecycle":
        shake(model)
    return model


def example(groups=GROUPS):
    return Completions.from_lists(PROMPTS, COMPLETIONS, 0, groups=groups)


def never(backbone):
    return False


@contextlib.contextmanager
def padding():
    """Scoring takes the padded path."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(scoring, "_can_be_packed", never)
        yield


@contextlib.contextmanager
def silence():
    """A warning of the probe is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*in scoring, which is slower")
        yield


def one_row(model, prompt, completion, temperature=1.0):
    """Log-probs, entropies and the prompt's log-prob, from the model's own logits for one unpadded row."""
    logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0].double() / temperature
    table = logits.log_softmax(-1)
    read, after = table[len(prompt) - 1 : -1], table[: len(prompt) - 1]
    entropies = -(read.exp() * read).sum(-1)
    sums = after.gather(-1, torch.tensor(prompt[1:], dtype=torch.long)[:, None]).sum()
    return read.gather(-1, torch.tensor(completion)[:, None])[:, 0], entropies, sums


def check(scores, model, prompts, completions, atol=1e-5, temperature=1.0):
    """`scores` are those of one row at a time in float64, and 0 on padding."""
    for row, (prompt, completion) in enumerate(zip(prompts, completions)):
        with torch.no_grad():
            expected = one_row(model, prompt, completion, temperature)
        for got, wanted in zip(scores[:2], expected):
            if got is not None:
                close(got[row, : len(completion)].double(), wanted, atol=atol, rtol=0)
                assert got[row, len(completion) :].eq(0).all()
        if scores.prompt_logprobs is not None:
            close(scores.prompt_logprobs[row].double(), expected[2], atol=atol, rtol=0)


@functools.cache
def family(name):
    """A tiny model and its double-precision copy."""
    model = tiny(name, **PACKABLE[name])
    return model, copy.deepcopy(model).double()


@st.composite
def forests(draw):
    """Prompts, completions and groups of random trees, rows in any order."""
    lengths = st.integers(1, 12)
    trees = draw(st.lists(st.tuples(lengths, st.lists(lengths, min_size=1, max_size=3)), min_size=1, max_size=4))
    numbers = draw(st.lists(st.integers(-9, 99), unique=True, min_size=len(trees), max_size=len(trees)))
    words = random.Random(draw(st.integers(0, 999)))
    rows = []
    for number, (prompt, completions) in zip(numbers, trees):
        prompt = words.choices(range(VOCAB), k=prompt)
        rows += [(prompt, words.choices(range(VOCAB), k=length), number) for length in completions]
    return tuple(map(list, zip(*draw(st.permutations(rows)))))


def test_token_logprobs_and_entropy_by_hand():
    # softmax(log 1, log 3) = (1/4, 3/4)
    logits, log = torch.tensor([[0.0, 3.0]]).clamp(min=1).log(), lambda x: torch.tensor(x).log()
    logprobs, entropy = token_logprobs(logits, torch.tensor([1]), entropy=True)
    close(logprobs, log([0.75]))
    close(entropy, -(0.25 * log([0.25]) + 0.75 * log([0.75])))
    # at temperature ½ the odds are squared: (1/10, 9/10)
    close(token_logprobs(logits, torch.tensor([0]), temperature=0.5)[0], log([0.1]))


def test_entropy_of_a_large_vocabulary_is_exact():
    logits = torch.randn(20, 49152) * 3 + 40
    _, entropy = token_logprobs(logits, torch.zeros(20, dtype=torch.long), entropy=True)
    table = logits.double().log_softmax(-1)
    close(entropy.double(), -(table.exp() * table).sum(-1), atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", PACKABLE)
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(forest=forests())
def test_packed_equals_padded_equals_one_row_at_a_time(name, forest):
    prompts, completions, groups = forest
    model, exact = family(name)
    batch = Completions.from_lists(prompts, completions, 0, groups=groups)
    with torch.no_grad():
        with silence():
            packed = completion_logprobs(model, batch, entropy=True, prompts=True)
        with padding():
            padded = completion_logprobs(model, batch, entropy=True, prompts=True)
    assert packed.logprobs.shape == packed.entropy.shape == (len(prompts), max(map(len, completions)))
    assert model.config._attn_implementation.startswith("packed_")
    check(packed, exact, prompts, completions)
    check(padded, exact, prompts, completions)


def test_a_shared_prompt_is_encoded_and_scored_once_and_nothing_is_padded(monkeypatch):
    model, seen, read, head = tiny("llama"), [], [], scoring.head_logprobs
    completion_logprobs(model, example())
    model.model.embed_tokens.register_forward_pre_hook(lambda module, args: seen.append(args[0].tolist()))
    monkeypatch.setattr(scoring, "head_logprobs", lambda b, x, *a, **k: read.append(x.shape) or head(b, x, *a, **k))
    completion_logprobs(model, example(), prompts=True)
    assert seen == [
        [PROMPTS[0] + COMPLETIONS[0] + COMPLETIONS[2] + PROMPTS[1] + COMPLETIONS[1] + PROMPTS[3] + COMPLETIONS[3]]
    ]
    assert read == [(14 + 2 + 0 + 4, 32)]  # all of the completions, and the prompts' tokens but the first


def test_groups_change_no_score():
    model = tiny("qwen3", head_dim=8)
    grouped, alone = (completion_logprobs(model, example(g), entropy=True, prompts=True) for g in (GROUPS, None))
    for got, expected in zip(grouped, alone):
        close(got, expected, atol=1e-5, rtol=0)


def test_amount_of_padding_and_batch_split_play_no_part(tiny_llama):
    make_model, tokenizer = tiny_llama
    model = make_model()
    for path in (silence, padding):
        with path():
            whole = completion_logprobs(model, example()).logprobs
            for i in range(4):
                batch = Completions.from_lists(PROMPTS[i : i + 1], COMPLETIONS[i : i + 1], tokenizer.pad_token_id)
                alone = completion_logprobs(model, batch).logprobs
                close(alone[0], whole[i, : alone.shape[1]], atol=1e-5, rtol=0)


def test_masks_come_from_lengths_not_from_the_pad_token(tiny_llama):
    make_model, tokenizer = tiny_llama
    pad = tokenizer.pad_token_id
    batch = Completions.from_lists([[7, 8]], [[pad, 20, pad]], pad)
    assert batch.mask.tolist() == [[True, True, True]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1]]
    check(completion_logprobs(make_model(), batch), make_model().double(), [[7, 8]], [[pad, 20, pad]])


def test_state_before_a_token_does_not_depend_on_it(tiny_llama):
    make_model, _ = tiny_llama
    backbone = make_model().model
    states = [
        completion_hidden_states(backbone, Completions.from_lists([[7, 8]], [[20, y, 22]], 0), extra=1)[0]
        for y in (21, 99)
    ]
    close(states[0][:2], states[1][:2])  # s_0 and s_1 = (x, y_0) stand before y_1
    assert not torch.allclose(states[0][2:], states[1][2:])
    assert states[0].shape[0] == 4  # s_3, after the last token, for a bootstrap


@pytest.mark.parametrize("path", [silence, padding])
def test_hidden_states_equal_those_of_one_row_and_padding_repeats_the_last(path):
    model = tiny("llama")
    with path(), torch.no_grad():
        states = completion_hidden_states(model.model, example(), extra=1)
        for got, prompt, completion in zip(states, PROMPTS, COMPLETIONS):
            own = model.model(torch.tensor([prompt + completion])).last_hidden_state[0, len(prompt) - 1 :]
            close(got[: len(own)], own, atol=1e-5, rtol=1e-5)
            close(got[len(own) :], own[-1:].expand(len(got) - len(own), -1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("prompts", "completions", "name"), [([[1], []], [[1], [1]], "prompt"), ([[1]], [[]], "completion")]
)
def test_empty_rows_are_refused_by_number(prompts, completions, name):
    with pytest.raises(ValueError, match=f"Row {len(prompts) - 1} has an empty {name}"):
        Completions.from_lists(prompts, completions, 0)


def test_two_prompts_in_a_group_are_refused_by_number():
    with pytest.raises(ValueError, match="Row 2 is in group 7, whose first row has another prompt"):
        Completions.from_lists([[1], [2], [3]], [[4]] * 3, 0, groups=[7, 8, 7])


# Gradients


def trainable(variant):
    """A model in train mode as one would train it."""
    model = tiny("llama")
    if "lora" in variant:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    if "bottleneck" in variant:
        model = get_peft_model(model, BottleneckConfig(reduction_factor=8, init_bottleneck_weights=False))
    return model.train()


def checkpointed(model, variant):
    if "checkpointed" in variant:
        model.enable_input_require_grads()
        how = {"use_reentrant": "reentrant" in variant}
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
    return model


def gradients(model, weights, batch):
    """Of a weighting of all that scoring returns, by parameter; `batch` None: of one unpadded row at a time."""
    model.zero_grad()
    if batch is not None:
        scores = completion_logprobs(model, batch, entropy=True, entropy_gradient=True, prompts=True)
        loss = (torch.stack(scores[:2]) * weights[:2]).sum() + (scores.prompt_logprobs * weights[2, :, 0]).sum()
        loss.backward()
    else:
        for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS)):
            logprobs, entropy, total = one_row(model, prompt, completion)
            own = weights[:, row, : len(completion)].double()
            ((torch.stack([logprobs, entropy]) * own[:2]).sum() + total * own[2, 0]).backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def same_gradients(got, expected, tolerance=1e-5):
    assert got.keys() == expected.keys() != set()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        close(got[name], gradient, atol=tolerance * gradient.abs().max().item(), rtol=0)


@pytest.mark.parametrize("lora", ["", "lora ", "bottleneck "])
@pytest.mark.parametrize("checkpointing", ["plain", "checkpointed", "checkpointed reentrant"])
def test_gradients_packed_equal_padded_equal_unpacked(lora, checkpointing):
    model, weights = trainable(lora), torch.randn(3, 4, 7)
    expected = gradients(copy.deepcopy(model).double(), weights, None)
    model = checkpointed(model, checkpointing)
    with silence():
        same_gradients(gradients(model, weights, example()), expected)
    with padding():
        same_gradients(gradients(model, weights, example()), expected)
    assert scoring.unwrapped(model).config._attn_implementation == "packed_sdpa" and model.training


@pytest.mark.parametrize("rows", [1, 3])
def test_head_in_chunks_gives_the_scores_and_gradients_of_a_whole_one(monkeypatch, rows):
    model, weights = trainable(""), torch.randn(3, 4, 7)
    whole, expected = (
        completion_logprobs(model, example(), entropy=True, entropy_gradient=True),
        gradients(model, weights, example()),
    )
    monkeypatch.setitem(CHUNK_LOGITS, "cpu", rows * VOCAB)
    calls = []
    model.lm_head.register_forward_hook(lambda module, args, output: calls.append(output.shape))
    chunked = completion_logprobs(model, example(), entropy=True, entropy_gradient=True)
    assert len(calls) == -(-14 // rows) and set(calls) <= {(rows, VOCAB), (14 % rows, VOCAB)}
    close(chunked.logprobs, whole.logprobs, atol=5e-6, rtol=0)
    close(chunked.entropy, whole.entropy, atol=5e-6, rtol=0)
    same_gradients(gradients(model, weights, example()), expected)


class LargestLogits(TorchDispatchMode):
    """Entries of the largest tensor with a vocabulary as its last dimension."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.shape[-1] == VOCAB:
                self.entries = max(self.entries, tensor.numel())
        return output


@pytest.mark.parametrize("path", [silence, padding])
def test_logits_of_all_tokens_never_exist(monkeypatch, path):
    model = tiny("llama").train()  # the weight of its head, 32 × 97, is smaller than a chunk, 40 × 97
    monkeypatch.setitem(CHUNK_LOGITS, "cpu", 40 * VOCAB)
    batch = Completions.from_lists([[5] * 10] * 6, [[6] * 30] * 6, 0, groups=[0] * 6)
    saved = []
    with path(), LargestLogits() as seen:
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):
            scores = completion_logprobs(model, batch, entropy=True, entropy_gradient=True, prompts=True)
        (scores.logprobs.sum() + scores.entropy.sum() + scores.prompt_logprobs.sum()).backward()
    assert 32 * VOCAB < seen.entries <= 40 * VOCAB  # 180 rows in chunks of much the same size
    assert saved and not [shape for shape in saved if shape[-1:] == (VOCAB,)]  # nor wait for the backward pass


# Heads and the probe


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", HEADS)
def test_heads_equal_the_models_own_logits(name, temperature):
    model = tiny(name, **HEADS[name])
    exact = copy.deepcopy(model).double()
    with silence(), torch.no_grad():
        scores = completion_logprobs(model, example(), temperature=temperature, entropy=True, prompts=True)
    check(scores, exact, PROMPTS, COMPLETIONS, temperature=temperature)


class LoudLlama(LlamaForCausalLM):
    """A head that no config tells of."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output


def test_a_head_that_does_more_is_found_and_its_own_forward_used():
    torch.manual_seed(0)
    model = LoudLlama(LlamaConfig(**SIZES)).eval()
    exact = copy.deepcopy(model).double()
    with pytest.warns(UserWarning, match="LoudLlama builds whole logits in scoring") as caught:
        scores = completion_logprobs(model, example(), entropy=True, prompts=True)
    assert len(caught) == 1 and model.config._attn_implementation == "packed_sdpa"
    check(scores, exact, PROMPTS, COMPLETIONS)
    with silence():
        close(completion_logprobs(model, example()).logprobs, scores.logprobs)


@pytest.mark.parametrize("name", [*WRONG_WHEN_PACKED, *RAISE_WHEN_PACKED])
def test_a_model_that_cannot_be_packed_is_padded_with_one_warning(name):
    model = tiny(name, **(WRONG_WHEN_PACKED | RAISE_WHEN_PACKED)[name])
    exact, before = copy.deepcopy(model).double(), model.config._attn_implementation
    why = "its numbers would differ" if name in WRONG_WHEN_PACKED else "Error: "
    with pytest.warns(UserWarning, match=f"pads its batches in scoring.*{why}") as caught:
        scores = completion_logprobs(model, example(), entropy=True, prompts=True)
    assert len([w for w in caught if "in scoring" in str(w.message)]) == 1
    assert model.config._attn_implementation == before
    check(scores, exact, PROMPTS, COMPLETIONS)
    with silence():
        close(completion_logprobs(model, example()).logprobs, scores.logprobs)


@pytest.mark.parametrize("name", ["phimoe", "qwen2_moe"])
def test_a_window_that_the_attention_is_not_told_of_is_not_lost(name):
    qwen = {"use_sliding_window": True, "layer_types": WINDOWED["layer_types"], **EXPERTS}
    qwen["shared_expert_intermediate_size"] = 16
    model = tiny(name, sliding_window=24, **({"num_local_experts": 2} if name == "phimoe" else qwen))
    exact, prompt, completion = copy.deepcopy(model).double(), list(range(3, 43)), list(range(43, 52))
    scores = completion_logprobs(model, Completions.from_lists([prompt], [completion], 0))
    check(scores, exact, [prompt], [completion])


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_the_probe_leaves_modes_gradients_and_random_numbers_alone(name):
    model = tiny(name, **RAISE_WHEN_PACKED.get(name, {})).train()
    next(iter(model.base_model.children())).eval()
    modes, state = [part.training for part in model.modules()], torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        completion_logprobs(model, example())
    assert [part.training for part in model.modules()] == modes and len(set(modes)) == 2
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


# What else a model is used for


@pytest.mark.parametrize("name", PACKABLE)
def test_generation_and_padded_forwards_are_as_before(name):
    model, fresh = tiny(name, **PACKABLE[name]), tiny(name, **PACKABLE[name])
    completion_logprobs(model, example())
    assert model.config._attn_implementation.startswith("packed_")
    ids = torch.tensor([[0, 0, 7, 8, 9], [10, 11, 12, 13, 14]])
    outputs = []
    for one in (model, fresh):
        how = {"attention_mask": (ids != 0).long(), "max_new_tokens": 8, "do_sample": False}
        tokens = one.generate(ids, **how)
        with torch.no_grad():
            outputs.append((tokens, one(ids, attention_mask=how["attention_mask"]).logits, one(ids).logits))
    for got, expected in zip(*outputs):
        assert torch.equal(got, expected)


def test_saved_files_do_not_tell_of_packing(tmp_path):
    model = tiny("llama")
    scores = completion_logprobs(model, example())
    model.save_pretrained(tmp_path)
    assert "packed" not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    assert torch.equal(completion_logprobs(loaded, example()).logprobs, scores.logprobs)


def test_a_copy_of_a_packed_model_scores_too():
    model = tiny("llama")
    scores = completion_logprobs(model, example())
    twin = copy.deepcopy(model)
    with silence():
        assert torch.equal(completion_logprobs(twin, example()).logprobs, scores.logprobs)
    with torch.no_grad():
        twin.lm_head.weight.mul_(2)
    assert not torch.equal(completion_logprobs(twin, example()).logprobs, scores.logprobs)
    assert torch.equal(completion_logprobs(model, example()).logprobs, scores.logprobs)


# Precision


def test_bf16_autocast_is_near_fp32_and_returns_fp32(tiny_llama):
    make_model, _ = tiny_llama
    exact = completion_logprobs(make_model(), example(), entropy=True, prompts=True)
    with torch.autocast("cpu", dtype=torch.bfloat16), silence():
        scores = completion_logprobs(make_model(), example(), entropy=True, prompts=True)
    for got, expected in zip(scores[:3], exact[:3], strict=True):
        assert got.dtype == torch.float32 and not torch.equal(got, expected)
        close(got, expected, atol=0.05, rtol=0)


def test_bf16_weights_pack_and_return_fp32(tiny_llama):
    make_model, _ = tiny_llama
    model = make_model().bfloat16()
    with silence():
        scores = completion_logprobs(model, example())
    assert scores.logprobs.dtype == torch.float32 and model.config._attn_implementation == "packed_sdpa"
    close(scores.logprobs, completion_logprobs(make_model(), example()).logprobs, atol=0.05, rtol=0)


def test_a_quantised_base_packs(tiny_llama, tmp_path):
    make_model, _ = tiny_llama
    make_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = load_causal_lm(str(tmp_path), quantization_config=config)
    with torch.no_grad():
        with silence():
            packed = completion_logprobs(model, example(), entropy=True, prompts=True)
        with padding():
            padded = completion_logprobs(model, example(), entropy=True, prompts=True)
    assert model.config._attn_implementation == "packed_sdpa"
    for got, expected in zip(packed, padded):
        close(got, expected, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2.is_dir(), reason=f"SmolLM2 not found at {SMOLLM2}")
def test_smollm2_on_real_pairs_is_exact(shared_data):
    from datasets import load_dataset

    rows = load_dataset("json", data_files=str(shared_data / "hh_harmless_1500.jsonl.gz"), split="train[:4]")
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    prompts, completions, groups = [], [], []
    for group, row in enumerate(rows):
        for text in (row["chosen"], row["rejected"]):
            prompt, answer = text.rsplit("\n\nAssistant:", 1)
            prompts.append(tokenizer(prompt + "\n\nAssistant:")["input_ids"])
            completions.append(tokenizer(answer)["input_ids"])
            groups.append(group)
    batch = Completions.from_lists(prompts, completions, tokenizer.pad_token_id, groups=groups)
    model = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32).eval()
    exact = copy.deepcopy(model).double()
    with silence(), torch.no_grad():
        scores = completion_logprobs(model, batch)
    assert model.config._attn_implementation == "packed_sdpa"
    check(scores, exact, prompts, completions, atol=5e-5)


def test_a_prompt_learning_adapter_is_refused(tiny_llama):
    model = get_peft_model(tiny_llama[0](), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="prompt-learning adapter"):
        completion_logprobs(model, Completions.from_lists([[7]], [[8]], 0))


def test_entropies_have_a_gradient_on_request_only(tiny_llama):
    model = tiny_llama[0]()
    batch = Completions.from_lists([[7, 8]], [[9, 10]], 0)
    assert not completion_logprobs(model, batch, entropy=True).entropy.requires_grad
    assert completion_logprobs(model, batch, entropy=True, entropy_gradient=True).entropy.requires_grad
