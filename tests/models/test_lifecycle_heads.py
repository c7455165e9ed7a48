"""Test the heads, training with every trainer, and saved models: loaded with the package and without it."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from lifecycle_setting import SIZES, padded, shake, tiny, tokens, twins
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from lifecycle_hf import (
    LifecycleConfig,
    LifecycleForCausalLM,
    LifecycleForMaskedLM,
    LifecycleForQuestionAnswering,
    LifecycleForSequenceClassification,
    LifecycleModel,
    merge_adapter,
)
from lifecycle_hf.models.loading import prepare_quantized

close = torch.testing.assert_close
REPOSITORY = Path(__file__).resolve().parents[2]
AUTO = {
    AutoModel: LifecycleModel,
    AutoModelForCausalLM: LifecycleForCausalLM,
    AutoModelForMaskedLM: LifecycleForMaskedLM,
    AutoModelForQuestionAnswering: LifecycleForQuestionAnswering,
    AutoModelForSequenceClassification: LifecycleForSequenceClassification,
}


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_an_unknown_attention_is_refused():
    with pytest.raises(
        StrictDataclassFieldValidationError, match="(?s)'attention'.*'causal', 'prefix', 'bidirectional'.*foo"
    ):
        LifecycleConfig(attention="foo")


def test_who_leaves_attention_open():
    open_to_all = LifecycleConfig(**SIZES)
    assert LifecycleForMaskedLM(open_to_all).model.config.attention == "bidirectional"
    assert open_to_all.attention is None  # the caller's own config stays as it was
    model = LifecycleForCausalLM(open_to_all).eval()
    shake(model)
    ids = tokens(1, 5)
    changed = ids.clone()
    changed[0, 4] = 3
    assert torch.equal(model(ids).logits[:, :4], model(changed).logits[:, :4])


def test_a_bidirectional_model_predicts_no_next_token():
    with pytest.raises(ValueError, match="would see the token that it is to predict"):
        LifecycleForCausalLM(LifecycleConfig(**SIZES, attention="bidirectional"))


def test_masked_lm_loss_is_the_mean_over_labels_in_place():
    model = tiny(LifecycleForMaskedLM, None)
    ids, mask = padded([7, 4], "right")
    labels = torch.full_like(ids, -100)
    labels[0, 2], labels[0, 6], labels[1, 0] = 5, 6, 7
    out = model(ids, attention_mask=mask, labels=labels)
    logprobs = out.logits.log_softmax(-1)
    total = -(logprobs[0, 2, 5] + logprobs[0, 6, 6] + logprobs[1, 0, 7])
    close(out.loss, total / 3)
    close(model(ids, attention_mask=mask, labels=labels, num_items_in_batch=12).loss, total / 12)


def test_causal_loss_by_number_of_items():
    model, ids = tiny(), tokens(2, 5)
    logprobs = model(ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])
    close(model(ids, labels=ids).loss, -logprobs.mean())
    close(model(ids, labels=ids, num_items_in_batch=torch.tensor(20)).loss, -logprobs.sum() / 20)


def test_a_masked_lm_keeps_the_attention_of_its_config():
    ids = tokens(1, 5)
    changed = ids.clone()
    changed[0, 4] = 3
    for attention, moves in (("causal", False), ("bidirectional", True)):
        model = tiny(LifecycleForMaskedLM, attention)
        assert (not torch.equal(model(ids).logits[:, :4], model(changed).logits[:, :4])) is moves


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_classifier_pools_the_last_real_token_when_pad_is_eos(side):
    model = tiny(LifecycleForSequenceClassification, num_labels=3, pad_token_id=2)
    ids, mask = padded([7, 4, 1], side)
    ids[mask == 0] = 2
    for row in range(3):
        ids[row, mask[row].nonzero()[-1]] = 2  # ends with EOS, which pads, too
    labels = torch.tensor([0, 1, 2])
    out = model(ids, attention_mask=mask, labels=labels)
    alone = [
        model(ids[row][mask[row].bool()][None], attention_mask=torch.ones(1, n)) for row, n in enumerate([7, 4, 1])
    ]
    expected = torch.cat([one.logits for one in alone])
    close(out.logits, expected, atol=1e-5, rtol=0)
    close(out.loss, torch.nn.functional.cross_entropy(expected, labels))


@pytest.mark.parametrize("kind", ["classification", "classification without a mask", "question answering"])
def test_heads_are_llamas(kind):
    classes = (LlamaForSequenceClassification, LifecycleForSequenceClassification)
    classes = (LlamaForQuestionAnswering, LifecycleForQuestionAnswering) if "question" in kind else classes
    llama = classes[0](twins()[0].config).eval()
    model = classes[1](LifecycleConfig.from_llama(llama.config)).eval()
    weights = {name.replace("transformer.", "model."): weight for name, weight in llama.state_dict().items()}
    model.load_state_dict(weights)
    ids, mask = padded([7, 4], "right")
    given = {} if "without" in kind else {"attention_mask": mask}
    answers = {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 3])}
    answers = answers if "question" in kind else {"labels": torch.tensor([0, 1])}
    expected, got = (one(ids, **given, **answers) for one in (llama, model))
    for name in expected:
        if name != "past_key_values":
            close(got[name], expected[name], atol=1e-5, rtol=0)


def test_a_batch_whose_padding_is_unknown_is_refused():
    model = tiny(LifecycleForSequenceClassification, pad_token_id=None)
    assert model(tokens(1, 4)).logits.shape == (1, 2)
    with pytest.raises(ValueError, match="can't tell the padding"):
        model(tokens(2, 4))


@pytest.mark.parametrize("kind", [LifecycleForSequenceClassification, LifecycleForQuestionAnswering])
def test_heads_take_prefixes(kind):
    model, ids = tiny(kind, "prefix"), tokens(2, 5)
    outputs = [model(ids, prefix_lengths=torch.full((2,), n))[0] for n in (0, 4)]
    assert not torch.allclose(*outputs)


@pytest.mark.parametrize("tied", [False, True])
def test_blocks_start_as_the_identity_and_all_learn_after_one_step(tied):
    torch.manual_seed(0)
    model = LifecycleForCausalLM(LifecycleConfig(**SIZES, tie_word_embeddings=tied, attention="causal"))
    ids = tokens(2, 6)
    close(model(ids).logits, model.lm_head(model.model.norm(model.model.embed_tokens(ids))), atol=0, rtol=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    reached = []
    for _ in range(2):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        reached.append({name for name, gradient in gradients(model).items() if gradient.any()})
        optimizer.step()
    everything = {name for name, _ in model.named_parameters()}
    assert {name for name in everything if "o_proj" in name or "down_proj" in name} <= reached[0]
    assert reached[1] == everything


def test_loading_keeps_trained_residual_outputs_and_fills_missing_ones_with_zero(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(again.state_dict()[name], weight) for name, weight in model.state_dict().items())
    deeper = AutoModelForCausalLM.from_pretrained(tmp_path, num_hidden_layers=3)
    assert not deeper.model.layers[2].mlp.down_proj.weight.any() and deeper.model.layers[2].mlp.up_proj.weight.any()
    close(deeper(tokens(1, 5)).logits, model(tokens(1, 5)).logits)  # a fresh block changes nothing


@pytest.mark.parametrize("attention", ["causal", "prefix", "bidirectional"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(attention, reentrant):
    kind = LifecycleForMaskedLM if attention == "bidirectional" else LifecycleForCausalLM
    model, (ids, mask) = tiny(kind, attention).train(), padded([7, 4], "right")
    given = {"prefix_lengths": torch.tensor([3, 4])} if attention == "prefix" else {}
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        model(ids, attention_mask=mask, labels=ids, use_cache=False, **given).loss.backward()
        found.append(gradients(model))
    assert len(found[0]) == len(list(model.parameters()))
    close(found[1], found[0])


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_lora_trains_and_merges(targets, tmp_path):
    config = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    base = tiny(attention="prefix")
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
    adapted = {name.rsplit(".", 1)[-1] for name in model.targeted_module_names}
    every = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert adapted == (every if targets else {"q_proj", "v_proj"})
    ids, given = tokens(2, 6), {"prefix_lengths": torch.tensor([2, 3])}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids, **given).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    model.eval()
    merged = merge_adapter(model, tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    expected = model(input_ids=ids, **given).logits
    for one in (merged, again):
        close(one(ids, **given).logits, expected, atol=1e-4, rtol=0)
    assert (tmp_path / "merged" / "modeling_lifecycle.py").is_file()


def test_four_bit_loads_and_trains_an_adapter(tmp_path):
    exact = tiny(hidden_size=64)
    exact.save_pretrained(tmp_path)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=nf4, dtype=torch.float32)
    base = prepare_quantized(base)
    assert type(base.model.layers[0].self_attn.o_proj).__name__ == "Linear4bit"
    ids = tokens(2, 6)
    with torch.no_grad():
        rounded = copy.deepcopy(base).dequantize(dtype=torch.float32)
        close(base(ids).logits, rounded(ids).logits, atol=1e-4, rtol=0)
    assert not torch.equal(rounded.model.layers[0].mlp.up_proj.weight, exact.model.layers[0].mlp.up_proj.weight)
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad.any() for name, p in model.named_parameters() if "lora_B" in name)


def test_a_trainer_hands_prefixes_on_and_counts_items_over_accumulation(tmp_path):
    rows = [{"input_ids": tokens(6, seed=i), "prefix_lengths": torch.tensor(i % 4)} for i in range(4)]
    rows = [row | {"labels": row["input_ids"].clone()} for row in rows]
    rows[0]["labels"][2:] = -100
    finals = []
    for size, accumulation in ((4, 1), (1, 4)):
        model = tiny(attention="prefix")
        arguments = TrainingArguments(
            tmp_path, max_steps=2, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
            use_cpu=True, report_to=[], optim="sgd", learning_rate=0.1, save_strategy="no", disable_tqdm=True,
            max_grad_norm=0,
        )  # fmt: skip
        seen = []
        model.register_forward_pre_hook(lambda m, a, k, seen=seen: seen.append(k["prefix_lengths"]), with_kwargs=True)
        Trainer(model, arguments, train_dataset=rows).train()
        assert sorted(torch.cat(seen).tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]
        finals.append(model.state_dict())
    close(finals[0], finals[1], atol=1e-6, rtol=1e-5)


def test_plans_for_parallel_training_name_parts_that_exist():
    llama, model = twins()
    assert model.config.base_model_tp_plan == llama.config.base_model_tp_plan
    assert model.tp_plan == llama.tp_plan and model.tp_plan
    assert {type(layer).__name__ for layer in model.model.layers} == set(model._no_split_modules)


@pytest.mark.parametrize(("auto", "kind"), AUTO.items(), ids=lambda item: item.__name__)
def test_auto_classes_know_every_head(auto, kind, tmp_path):
    attention = "bidirectional" if kind is LifecycleForMaskedLM else "prefix"
    model = tiny(kind, attention)
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is LifecycleConfig
    again = auto.from_pretrained(tmp_path)
    assert type(again) is kind and again.config.attention == attention
    ids = tokens(2, 5)
    close(again(ids)[0], model(ids)[0])
    again.save_pretrained(tmp_path / "again")
    assert auto.from_pretrained(tmp_path / "again").config.auto_map == again.config.auto_map


def test_a_language_model_becomes_a_classifier(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
    assert type(classifier) is LifecycleForSequenceClassification
    close(classifier.model.state_dict(), model.model.state_dict())


ORDERS = [
    "import lifecycle_hf; from transformers import AutoModelForCausalLM; import peft",
    pytest.param(
        "import peft; from transformers import AutoModelForCausalLM; import lifecycle_hf", marks=pytest.mark.slow
    ),
    pytest.param(
        "import lifecycle_hf, peft; from transformers import LlamaForCausalLM, AutoModelForCausalLM",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize("order", ORDERS)
def test_importing_the_package_is_enough_in_any_order_and_brings_no_hook_and_no_trainer(order, tmp_path):
    tiny().save_pretrained(tmp_path)
    code = f"""{order}
import sys
assert not any(type(finder).__module__.startswith("lifecycle_hf") for finder in sys.meta_path)
assert not {{"lifecycle_hf.trainers", "trl"}} & sys.modules.keys()
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
assert type(model).__module__.startswith("lifecycle_hf."), type(model)
print(peft.get_peft_model(model, peft.LoraConfig()).targeted_module_names[0])"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "model.layers.0.self_attn.q_proj"


WITHOUT_THE_PACKAGE = """
import json, sys, torch
sys.path = [path for path in sys.path if path not in ("", {repository!r})]
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "lifecycle_hf":
            raise ImportError("not installed here")
sys.meta_path.insert(0, Absent())
import transformers
ids, given = torch.arange(3, 9)[None], dict(prefix_lengths=torch.tensor([4]))
model = transformers.AutoModelForCausalLM.from_pretrained("me/tiny", trust_remote_code=True)
results = [model(ids, **given).logits.double().sum().item()]
results.append(model.generate(ids, max_new_tokens=4, do_sample=False)[0, 6:].tolist())
backbone = transformers.AutoModel.from_pretrained("me/tiny", trust_remote_code=True)
results.append(backbone(ids, **given).last_hidden_state.double().sum().item())
classifier = transformers.AutoModelForSequenceClassification.from_pretrained("me/tiny", trust_remote_code=True)
fresh = transformers.AutoModelForCausalLM.from_config(model.config, trust_remote_code=True)
assert not fresh.model.layers[0].mlp.down_proj.weight.any()
model.save_pretrained({folder!r})
assert "lifecycle_hf" not in sys.modules and type(classifier).__module__.startswith("transformers_modules.")
print("\\n" + json.dumps(results))
"""


def test_a_checkpoint_on_the_hub_brings_its_code(hub, tmp_path):
    model = tiny(attention="prefix", eos_token_id=None)
    model.save_pretrained(tmp_path / "here")
    hub.repositories["me/tiny"] = {file.name: file.read_bytes() for file in (tmp_path / "here").iterdir()}
    assert {"modeling_lifecycle.py", "configuration_lifecycle.py", "model.safetensors"} <= set(hub.files("me/tiny"))
    names = {"repository": str(REPOSITORY), "folder": str(tmp_path / "there")}
    out = hub.run(WITHOUT_THE_PACKAGE.format(**names), cwd=tmp_path)
    logits, words, states = json.loads(out.strip().splitlines()[-1])
    ids, given = torch.arange(3, 9)[None], {"prefix_lengths": torch.tensor([4])}
    assert logits == pytest.approx(model(ids, **given).logits.double().sum().item(), abs=1e-6)
    assert states == pytest.approx(model.model(ids, **given).last_hidden_state.double().sum().item(), abs=1e-6)
    assert words == model.generate(ids, max_new_tokens=4, do_sample=False)[0, 6:].tolist()
    # What was saved without the package loads with it.
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "there")
    assert type(back) is LifecycleForCausalLM
    close(back.state_dict(), model.state_dict())
