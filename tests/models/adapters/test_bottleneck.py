"""The bottleneck adapter: by hand, the identity at the start, and whatever PEFT does with an adapter."""

import copy

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel, BitsAndBytesConfig

from lifecycle_hf import BottleneckConfig
from lifecycle_hf.models.adapters.bottleneck import NON_LINEARITIES, TARGETS, BottleneckLayer
from lifecycle_hf.models.adapters.limits import can_merge
from lifecycle_hf.models.loading import load_causal_lm, merge_adapter

SIZES = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
OWN = {
    "bart": {"d_model": 32, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48},
    "gemma3_text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "lifecycle": {"attention": "causal"},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "qwen3_moe": {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16},
    "t5": {"d_kv": 8, "d_ff": 48, "num_decoder_layers": 2},
}
ADAPTERS = {
    "lifecycle": 4, "llama": 4, "qwen3": 4, "gemma3_text": 4, "gpt2": 4, "bert": 4, "roberta": 4, "opt": 4,
    "qwen3_moe": 4, "t5": 10, "bart": 7,
}  # fmt: skip
"""Adapters of two layers, for BART and T5 of encoder and decoder; a layer that reads an encoder has one more."""


def tiny(kind, **options):
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(kind, **SIZES | OWN.get(kind, {}) | options)).eval()
    for parameter in model.parameters():
        if kind == "lifecycle" and not parameter.any():  # its projections start at 0, behind which no adapter trains
            nn.init.normal_(parameter, std=0.1)
    return model


def states(model):
    ids = torch.arange(1, 13).view(2, 6)
    given = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **given).last_hidden_state


def random(**options):
    """Adapters that are not the identity."""
    return BottleneckConfig(init_bottleneck_weights=False, **{"bottleneck_size": 3} | options)


def layer(config, width=2):
    base = nn.Linear(width, width, bias=False)
    nn.init.eye_(base.weight)
    return BottleneckLayer(base, "a", config, width)


def fill(made, name, down, down_bias, up, up_bias):
    for linear, weight, bias in (
        (made.bottleneck_down[name], down, down_bias),
        (made.bottleneck_up[name], up, up_bias),
    ):
        linear.weight.data, linear.bias.data = torch.tensor(weight), torch.tensor(bias)


def test_output_by_hand():
    """h = (1, 2): h·(3, −1) + ½ = 1½, relu leaves it, 1½·(2, −4) + (¼, 1) = (3¼, −5), and h is added."""
    made = layer(BottleneckConfig(bottleneck_size=1, non_linearity="relu"))
    fill(made, "a", [[3.0, -1.0]], [0.5], [[2.0], [-4.0]], [0.25, 1.0])
    assert made(torch.tensor([[1.0, 2.0]])).tolist() == [[4.25, -3.0]]
    # h = (0, 2): −2 + ½ < 0, so that b_up alone is added
    assert made(torch.tensor([[0.0, 2.0]])).tolist() == [[0.25, 3.0]]


def test_stacked_adapters_by_hand():
    """The second adapter reads what the first gives, (4¼, −3): 4¼ − 3 = 1¼, times (4, 8) is (5, 10)."""
    made = layer(BottleneckConfig(bottleneck_size=1, non_linearity="relu"))
    made.update_layer("b", BottleneckConfig(bottleneck_size=1, non_linearity="relu"))
    fill(made, "a", [[3.0, -1.0]], [0.5], [[2.0], [-4.0]], [0.25, 1.0])
    fill(made, "b", [[1.0, 1.0]], [0.0], [[4.0], [8.0]], [0.0, 0.0])
    made.set_adapter(["a", "b"])
    assert made(torch.tensor([[1.0, 2.0]])).tolist() == [[9.25, 7.0]]


@pytest.mark.parametrize("name", NON_LINEARITIES)
def test_every_non_linearity_is_that_of_its_name(name):
    made = layer(random(non_linearity=name, use_bias=False))
    x, down, up = torch.randn(5, 2), made.bottleneck_down["a"].weight, made.bottleneck_up["a"].weight
    by_name = {"silu": nn.SiLU, "gelu": nn.GELU, "relu": nn.ReLU, "tanh": nn.Tanh, "leaky_relu": nn.LeakyReLU}
    torch.testing.assert_close(made(x), x + by_name[name]()(x @ down.T) @ up.T)
    assert down.shape == (3, 2) and made.bottleneck_up["a"].bias is None


@pytest.mark.parametrize("kind", ADAPTERS)
def test_starts_as_the_base_trains_adapters_alone_and_can_be_turned_off(kind):
    base = tiny(kind).requires_grad_(False)  # T5's position bias, if it trains, takes another attention kernel
    plain = states(base)
    model = get_peft_model(base, BottleneckConfig(reduction_factor=8))
    assert torch.equal(states(model), plain)
    layers = [module for module in model.modules() if isinstance(module, BottleneckLayer)]
    assert len(layers) == ADAPTERS[kind]
    assert all(made.bottleneck_down["default"].weight.shape == (4, 32) for made in layers)
    states(model).square().sum().backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    assert moved == {name for name, _ in model.named_parameters() if ".bottleneck_" in name}
    with torch.no_grad():
        for made in layers:
            made.bottleneck_up["default"].weight.normal_()
    assert not torch.equal(states(model), plain)
    with model.disable_adapter():
        assert torch.equal(states(model), plain)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_reloads_to_the_bit_from_adapters_alone(kind, tmp_path):
    model = get_peft_model(tiny(kind), random()).eval()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == 4 * ADAPTERS[kind] and all(".bottleneck_" in name for name in saved)
    assert isinstance(PeftConfig.from_pretrained(str(tmp_path)), BottleneckConfig)
    again = PeftModel.from_pretrained(tiny(kind), tmp_path)
    assert torch.equal(states(again), states(model))


def test_auto_class_reloads(tiny_llama, tmp_path):
    make_model, _ = tiny_llama
    make_model().save_pretrained(tmp_path / "base")
    model = get_peft_model(load_causal_lm(str(tmp_path / "base")), random(task_type="CAUSAL_LM")).eval()
    model.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(1, 9)[None]
    for load in (AutoPeftModelForCausalLM.from_pretrained, load_causal_lm):
        assert torch.equal(load(str(tmp_path / "adapter")).eval()(ids).logits, model(ids).logits)


def test_merging_is_refused_whichever_way_it_is_asked_for(tiny_llama, tmp_path):
    make_model, tokenizer = tiny_llama
    make_model().save_pretrained(tmp_path / "base"), tokenizer.save_pretrained(tmp_path / "base")
    model = get_peft_model(load_causal_lm(str(tmp_path / "base")), random(task_type="CAUSAL_LM")).eval()
    model.save_pretrained(tmp_path / "adapter")
    plain = model(torch.tensor([[1, 2]])).logits
    asked = (
        model.merge_and_unload,
        model.merge_adapter,
        lambda: merge_adapter(model, tmp_path / "merged"),
        lambda: merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged"),
    )
    for merge in asked:
        with pytest.raises(ValueError, match="can't be merged: it is not linear.*train LoRA"):
            merge()
    assert torch.equal(model(torch.tensor([[1, 2]])).logits, plain) and not (tmp_path / "merged").exists()


def test_only_layers_that_merge_can_be_merged(tiny_llama):
    make_model, _ = tiny_llama
    lora = LoraConfig(target_modules=["q_proj"])
    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    found = [can_merge(get_peft_model(make_model(), config)) for config in (lora, BottleneckConfig(), prefix)]
    assert found == [True, False, False]


def test_several_adapters_switch_stack_and_go():
    base = tiny("llama")
    model = get_peft_model(base, random(), adapter_name="one")
    model.add_adapter("two", random(bottleneck_size=5, placement="ffn", non_linearity="tanh"))
    assert {n for n, p in model.named_parameters() if p.requires_grad and ".two." in n} == set()
    one = states(model)
    model.set_adapter("two")
    two = states(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".two." in name} and len(trained) == 2 * 4
    assert not torch.equal(one, two)
    model.base_model.set_adapter(["one", "two"])
    stacked = states(model)
    model.base_model.set_adapter(["two", "one"])
    assert not torch.equal(stacked, states(model)) and not torch.equal(stacked, one)
    model.set_adapter("one")
    assert torch.equal(states(model), one)
    model.set_adapter("two")
    model.delete_adapter("one")
    assert model.active_adapters == ["two"] and torch.equal(states(model), two)
    assert torch.equal(states(model.unload()), states(tiny("llama")))


@pytest.mark.parametrize(("placement", "expected"), [("attention", "o_proj"), ("ffn", "down_proj")])
def test_placement_chooses_the_outputs(placement, expected):
    model = get_peft_model(tiny("llama"), BottleneckConfig(placement=placement))
    names = {name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, BottleneckLayer)}
    assert names == {expected}


def test_modules_by_name_and_modules_that_return_tuples():
    """Behind the whole attention the adapter gives what it gives behind its output projection."""
    by_projection = get_peft_model(tiny("llama"), random(target_modules=["o_proj", "down_proj"]))
    by_block = get_peft_model(tiny("llama"), random(target_modules=["self_attn", "mlp"]))
    weights = {name: p for name, p in by_projection.named_parameters() if ".bottleneck_" in name}
    for name, parameter in by_block.named_parameters():
        if ".bottleneck_" in name:
            source = name.replace("self_attn.b", "self_attn.o_proj.b").replace("mlp.b", "mlp.down_proj.b")
            parameter.data.copy_(weights[source])
    torch.testing.assert_close(states(by_block), states(by_projection), rtol=0, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["llama", "lifecycle", "gpt2"])
def test_checkpointing_changes_no_gradient(kind, reentrant):
    gradients = []
    for on in (False, True):
        model = get_peft_model(tiny(kind), BottleneckConfig(reduction_factor=8)).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if on:
            model.enable_input_require_grads()
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if ".bottleneck_" in name:
                nn.init.normal_(parameter, std=0.1)
        states(model).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(gradient.abs().max() > 0 for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-7)


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_a_quantised_base_trains_and_reloads(bits, tiny_llama, tmp_path):
    make_model, _ = tiny_llama
    make_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")

    def base():
        return load_causal_lm(str(tmp_path / "base"), quantization_config=BitsAndBytesConfig(**{bits: True}))

    plain = base()
    ids = torch.arange(1, 17)[None]
    expected = plain(ids).logits
    model = get_peft_model(plain, BottleneckConfig(task_type="CAUSAL_LM"))
    assert torch.equal(model(ids).logits, expected)
    assert {p.dtype for n, p in model.named_parameters() if p.requires_grad} == {torch.float32}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        losses.append(model(ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step(), optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.05
    model.save_pretrained(tmp_path / "adapter")
    assert all(".bottleneck_" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    again = PeftModel.from_pretrained(base(), tmp_path / "adapter")
    assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)


def test_a_bf16_base_has_adapters_in_fp32():
    model = get_peft_model(tiny("llama").bfloat16(), random())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert states(model).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert states(model).dtype == torch.bfloat16


def test_heads_are_saved_beside_the_adapters(tmp_path):
    from transformers import LlamaForSequenceClassification

    def classifier():
        torch.manual_seed(0)
        return LlamaForSequenceClassification(tiny("llama", num_labels=3).config)

    config = random(task_type="SEQ_CLS", modules_to_save=["score"])
    model = get_peft_model(classifier(), copy.deepcopy(config)).eval()
    nn.init.ones_(model.base_model.model.score.modules_to_save["default"].weight)
    model.save_pretrained(tmp_path)
    ids = torch.arange(1, 9)[None]
    assert torch.equal(PeftModel.from_pretrained(classifier(), tmp_path)(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction_factor": 4, "bottleneck_size": 8}, "give one of reduction_factor and bottleneck_size"),
        ({"reduction_factor": 0}, r"'reduction_factor': 0.*greater than 0"),
        ({"bottleneck_size": -1}, r"'bottleneck_size': -1.*greater than 0"),
        ({"non_linearity": "swish"}, "non_linearity='swish': choose one of gelu"),
        ({"placement": "output"}, "placement='output': choose one of attention, ffn, both"),
    ],
)
def test_a_bad_configuration_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BottleneckConfig(**options)


def test_an_unknown_architecture_needs_names():
    base = tiny("gpt_neox")
    with pytest.raises(ValueError, match="model type 'gpt_neox': set target_modules"):
        get_peft_model(base, BottleneckConfig())
    plain = states(base)
    model = get_peft_model(base, BottleneckConfig(target_modules=["attention.dense", "dense_4h_to_h"]))
    assert torch.equal(states(model), plain) and "gpt_neox" not in TARGETS
    assert not any(isinstance(module, LoraLayer) for module in model.modules())
