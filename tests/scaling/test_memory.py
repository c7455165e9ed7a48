"""Memory worked out by counts against what a small model takes on a CPU."""

import copy
import gc
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from ppo_setting import KeepGradients, count_e, trainer
from transformers import (
    BitsAndBytesConfig,
    DynamicCache,
    GPT2Config,
    LlamaConfig,
    LlamaForSequenceClassification,
    MixtralConfig,
)

from lifecycle_hf.completions.scoring import Completions, completion_logprobs
from lifecycle_hf.models.loading import load_causal_lm
from lifecycle_hf.scaling.memory import SHAPES, Shape, estimate_memory, main

SIZES = {
    "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4,
}  # fmt: skip
LORA = {"r": 16, "target_modules": "all-linear", "lora_dropout": 0.0}


DOCUMENT = Path(__file__).parents[2] / "docs" / "scaling.md"


def distinct_bytes(tensors):
    """Bytes of all storages behind some tensors, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def quantisation(parameter):
    """The constants of a 4-bit weight."""
    state = getattr(parameter, "quant_state", None)
    return [] if state is None else [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]


def small_model(make_model, method, folder, dtype=torch.float32):
    model = make_model(**SIZES).to(dtype)
    if method != "qlora":
        return model
    model.save_pretrained(folder)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return load_causal_lm(str(folder), quantization_config=nf4, init_kwargs={"dtype": dtype})


def make_reward(config):
    config = copy.deepcopy(config)
    config.num_labels = 1
    return LlamaForSequenceClassification(config)


def part_of(model, name):
    """Which row of the estimate a parameter of an ActorCritic belongs to."""
    if model.is_value(name):
        return "value"
    if name.startswith(("reference", "rewards")):
        return "reference" if name.startswith("reference") else "reward"
    return "policy" if "lora_" in name or model.shared is None else "base"


@pytest.mark.parametrize(
    "method, value, optim",
    [
        ("full", "model", "adamw_torch"),
        ("full", "head", "adamw_torch"),
        ("lora", "adapter", "adamw_torch"),
        ("lora", "head", "adamw_torch"),
        ("lora", "model", "adamw_torch"),
        ("qlora", "adapter", "adamw_torch"),
        ("qlora", "head", "adamw_torch"),
        ("full", "model", "adamw_bnb_8bit"),
    ],
)
def test_weights_gradients_and_optimizer_of_every_role(tiny_llama, tmp_path, method, value, optim):
    model = small_model(tiny_llama[0], method, tmp_path / "base")
    peft = None if method == "full" else LoraConfig(task_type="CAUSAL_LM", **LORA)
    keep, measured = KeepGradients(), {}
    judge = make_reward(model.config) if method == "full" else count_e
    options = {"peft_config": peft, "callbacks": [keep]}
    run = trainer(tiny_llama, tmp_path, model, judge, trainer_options=options, value=value, optim=optim, max_steps=1)
    run.train()
    actor_critic = run.model
    for name, parameter in actor_critic.named_parameters():
        part, trains = part_of(actor_critic, name), parameter.requires_grad
        rows = {f"{part}, trained" if trains else part: [parameter.data]}
        if trains:
            state = run.optimizer.state[parameter]
            rows[f"{part}, AdamW"] = [x for x in state.values() if torch.is_tensor(x) and x.numel() > 1]
            rows[f"{part}, gradients"] = [keep.steps[0][name]]
        rows["NF4 constants"] = quantisation(parameter)
        for row, tensors in rows.items():
            measured.setdefault(row, []).extend(tensors)
    measured = {row: distinct_bytes(tensors) for row, tensors in measured.items()}

    options = {"dtype": "float32", "bf16": False, "optimizer_8bit": "8bit" in optim}
    options["reward"] = "model" if method == "full" else "none"
    got = estimate_memory(Shape.from_config(model.config), method=method, value=value, **options).resident
    assert {row for row, size in measured.items() if size} == {row for row, size in got.items() if size}
    for row, size in measured.items():
        assert got[row] == pytest.approx(size, rel=0.02), row


def completions(rows, prompt, completion):
    tokens = torch.randint(9, 300, (rows, prompt + completion)).tolist()
    return Completions.from_lists([row[:prompt] for row in tokens], [row[prompt:] for row in tokens], 0)


@pytest.mark.parametrize("dtype, autocast", [("float32", False), ("bfloat16", True), ("float32", True)])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_activations(tiny_llama, tmp_path, method, dtype, autocast):
    dtype = getattr(torch, dtype)
    model = small_model(tiny_llama[0], method, tmp_path, dtype)
    shape, batch = Shape.from_config(model.config), completions(2, 48, 32)
    if method != "full":
        model = get_peft_model(model, LoraConfig(**LORA))
    completion_logprobs(model.train(), batch)  # probes the model
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, []
    sizes = {p.shape for p in model.parameters()} | {p.shape[::-1] for p in model.parameters()}

    def keep(tensor):  # weights, and the copies of them that autocast makes, are no activations
        if tensor.untyped_storage().data_ptr() not in weights and tensor.shape not in sizes:
            kept.append(tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), hooks:
        completion_logprobs(model, batch)
    got = shape.activation_bytes(2 * 80, method, w=dtype.itemsize, b=2 if autocast else 4)
    assert got == pytest.approx(distinct_bytes(kept), rel=0.25)


def test_checkpointing_keeps_the_input_of_every_layer(tiny_llama):
    kept, got, batch = {}, {}, completions(2, 48, 32)
    for layers in (2, 6):
        model = tiny_llama[0](**SIZES | {"num_hidden_layers": layers}).train()
        model.activation_checkpointing_enable()
        completion_logprobs(model, batch)  # probes the model
        scores = completion_logprobs(model, batch)
        tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
        kept[layers] = distinct_bytes([x for x in tensors if x.shape == (1, 2 * 80, SIZES["hidden_size"])])
        shape = Shape.from_config(model.config)
        got[layers] = shape.activation_bytes(2 * 80, "full", w=4, b=4, checkpointing=True)
        del scores, model, tensors
    assert got[6] - got[2] == kept[6] - kept[2]


@pytest.mark.parametrize("dtype, autocast", [("float32", False), ("bfloat16", True), ("float32", True)])
def test_kv_cache(tiny_llama, dtype, autocast):
    model, cache = tiny_llama[0](**SIZES).to(getattr(torch, dtype)), DynamicCache()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(torch.ones(3, 50, dtype=torch.long), past_key_values=cache)
    measured = distinct_bytes([x for layer in cache.layers for x in (layer.keys, layer.values)])
    shape = Shape.from_config(model.config)
    assert shape.kv_cache_bytes(3, 50, w=model.dtype.itemsize) == measured


def test_known_models():
    """7B, 13B and 70B have the parameters that Llama 2's paper and checkpoints name."""
    assert [sum(shape.parameters()) for shape in SHAPES.values()] == [6_738_415_616, 13_015_864_320, 68_976_648_192]
    codes, constants = SHAPES["7B"].nf4_bytes()
    assert (codes + constants) / SHAPES["7B"].parameters()[0] == pytest.approx(0.5 + 1 / 64 + 4 / 64 / 256, rel=1e-3)


@pytest.mark.parametrize(
    "sharding, weights, gradients, optimizer",
    [
        ("ddp", 4, 4, 8),
        ("zero1", 2, 2, 1.5),
        ("zero2", 2, 0.25, 1.5),
        ("zero3", 0.25, 0.25, 1.5),
        ("fsdp2", 0.5, 0.5, 1),
    ],
)
def test_sharding(sharding, weights, gradients, optimizer):
    """Bytes per weight and GPU of a policy trained whole in bf16 on 8 GPUs."""
    got = estimate_memory(SHAPES["7B"], method="full", value="none", sharding=sharding, gpus=8).resident
    count = sum(SHAPES["7B"].parameters())
    for part, size in (("trained", weights), ("gradients", gradients), ("AdamW", optimizer)):
        assert got[f"policy, {part}"] == round(count * size)
    assert got["reference"] == got["policy, trained"]


def test_what_only_some_runs_have():
    def total(method="lora", **options):
        return estimate_memory(SHAPES["7B"], method=method, **options)

    linear, base = SHAPES["7B"].parameters()[0], 2 * sum(SHAPES["7B"].parameters())
    assert total(value="head").total < total(value="adapter").total < total(value="model").total
    assert total(merge_adapter=True).total - total().total == 2 * linear
    assert total("qlora", merge_adapter=True).total < total("lora").total
    assert total(sharding="zero3", gpus=8).decoding["gathered policy"] > 7 / 8 * base
    assert total(dtype="float32").decoding["merged copy"] == 4 * linear
    assert total(use_vllm=True).decoding == {"gathered policy": 0, "merged copy": 2 * linear}
    assert total(reward="model").total - total().total == base - 2 * 31999 * 4096
    assert total(ptx_tokens=512).training["activations"] > total().training["activations"]
    settled, joint = (total(sharding=s, gpus=8).training["activations"] for s in ("zero2", "zero3"))
    assert joint == 2 * settled


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "lra"}, "method='lra' is unknown: choose one of full, lora, qlora"),
        ({"sharding": "zero4"}, "sharding='zero4' is unknown"),
        ({"method": "full", "value": "adapter"}, "no base to share"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        estimate_memory(SHAPES["7B"], **options)


@pytest.mark.parametrize("config, message", [(GPT2Config(), "'gpt2' has no"), (MixtralConfig(), "has .*expert")])
def test_other_architectures_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        Shape.from_config(config)


def test_command(tmp_path, capsys):
    config = LlamaConfig(**SIZES, vocab_size=384)
    config.save_pretrained(tmp_path)
    main(["--model", str(tmp_path), "--method", "qlora", "--value", "head", "--gpus", "8"])
    expected = estimate_memory(Shape.from_config(config), method="qlora", value="head", gpus=8)
    assert capsys.readouterr().out.strip() == str(expected)


def test_figures_of_the_document(capsys):
    rows = re.findall(r"^\| `(--model .*?)` .* ([\d.]+) \| [\w ]+ \|$", DOCUMENT.read_text(), re.MULTILINE)
    assert len(rows) > 20
    for options, total in rows:
        main(options.split())
        assert float(capsys.readouterr().out.split()[-2]) == pytest.approx(float(total), abs=0.06), options
