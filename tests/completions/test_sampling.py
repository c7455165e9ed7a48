from collections import Counter

import pytest
import torch
from transformers import (
    Lfm2Config,
    Lfm2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from lifecycle_hf.completions.sampling import generate, stop_token_ids

OPTIONS = {"max_new_tokens": 12, "temperature": 1.0, "stop_token_ids": [2], "pad_token_id": 0}


def test_the_models_own_generation_config_plays_no_part(tiny_llama):
    make_model, _ = tiny_llama
    clean, leaky = make_model(), make_model()
    own = leaky.generation_config
    own.top_k, own.top_p, own.repetition_penalty, own.do_sample, own.min_new_tokens = 1, 0.1, 5.0, True, 9
    own.suppress_tokens = list(range(100))
    prompts = [[7, 8, 9], [10]]
    assert generate(leaky, prompts, **OPTIONS, generator_seed=3) == generate(
        clean, prompts, **OPTIONS, generator_seed=3
    )
    assert leaky.generation_config is own and own.top_k == 1


def test_sampling_is_untruncated_and_at_the_temperature(tiny_llama):
    make_model, _ = tiny_llama
    model = make_model(vocab_size=8)
    logits = torch.tensor([0.0, -9.0, -9.0, 1.0, 2.0, 3.0, -9.0, -9.0])
    model.lm_head = torch.nn.Linear(32, 8)
    with torch.no_grad():
        model.lm_head.weight.zero_(), model.lm_head.bias.copy_(logits)
    options = OPTIONS | {"max_new_tokens": 1, "temperature": 2.0}
    n = 4000
    counts = Counter(row[0] for row in generate(model, [[5]] * n, **options, generator_seed=0))
    for token, p in enumerate(torch.softmax(logits / 2, -1).tolist()):
        assert counts[token] / n == pytest.approx(p, abs=4 * (p * (1 - p) / n) ** 0.5 + 1e-3)


def test_completion_ends_with_its_stop_token_even_where_it_is_the_pad_token(tiny_llama):
    make_model, _ = tiny_llama
    model = make_model(vocab_size=8)
    model.lm_head = torch.nn.Linear(32, 8)
    with torch.no_grad():
        model.lm_head.weight.zero_(), model.lm_head.bias.copy_(torch.tensor([1.0, 0, 2.0, 0, 0, 0, 0, 0]))
    rows = generate(model, [[5], [5, 6, 7]] * 20, **(OPTIONS | {"pad_token_id": 2, "max_new_tokens": 5}))
    for row in rows:
        assert 2 not in row[:-1] and (row[-1] == 2 or len(row) == 5)
    assert any(len(row) < 5 for row in rows) and {len(row) for row in rows} != {1}


def test_batching_gives_the_same_greedy_completions(tiny_llama):
    make_model, _ = tiny_llama
    model, prompts = make_model(), [[7, 8, 9], [10], [11, 12], [13]]
    greedy = OPTIONS | {"temperature": 0.0}
    assert generate(model, prompts, **greedy) == generate(model, prompts, **greedy, batch_size=1)


def test_train_mode_is_restored_and_off_while_decoding(tiny_llama):
    make_model, _ = tiny_llama
    model = make_model(attention_dropout=0.9).train()
    modes = []
    model.model.register_forward_hook(lambda module, *_: modes.append(module.training))
    generate(model, [[7]], **OPTIONS)
    assert model.training and modes and not any(modes)


def test_stop_tokens(tiny_llama):
    make_model, tokenizer = tiny_llama
    model = make_model()
    model.generation_config.eos_token_id = [2, 5]
    assert stop_token_ids(model, tokenizer) == [2, 5]
    assert stop_token_ids(model, tokenizer, ["<|user|>"]) == [tokenizer.convert_tokens_to_ids("<|user|>")]
    with pytest.raises(ValueError, match="'<nope>' is not a token"):
        stop_token_ids(model, tokenizer, ["<nope>"])


def test_finished_rows_leave_the_batch_and_change_nothing(tiny_llama):
    make_model, _ = tiny_llama
    model = make_model(vocab_size=8)
    model.lm_head = torch.nn.Linear(32, 8)
    with torch.no_grad():
        model.lm_head.bias[2] = 1.0  # ends often
    prompts = [[5, 6, 7][: 1 + i % 3] * (1 + i % 4) for i in range(24)]
    options = OPTIONS | {"max_new_tokens": 40}
    alone = generate(model, prompts, **(options | {"temperature": 0.0}), batch_size=1)
    widths = []
    hook = model.model.register_forward_pre_hook(
        lambda m, args, kwargs: widths.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    assert generate(model, prompts, **(options | {"temperature": 0.0})) == alone
    widths.clear()
    rows = generate(model, prompts, **options, generator_seed=1)
    hook.remove()
    lengths = sorted(map(len, rows))
    assert lengths[0] < lengths[-1] and widths == sorted(widths, reverse=True)
    needed = sum(lengths)
    # A row stays at most until an eighth of those beside it have ended.
    assert len(widths) == lengths[-1] and needed <= sum(widths) <= needed * 8 / 7 + len(widths)


SMALL = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32}
LINEAR = {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 1,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
HYBRID = {"layer_types": ["linear_attention", "full_attention"], "head_dim": 16, "num_experts": 0}


RECURRENT = [
    lambda: MambaForCausalLM(MambaConfig(**SMALL, state_size=4)),
    lambda: Lfm2ForCausalLM(Lfm2Config(**SMALL, **HEADS, layer_types=["conv", "full_attention"])),
    lambda: Qwen3NextForCausalLM(Qwen3NextConfig(**SMALL, **HEADS, **LINEAR, **HYBRID)),
]


@pytest.mark.parametrize("make", RECURRENT)
def test_recurrent_models_keep_finished_rows_until_all_have_ended(make):
    torch.manual_seed(0)
    model = make().eval()
    prompts = [[5, 6, 7]] * 8  # of one length: recurrent states read padding, too
    rows = generate(model, prompts, **OPTIONS | {"stop_token_ids": [2, 3, 4, 5, 6, 7, 8]}, generator_seed=0)
    assert len({len(row) for row in rows}) > 1
    for row in rows:
        logits = model(torch.tensor([[5, 6, 7, *row]]), use_cache=False).logits
        assert torch.isfinite(logits).all() and (row[-1] in range(2, 9) or len(row) == 12)
    greedy = OPTIONS | {"temperature": 0.0, "stop_token_ids": [2]}
    assert generate(model, [[5, 6], [9, 8]], **greedy) == [generate(model, [p], **greedy)[0] for p in ([5, 6], [9, 8])]


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_completions_of_one_prompt_are_those_of_its_copies(tiny_llama, captured, temperature):
    model, prompts = tiny_llama[0](), [[7, 8, 9], [10], [11, 12]]
    options = OPTIONS | {"temperature": temperature, "generator_seed": 3, "captured": captured}
    copies = generate(model, [row for row in prompts for _ in range(4)], **options)
    assert generate(model, prompts, **options, num_generations=4) == copies
    if temperature:
        assert len(set(map(tuple, copies))) > 6


def test_a_prompt_is_read_once_for_all_its_completions(tiny_llama):
    model, sizes = tiny_llama[0](), []
    generate(model, [[5]], **OPTIONS, num_generations=2)  # which probes the model
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: sizes.append(tuple(args[0].shape)))
    generate(model, [[7, 8, 9], [10, 11]], **OPTIONS, num_generations=4, batch_size=1)
    assert sizes[0] == (1, 3) and sizes[1] == (4, 1) and sizes.count((1, 2)) == 1


@pytest.mark.parametrize("make", RECURRENT)
def test_recurrent_models_read_the_prompt_for_each_completion(make):
    model, options = make().eval(), OPTIONS | {"generator_seed": 3, "max_new_tokens": 5}
    prompts = [[7, 8, 9], [10, 11, 12]]
    copies = generate(model, [row for row in prompts for _ in range(3)], **options)
    with pytest.warns(UserWarning, match="can't be repeated"):
        assert generate(model, prompts, **options, num_generations=3) == copies
    assert generate(model, prompts, **options, num_generations=3) == copies  # and warns no more
