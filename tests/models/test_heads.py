import copy

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

from lifecycle_hf.data.collators import pad_sequences
from lifecycle_hf.models.heads import RewardModel, ScalarHead, last_token_hidden

FAMILIES = {
    "llama": LlamaConfig(num_key_value_heads=2),
    "qwen2": Qwen2Config(num_key_value_heads=2),
    "qwen3": Qwen3Config(num_key_value_heads=2, head_dim=8),
    "gpt2": GPT2Config(n_inner=64),
    "phi": PhiConfig(num_key_value_heads=2),
}
EOS, PAD = 2, 0
ROWS = [[5, 6, 7, EOS], [8, EOS], [9, 10, 11, 12, 13, EOS], [14, EOS]]


def classifier(family="llama", pad=PAD):
    config = copy.deepcopy(FAMILIES[family])
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    for name, value in {**sizes, "num_attention_heads": 2}.items():
        setattr(config, name, value)
    config.pad_token_id, config.eos_token_id, config.bos_token_id, config.num_labels = pad, EOS, 1, 1
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    torch.nn.init.normal_(model.score.weight)
    return model


def scores(model, rows, pad=PAD, extra=0):
    lengths = torch.tensor([len(row) for row in rows])
    ids = pad_sequences([*rows, [pad] * (int(lengths.max()) + extra)], pad)[: len(rows)]
    with torch.no_grad():
        return RewardModel(model, tokenizer=None).score(ids, lengths)


def alone(model, rows):
    """Return reference scores: each row is run alone without padding, and its last position is scored."""
    with torch.no_grad():
        hidden = [getattr(model, model.base_model_prefix)(torch.tensor([row])).last_hidden_state for row in rows]
        return torch.stack([model.score(h[0, -1])[0] for h in hidden])


def test_scalar_head_starts_at_zero_and_computes_in_fp32():
    head = ScalarHead(3)
    assert head(torch.randn(2, 4, 3)).equal(torch.zeros(2, 4))
    head.linear.weight.data = torch.tensor([[1.0, 2.0, -1.0]])
    head.linear.bias.data = torch.tensor([0.5])
    hidden = torch.tensor([[1.0, 0.001, 3.0]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = head(hidden)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, torch.tensor([1.0 + 0.002 - 3.0 + 0.5]))


def test_scalar_head_of_bf16_parameters_returns_fp32():
    head = ScalarHead(3, bias=False, dtype=torch.bfloat16)
    assert head(torch.randn(5, 3, dtype=torch.bfloat16)).dtype == torch.float32
    assert head.linear.bias is None


def test_last_token_hidden():
    hidden = torch.arange(12.0).view(2, 3, 2)
    assert last_token_hidden(hidden, torch.tensor([2, 3])).tolist() == [[2.0, 3.0], [10.0, 11.0]]


@pytest.mark.parametrize("family", FAMILIES)
def test_score_is_the_head_on_the_last_real_token(family):
    model = classifier(family)
    torch.testing.assert_close(scores(model, ROWS), alone(model, ROWS), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("extra", [1, 3, 11])
def test_score_does_not_depend_on_the_amount_of_padding(extra):
    model = classifier()
    torch.testing.assert_close(scores(model, ROWS, extra=extra), scores(model, ROWS), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_score_does_not_depend_on_batch_size(size):
    model = classifier()
    split = torch.cat([scores(model, ROWS[i : i + size]) for i in range(0, len(ROWS), size)])
    torch.testing.assert_close(split, scores(model, ROWS), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_transformers_gives_the_same_raw_score_on_either_padding_side(side):
    model = classifier()
    ids = pad_sequences(ROWS, PAD, side=side)
    mask = pad_sequences([[1] * len(row) for row in ROWS], 0, side=side)
    with torch.no_grad():
        raw = model(ids, attention_mask=mask).logits[:, 0]
    torch.testing.assert_close(raw, scores(model, ROWS), atol=1e-6, rtol=1e-5)


def test_pad_equal_to_eos_pools_the_eos_where_transformers_pools_the_token_before():
    model = classifier(pad=EOS)
    expected = alone(model, ROWS)
    torch.testing.assert_close(scores(model, ROWS, pad=EOS, extra=2), expected, atol=1e-6, rtol=1e-5)
    ids = pad_sequences(ROWS, EOS)
    with torch.no_grad():
        stock = model(ids, attention_mask=pad_sequences([[1] * len(row) for row in ROWS], 0)).logits[:, 0]
    torch.testing.assert_close(stock, alone(model, [row[:-1] for row in ROWS]), atol=1e-6, rtol=1e-5)
    assert (stock - expected).abs().min() > 1e-3


def test_reward_center_is_subtracted():
    model = classifier()
    raw = scores(model, ROWS)
    model.config.reward_center = 0.75
    torch.testing.assert_close(scores(model, ROWS), raw - 0.75)


def test_score_of_a_lora_adapter_uses_the_adapter():
    model = classifier()
    lora = LoraConfig(task_type=TaskType.SEQ_CLS, init_lora_weights=False, modules_to_save=["score"])
    peft_model = get_peft_model(model, lora).eval()
    torch.nn.init.normal_(peft_model.get_base_model().score.modules_to_save["default"].weight)
    ids, mask = pad_sequences(ROWS, PAD), pad_sequences([[1] * len(row) for row in ROWS], 0)
    with torch.no_grad():
        expected = peft_model(ids, attention_mask=mask).logits[:, 0]
        with peft_model.disable_adapter():
            off = peft_model(ids, attention_mask=mask).logits[:, 0]
    torch.testing.assert_close(scores(peft_model, ROWS), expected, atol=1e-6, rtol=1e-5)
    assert (expected - off).abs().max() > 1e-2


def test_what_is_no_reward_model(tiny_llama):
    model = classifier()
    model.config.num_labels = 3
    with pytest.raises(ValueError, match="num_labels=3"):
        RewardModel(model, None)
    causal = tiny_llama[0]()
    causal.config.num_labels = 1
    with pytest.raises(ValueError, match="no linear head named 'score'"):
        RewardModel(causal, None)
    prompt_tuning = PromptTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=2)
    with pytest.raises(ValueError, match="prompt-learning"):
        RewardModel(get_peft_model(classifier(), prompt_tuning), None)
