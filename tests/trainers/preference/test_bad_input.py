"""Input that makes a preference run wrong raises an error before training, which names the place and the mend."""

import copy
import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from preference_setting import ANSWERS, OPTIONS, PAIRS, trainer
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from lifecycle_hf import DPOTrainer, IPOTrainer, KTOTrainer, ORPOTrainer, PreferenceTrainer
from lifecycle_hf.trainers.preference.config import KTOConfig, PreferenceConfig

ASK = [{"role": "user", "content": "Hi"}]
TRAINERS = [DPOTrainer, IPOTrainer, ORPOTrainer, KTOTrainer]


class NoStep(TrainerCallback):
    """Fail when a training step begins."""

    def on_step_begin(self, args, state, control, **kwargs):
        pytest.fail("a training step ran")


def refused(tiny_llama, tmp_path, message, cls=DPOTrainer, resume=None, trainer_options=None, **options):
    """Check that the trainer, or its `train`, raises a ValueError with `message` before any step."""
    with pytest.raises(ValueError, match=f"(?s){message}"):
        trainer(
            tiny_llama, tmp_path, cls, trainer_options={"callbacks": [NoStep()]} | (trainer_options or {}), **options
        ).train(resume_from_checkpoint=resume)


@pytest.mark.parametrize(("label", "said"), [(True, "True"), (False, "False")])
def test_kto_of_one_class(tiny_llama, tmp_path, label, said):
    data = Dataset.from_list([row | {"label": label} for row in ANSWERS])
    message = f"train_dataset: all 8 answers have the label {said}; .*Check the column 'label'"
    refused(tiny_llama, tmp_path, message, KTOTrainer, dataset=data)


def test_kto_of_one_class_once_bad_rows_are_dropped(tiny_llama, tmp_path):
    rows = [row | ({"completion": ""} if row["label"] else {}) for row in ANSWERS]
    with pytest.warns(UserWarning, match="4 of 8 rows .*4 empty completion"):
        refused(tiny_llama, tmp_path, "all 4 answers .* label False", KTOTrainer, dataset=Dataset.from_list(rows))


def test_kto_of_one_prompt(tiny_llama, tmp_path):
    data = Dataset.from_list([row | {"prompt": "Tell me"} for row in ANSWERS])
    message = "train_dataset: all 8 rows have the same prompt.*reference_point='running_mean'"
    refused(tiny_llama, tmp_path, message, KTOTrainer, dataset=data)
    run = trainer(tiny_llama, tmp_path, KTOTrainer, dataset=data, reference_point="running_mean", max_steps=1)
    assert run.train().global_step == 1


def test_kto_of_one_held_out_prompt(tiny_llama, tmp_path):
    held_out = {"eval_dataset": ANSWERS.select([0])}
    refused(tiny_llama, tmp_path, "eval_dataset: all 1 rows have the same", KTOTrainer, trainer_options=held_out)


def test_unknown_objective(tiny_llama, tmp_path):
    message = "objective='dop' is unknown: choose one of dpo, ipo, orpo"
    refused(tiny_llama, tmp_path, message, PreferenceTrainer, trainer_options={"objective": "dop"})


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (IPOTrainer, {"label_smoothing": 0.1}),
        (ORPOTrainer, {"label_smoothing": 0.1}),
        (DPOTrainer, {"nll_on_prompt": True}),
        (IPOTrainer, {"nll_on_prompt": True}),
        (DPOTrainer, {"length_normalize": False}),
        (ORPOTrainer, {"length_normalize": False}),
    ],
)
def test_option_that_the_objective_does_not_read(tiny_llama, tmp_path, cls, options):
    ((name, value),) = options.items()
    refused(tiny_llama, tmp_path, f"{name}={value} is set, but this objective does not read it", cls, **options)


def test_precompute_without_a_reference(tiny_llama, tmp_path):
    message = "precompute_ref_log_probs is on, but this objective has no reference: turn it off"
    refused(tiny_llama, tmp_path, message, ORPOTrainer, precompute_ref_log_probs=True)


@pytest.mark.parametrize("config", [PreferenceConfig, KTOConfig])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta=0.0 must be above 0"),
        ({"beta": -0.1}, "beta=-0.1 must be above 0"),
        ({"beta": float("nan")}, "beta=nan must be above 0"),
        ({"max_length": 1}, "max_length=1 leaves no room for a prompt and a completion"),
        ({"max_length": -5}, "max_length=-5 leaves no room"),
        ({"ref_log_probs_path": "kept"}, "ref_log_probs_path is set, but precompute_ref_log_probs is off: turn it on"),
        ({"remove_unused_columns": True}, "remove_unused_columns=True would take needed columns away"),
    ],
)
def test_options_of_both(tmp_path, config, options, message):
    with pytest.raises(ValueError, match=message):
        config(str(tmp_path), **OPTIONS | options)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (PreferenceConfig, {"label_smoothing": 0.5}, r"label_smoothing=0.5 must lie in \[0, 0.5\)"),
        (PreferenceConfig, {"label_smoothing": -0.1}, "label_smoothing=-0.1 must lie in"),
        (KTOConfig, {"desirable_weight": 0.0}, "desirable_weight=0.0 must be above 0"),
        (KTOConfig, {"undesirable_weight": -1.0}, "undesirable_weight=-1.0 must be above 0"),
        (KTOConfig, {"reference_point": "mean"}, "reference_point='mean' is unknown.*mismatched, running_mean"),
    ],
)
def test_options_of_one(tmp_path, config, options, message):
    with pytest.raises(ValueError, match=message):
        config(str(tmp_path), **OPTIONS | options)


@pytest.mark.parametrize("config", [PreferenceConfig, KTOConfig])
def test_bounds_that_are_still_good(tmp_path, config):
    args = config(str(tmp_path), **OPTIONS | {"max_length": None, "beta": 1e-3})
    assert args.max_length is None
    assert config(str(tmp_path), **OPTIONS | {"max_length": 2}).max_length == 2


@pytest.mark.parametrize("cls", TRAINERS)
def test_no_dataset_or_no_row(tiny_llama, tmp_path, cls):
    refused(tiny_llama, tmp_path, f"{cls.__name__}: train_dataset is missing", cls, dataset=None)
    refused(tiny_llama, tmp_path, "train_dataset is empty", cls, dataset=PAIRS.select([]))
    refused(tiny_llama, tmp_path, "streamed", cls, dataset=PAIRS.to_iterable_dataset())


@pytest.mark.parametrize(
    ("cls", "old", "new"),
    [(DPOTrainer, "chosen", "choosen"), (KTOTrainer, "label", "lable"), (ORPOTrainer, "rejected", "reject")],
)
def test_misspelt_columns(tiny_llama, tmp_path, cls, old, new):
    data = (ANSWERS if old == "label" else PAIRS).rename_column(old, new)
    message = rf"train_dataset.*\['{old}'\] is missing.*'{new}' looks like a misspelt '{old}'"
    refused(tiny_llama, tmp_path, message, cls, dataset=data)


def test_bad_rows_are_dropped_with_a_count_or_refused(tiny_llama, tmp_path):
    data = Dataset.from_list([*PAIRS, PAIRS[0] | {"rejected": ""}])
    with pytest.warns(UserWarning, match="eval_dataset: 1 of 9 rows.*the first is row 8"):
        run = trainer(tiny_llama, tmp_path, trainer_options={"eval_dataset": data})
    assert len(run.eval_dataset) == 8
    refused(tiny_llama, tmp_path, "train_dataset: 1 of 9 .*strict_data is on", dataset=data, strict_data=True)


def test_checkpoint_that_lacks_weights(tiny_llama, tmp_path):
    make_model, tokenizer = tiny_llama
    make_model().save_pretrained(tmp_path / "base"), tokenizer.save_pretrained(tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    message = r"lacks weights of LlamaForCausalLM: \['model.layers.1.mlp.up_proj.weight'\]"
    for cls in TRAINERS:
        refused(tiny_llama, tmp_path / "out", message, cls, model=str(tmp_path / "base"))
    reference = {"ref_model": str(tmp_path / "base")}
    refused(tiny_llama, tmp_path / "out", message, trainer_options=reference)


def test_tokenizer_that_lacks_something(tiny_llama, tmp_path):
    make_model, tokenizer = tiny_llama
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    sides = [[{"role": "assistant", "content": text}] for text in ("Yes", "No")]
    pairs = Dataset.from_list([{"prompt": ASK, "chosen": sides[0], "rejected": sides[1]}] * 2)
    said = Dataset.from_list([{"prompt": ASK, "completion": sides[i], "label": i == 0} for i in range(2)])
    for cls, data in ((DPOTrainer, pairs), (ORPOTrainer, pairs), (KTOTrainer, pairs), (KTOTrainer, said)):
        message = "train_dataset holds chat messages, but the tokenizer has no chat template"
        refused((make_model, bare), tmp_path, message, cls, dataset=data)
    bare.eos_token = None
    refused((make_model, bare), tmp_path, "no EOS token")
    far = copy.deepcopy(tokenizer)
    far.add_special_tokens({"pad_token": "<|nowhere|>"})
    refused((make_model, far), tmp_path, r"pad token '<\|nowhere\|>' .*outside the vocabulary")


def saved(tiny_llama, folder, cls=DPOTrainer, model=None, peft=None, **options):
    """The checkpoint of a run of one step."""
    trainer_options = {"peft_config": peft}
    run = trainer(
        tiny_llama, folder, cls, model, max_steps=1, save_strategy="steps", save_steps=1,
        trainer_options=trainer_options, **options,
    )  # fmt: skip
    run.train()
    return str(folder / "checkpoint-1")


@pytest.mark.parametrize("cls", [DPOTrainer, KTOTrainer])
def test_resume_from_a_checkpoint_of_another_model(tiny_llama, tmp_path, cls):
    """The message names what differs, and the model is left as it was."""
    make_model, _ = tiny_llama
    checkpoint = saved(tiny_llama, tmp_path / "one", cls)
    for options, difference in (
        ({"hidden_size": 16}, "its hidden_size is 32, the model here has 16"),
        ({"num_hidden_layers": 1}, "its num_hidden_layers is 2, the model here has 1"),
    ):
        model = make_model(**options)
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        message = f"checkpoint .* belongs to another base model: {difference}"
        refused(tiny_llama, tmp_path / "two", message, cls, resume=checkpoint, model=model, max_steps=3)
        assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in before.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"intermediate_size": 48}, "belongs to another base model.* 64.* 48"),
        ({"num_attention_heads": 4, "num_key_value_heads": 4}, "belongs to another base model.* 2.* 4"),
        ({"tie_word_embeddings": True}, "belongs to another base model.* False.* True"),
    ],
)
def test_resume_from_a_checkpoint_of_another_shape(tiny_llama, tmp_path, options, message):
    make_model, _ = tiny_llama
    checkpoint = saved(tiny_llama, tmp_path / "one")
    model = make_model(**options)
    refused(tiny_llama, tmp_path / "two", message, resume=checkpoint, model=model, max_steps=3)


def test_resume_from_an_adapter_of_another_base_or_shape(tiny_llama, tmp_path):
    make_model, tokenizer = tiny_llama
    for name, seed in (("one", 0), ("two", 1)):
        make_model(seed).save_pretrained(tmp_path / name), tokenizer.save_pretrained(tmp_path / name)
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    checkpoint = saved(tiny_llama, tmp_path / "out", model=one, peft=LoraConfig(r=4, target_modules="all-linear"))
    again = {"resume": checkpoint, "max_steps": 3}
    lora = {"peft_config": LoraConfig(r=4, target_modules="all-linear")}
    refused(tiny_llama, tmp_path / "b", f"base model {one}, not to {two}", model=two, trainer_options=lora, **again)
    lora = {"peft_config": LoraConfig(r=8, target_modules="all-linear")}
    message = r"does not fit this model: .*down_proj.lora_A.weight is \(4, 64\) in the checkpoint and \(8, 64\) in"
    refused(tiny_llama, tmp_path / "b", message, model=one, trainer_options=lora, **again)


def test_resume_where_there_is_the_other_kind_of_weights(tiny_llama, tmp_path):
    """A whole model's checkpoint does not fit an adapter, nor an adapter's a whole model."""
    make_model, tokenizer = tiny_llama
    base = str(tmp_path / "base")
    make_model().save_pretrained(base), tokenizer.save_pretrained(base)
    lora = LoraConfig(r=4, target_modules="all-linear")
    whole = saved(tiny_llama, tmp_path / "whole", model=base)
    adapter = saved(tiny_llama, tmp_path / "adapter", model=base, peft=lora)
    options = {"model": base, "max_steps": 3}
    refused(tiny_llama, tmp_path / "a", "adapter", resume=whole, trainer_options={"peft_config": lora}, **options)
    refused(tiny_llama, tmp_path / "b", "adapter", resume=adapter, **options)


def test_resume_from_a_checkpoint_of_the_other_reference_point(tiny_llama, tmp_path):
    checkpoint = saved(tiny_llama, tmp_path / "one", KTOTrainer)
    refused(
        tiny_llama, tmp_path / "two", "has no lifecycle_reference_point.json.*written by another trainer", KTOTrainer,
        resume=checkpoint, reference_point="running_mean", max_steps=3,
    )  # fmt: skip
    checkpoint = saved(tiny_llama, tmp_path / "three", KTOTrainer, reference_point="running_mean")
    state = json.loads((tmp_path / "three" / "checkpoint-1" / "lifecycle_reference_point.json").read_text())
    assert state == {"mean": 0.0}  # the policy was the reference in the one step that it has seen
