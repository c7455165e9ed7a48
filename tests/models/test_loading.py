import copy
import json

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, TaskType, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from lifecycle_hf.models.loading import (
    check_adapter_base,
    end_token_ids,
    ensure_pad_token,
    is_adapter,
    load_causal_lm,
    load_classifier,
    load_reward_model,
    load_tokenizer,
    merge_adapter,
    prepare_quantized,
    save_adapter_notes,
)

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@pytest.fixture
def tokenizer(tiny_llama):
    return copy.deepcopy(tiny_llama[1])


@pytest.fixture
def base_path(tiny_llama, tmp_path):
    make_model, tokenizer = tiny_llama
    path = tmp_path / "base"
    make_model(hidden_size=64).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def save_lora(model, path, task=TaskType.CAUSAL_LM, **options):
    """Save a LoRA adapter whose product BA is not zero, with its notes."""
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(task_type=task, r=4, init_lora_weights=False, **options)).eval()
    model.save_pretrained(path)
    save_adapter_notes(model, path)
    return model, str(path)


def logits(model, ids=IDS, **inputs):
    with torch.no_grad():
        return model(ids, **inputs).logits.float()


def test_load_tokenizer(tokenizer, base_path, tmp_path):
    assert load_tokenizer(tokenizer) is tokenizer
    assert load_tokenizer(base_path).get_vocab() == tokenizer.get_vocab()
    cutting = AutoTokenizer.from_pretrained(base_path)
    cutting("a text", truncation=True, max_length=24)
    cutting.save_pretrained(tmp_path / "cutting")
    assert json.loads((tmp_path / "cutting" / "tokenizer.json").read_text())["truncation"]["max_length"] == 24
    assert load_tokenizer(str(tmp_path / "cutting")).backend_tokenizer.truncation is None
    _, adapter = save_lora(load_causal_lm(base_path), tmp_path / "adapter")
    assert load_tokenizer(adapter).get_vocab() == tokenizer.get_vocab()


def test_load_causal_lm(base_path, tmp_path):
    model = load_causal_lm(base_path)
    assert model.dtype == torch.float32
    assert load_causal_lm(model) is model
    assert load_causal_lm(base_path, init_kwargs={"dtype": "bfloat16"}).dtype == torch.bfloat16
    trained, adapter = save_lora(model, tmp_path / "adapter")
    assert is_adapter(adapter) and not is_adapter(base_path)
    loaded = load_causal_lm(adapter)
    assert isinstance(loaded, PeftModel)
    assert logits(loaded).equal(logits(trained))
    assert not any(p.requires_grad for p in loaded.parameters())
    assert any(p.requires_grad for p in load_causal_lm(adapter, is_trainable=True).parameters())


def test_checkpoints_that_lack_a_head_are_errors(base_path, tmp_path):
    with pytest.raises(ValueError, match=r"score.weight.*no trained reward head"):
        load_reward_model(base_path)
    load_classifier(base_path).save_pretrained(tmp_path / "classifier")
    with pytest.raises(ValueError, match=r"lacks weights of LlamaForCausalLM: \['lm_head.weight'\]"):
        load_causal_lm(str(tmp_path / "classifier"))


def test_load_classifier_makes_a_fresh_head(base_path):
    model = load_classifier(base_path)
    assert model.config.num_labels == 1
    assert model.score.weight.shape == (1, 64)


def test_load_reward_model_applies_the_centre(base_path, tmp_path):
    model = load_classifier(base_path).eval()
    model.config.reward_center = 0.25
    model.save_pretrained(tmp_path / "reward")
    load_tokenizer(base_path).save_pretrained(tmp_path / "reward")
    reward = load_reward_model(str(tmp_path / "reward"))
    assert not reward.training and not any(p.requires_grad for p in reward.parameters())
    assert load_reward_model(reward) is reward
    torch.testing.assert_close(reward.score(IDS, torch.tensor([6])), logits(model)[:, 0] - 0.25)
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    torch.testing.assert_close(logits(stock), logits(model))


def test_load_reward_model_without_a_tokenizer_to_find(tiny_llama):
    config = tiny_llama[0]().config
    config.num_labels = 1
    with pytest.raises(ValueError, match="pass the tokenizer"):
        load_reward_model(LlamaForSequenceClassification(config))


def test_reward_adapter_reloads_everywhere(base_path, tmp_path):
    model = load_classifier(base_path)
    model.config.reward_center, model.config.pad_token_id = -0.5, 0
    trained, adapter = save_lora(model, tmp_path / "adapter", TaskType.SEQ_CLS, modules_to_save=["score"])
    load_tokenizer(base_path).save_pretrained(adapter)
    raw = logits(trained)
    torch.testing.assert_close(load_reward_model(adapter).score(IDS, torch.tensor([6])), raw[:, 0] + 0.5)
    by_peft = AutoPeftModelForSequenceClassification.from_pretrained(adapter, num_labels=1, pad_token_id=0).eval()
    torch.testing.assert_close(logits(by_peft), raw)
    by_auto = AutoModelForSequenceClassification.from_pretrained(adapter, num_labels=1, pad_token_id=0).eval()
    torch.testing.assert_close(logits(by_auto), raw)
    merge_adapter(adapter, tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), raw, atol=1e-5, rtol=1e-5)
    assert (merged.config.reward_center, merged.config.pad_token_id, merged.config.num_labels) == (-0.5, 0, 1)


def test_end_token_ids(tiny_llama):
    make_model, tokenizer = tiny_llama
    model = make_model(eos_token_id=[2, 7])
    model.generation_config.eos_token_id = [2, 9]
    assert end_token_ids(tokenizer) == {tokenizer.eos_token_id}
    assert end_token_ids(tokenizer, model) == {2, 7, 9}


def test_ensure_pad_token_keeps_a_good_one(tiny_llama, tokenizer):
    model = tiny_llama[0]()
    assert ensure_pad_token(tokenizer, model) == 0
    assert tokenizer.pad_token == "<pad>"


def word_tokenizer(*special, unk=None, pad=None):
    """Return a tokenizer with the ids 0 <s>, 1 </s>, then `special`, then three words."""
    words = ["<s>", "</s>", *special, "a", "b", "c"]
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="a"))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token=unk,
        pad_token=pad,
        extra_special_tokens=[token for token in special if token != unk],
    )


@pytest.mark.parametrize(
    ("special", "unk", "expected"),
    [
        (["<|image_pad|>", "<|reserved_0|>", "<|right_pad_id|>"], None, "<|right_pad_id|>"),
        (["<|image_pad|>", "<unk>", "<|reserved_0|>"], "<unk>", "<|reserved_0|>"),
        (["<|image_pad|>", "<unk>"], "<unk>", "<unk>"),
    ],
)
@pytest.mark.parametrize("pad", [None, "</s>"])
def test_ensure_pad_token_prefers_a_spare_special_token(tiny_llama, special, unk, expected, pad):
    tokenizer = word_tokenizer(*special, unk=unk, pad=pad)
    model = tiny_llama[0](vocab_size=len(tokenizer), eos_token_id=1, pad_token_id=1)
    rows = len(tokenizer)
    assert ensure_pad_token(tokenizer, model) == tokenizer.pad_token_id == tokenizer.convert_tokens_to_ids(expected)
    assert tokenizer.pad_token == expected
    assert model.config.pad_token_id == model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) == rows


@pytest.mark.parametrize(("rows", "expected_rows"), [(5, 6), (8, 8)])
def test_ensure_pad_token_adds_one_where_there_is_none(tiny_llama, rows, expected_rows):
    tokenizer = word_tokenizer(pad="</s>")
    model = tiny_llama[0](vocab_size=rows, eos_token_id=1, pad_token_id=1)
    assert ensure_pad_token(tokenizer, model) == 5
    assert tokenizer.pad_token == "<|pad|>"
    assert model.get_input_embeddings().num_embeddings == expected_rows


def test_ensure_pad_token_knows_every_end_token(tiny_llama):
    """Qwen's instruct models pad with a token that their generation config lists as an end."""
    tokenizer = word_tokenizer("<|end|>", "<|fim_pad|>", pad="<|end|>")
    model = tiny_llama[0](vocab_size=len(tokenizer), eos_token_id=1)
    model.generation_config.eos_token_id = [1, 2]
    ensure_pad_token(tokenizer, model)
    assert tokenizer.pad_token == "<|fim_pad|>"


def test_pad_token_outside_the_vocabulary(tiny_llama, tokenizer):
    model = tiny_llama[0](vocab_size=len(tokenizer))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(ValueError, match=r"'\[PAD\]' \(id 384\) is outside the vocabulary of 384 tokens.*resize"):
        ensure_pad_token(tokenizer, model)


def test_adapter_with_added_pad_token_reloads(tiny_llama, tmp_path):
    tokenizer = word_tokenizer(pad="</s>")
    tiny_llama[0](vocab_size=5, eos_token_id=1, pad_token_id=1).save_pretrained(tmp_path / "base")
    model = load_classifier(str(tmp_path / "base"))
    ensure_pad_token(tokenizer, model)
    ids = torch.tensor([[2, 3, 4, 1, 5]])
    trained, adapter = save_lora(model, tmp_path / "adapter", TaskType.SEQ_CLS, modules_to_save=["score"])
    tokenizer.save_pretrained(adapter)
    reward = load_reward_model(adapter)
    assert reward.config.pad_token_id == 5
    torch.testing.assert_close(reward.score(ids, torch.tensor([4])), logits(trained, ids)[:, 0])
    by_peft = AutoPeftModelForSequenceClassification.from_pretrained(adapter, num_labels=1).eval()
    by_peft.config.pad_token_id = 5
    torch.testing.assert_close(logits(by_peft, ids), logits(trained, ids))


def test_adapter_of_another_base(base_path, tiny_llama, tmp_path):
    _, adapter = save_lora(load_causal_lm(base_path), tmp_path / "adapter")
    check_adapter_base(adapter, base_path + "/")
    with pytest.raises(ValueError, match="other/model") as error:
        check_adapter_base(adapter, "other/model")
    assert base_path in str(error.value)
    for sizes, detail in [
        ({"hidden_size": 32}, "size mismatch"),
        ({"hidden_size": 64, "num_hidden_layers": 1}, "in the checkpoint and missing in the model"),
    ]:
        other = tmp_path / f"other{sizes['hidden_size']}"
        tiny_llama[0](**sizes).save_pretrained(other)
        config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
        config["base_model_name_or_path"] = str(other)
        (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=detail) as error:
            load_causal_lm(adapter)
        assert str(other) in str(error.value) and adapter in str(error.value)


def test_adapter_without_base_name(base_path, tmp_path):
    _, adapter = save_lora(load_causal_lm(base_path), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    config["base_model_name_or_path"] = None
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="does not name its base model"):
        load_causal_lm(adapter)


def test_adapter_of_a_language_model_is_no_start_for_a_reward_model(base_path, tmp_path):
    lora = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(load_causal_lm(str(base_path)), lora).save_pretrained(tmp_path / "sft")
    with pytest.raises(ValueError, match="adapter of a language model, but a reward model is needed.*--merge"):
        load_classifier(str(tmp_path / "sft"))


def test_lora_is_the_base_at_step_0_and_merges_exactly(base_path, tmp_path):
    base = load_causal_lm(base_path)
    expected = logits(base)
    fresh = get_peft_model(copy.deepcopy(base), LoraConfig(task_type=TaskType.CAUSAL_LM, r=4)).eval()
    assert logits(fresh).equal(expected)
    model, adapter = save_lora(copy.deepcopy(base), tmp_path / "adapter")
    trained = logits(model)
    assert (trained - expected).abs().max() > 1e-2
    for name, source in (("from_path", adapter), ("from_model", model)):
        merge_adapter(source, tmp_path / name)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert (logits(merged) - trained).abs().max() < 1e-5
    assert logits(model).equal(trained), "the model given is left as it was"
    assert load_tokenizer(str(tmp_path / "from_path")).eos_token == "<eos>"
    with pytest.raises(ValueError, match="holds no adapter"):
        merge_adapter(base_path, tmp_path / "no")


@pytest.mark.parametrize("task", [TaskType.CAUSAL_LM, TaskType.SEQ_CLS])
def test_qlora_merges_into_the_dequantised_base(base_path, tmp_path, task):
    load = load_causal_lm if task == TaskType.CAUSAL_LM else load_classifier
    base = load(base_path, quantization_config=BitsAndBytesConfig(**NF4))
    if task == TaskType.SEQ_CLS:
        torch.nn.init.normal_(base.score.weight)
    full = logits(load(base_path))
    assert task == TaskType.SEQ_CLS or (logits(base) - full).abs().max() > 1e-3, "the base is quantised"
    model, adapter = save_lora(base, tmp_path / "adapter", task)
    trained = logits(model)
    for name, source in (("from_path", adapter), ("from_model", model)):
        merge_adapter(source, tmp_path / name)
        auto = AutoModelForCausalLM if task == TaskType.CAUSAL_LM else AutoModelForSequenceClassification
        merged = auto.from_pretrained(tmp_path / name)
        assert not hasattr(merged.config, "quantization_config")
        torch.testing.assert_close(logits(merged), trained, atol=1e-5, rtol=1e-5)


def test_prepare_quantized_sets_the_flag_on_every_4_bit_layer(base_path):
    from bitsandbytes.nn import Linear4bit

    model = load_causal_lm(base_path, quantization_config=BitsAndBytesConfig(**NF4))
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert layers and all(layer.support_avx512bf16_for_cpu is False for layer in layers)
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True
    wrapped = get_peft_model(model, LoraConfig(task_type=TaskType.CAUSAL_LM))
    assert prepare_quantized(wrapped) is wrapped
    assert all(layer.support_avx512bf16_for_cpu is False for layer in layers)


def test_prepare_quantized_leaves_other_models_alone(tiny_llama):
    model = tiny_llama[0]()
    assert prepare_quantized(model) is model
