"""Bottleneck adapters in every kind of trainer, and what prefix tuning can't do in them."""

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, PrefixTuningConfig, PromptTuningConfig
from ppo_setting import KeepGradients, logged
from ppo_setting import trainer as ppo_trainer
from trainer_setting import MAKE, TEXTS, plain_scores, scores

from lifecycle_hf import BottleneckConfig, SFTConfig, SFTTrainer
from lifecycle_hf.models.adapters.bottleneck import BottleneckLayer
from lifecycle_hf.models.loading import load_reward_model

TRAINERS = ("sft", "reward", "dpo", "kto", "ppo")


def random(**options):
    return BottleneckConfig(reduction_factor=4, init_bottleneck_weights=False, **options)


@pytest.mark.parametrize("name", TRAINERS)
def test_two_steps_change_adapters_alone_and_reload(tiny_llama, tmp_path, name):
    make_model, tokenizer = tiny_llama
    given = {"peft_config": BottleneckConfig(reduction_factor=4)}
    run = MAKE[name](tiny_llama, tmp_path / "out", max_steps=2, learning_rate=1e-2, trainer_options=given)
    before = {key: value.clone() for key, value in run.model.state_dict().items()}
    run.train()
    moved = {key for key, value in run.model.state_dict().items() if not torch.equal(value, before[key])}
    own = (".bottleneck_", "value_head", "modules_to_save")
    assert moved and all(any(part in key for part in own) for key in moved)
    assert sum(".bottleneck_" in key for key in moved) >= 16 and all(loss == loss for loss in logged(run, "loss"))
    run.save_model(str(tmp_path / "out"))
    trained = getattr(run.model, "policy", run.model).eval()
    if name == "reward":
        tokenizer.save_pretrained(tmp_path / "out")
        base = type(run.model.get_base_model())(run.model.config)
        base.load_state_dict(plain(before))
        again = PeftModel.from_pretrained(base, tmp_path / "out").eval()
        rewards = [load_reward_model(model, tokenizer) for model in (trained, again)]
        ids, lengths = torch.tensor([[3, 4, 5], [6, 7, 0]]), torch.tensor([3, 2])
        assert torch.equal(rewards[0].score(ids, lengths), rewards[1].score(ids, lengths))
    else:
        again = PeftModel.from_pretrained(make_model(), tmp_path / "out").eval()
        assert torch.equal(plain_scores(again), plain_scores(trained))
        assert not torch.equal(plain_scores(make_model()), plain_scores(trained))


def plain(state):
    """The weights of the base by their own names."""
    names = {key: key.removeprefix("base_model.model.").replace(".base_layer", "") for key in state}
    names = {key: name.replace(".original_module", "") for key, name in names.items()}
    skipped = (".bottleneck_", ".modules_to_save.")
    return {name: state[key] for key, name in names.items() if not any(part in key for part in skipped)}


@pytest.mark.parametrize("name", ["dpo", "ppo"])
def test_packed_scores_are_those_of_the_models_own_forward_pass(tiny_llama, tmp_path, name):
    run = MAKE[name](tiny_llama, tmp_path, trainer_options={"peft_config": random()})
    policy = run.model.policy.eval()
    torch.testing.assert_close(scores(policy), plain_scores(policy), rtol=0, atol=1e-5)
    with run.model.role("base"):
        torch.testing.assert_close(scores(policy), plain_scores(tiny_llama[0]()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["sft", "dpo", "ppo"])
def test_checkpointing_changes_no_gradient(tiny_llama, tmp_path, name):
    """In PPO the value function is another adapter of the same base, and its layers are recomputed under it."""
    steps = []
    for on in (False, True):
        keep = KeepGradients()
        given = {"peft_config": random(), "callbacks": [keep]}
        torch.manual_seed(0)
        run = MAKE[name](
            tiny_llama, tmp_path, activation_checkpointing=on, max_steps=1, learning_rate=0.0, trainer_options=given
        )
        run.train()
        steps.append(keep.steps[0])
    assert steps[0].keys() == steps[1].keys() and any(".bottleneck_" in key for key in steps[0])
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-4, atol=1e-7)


def test_roles_of_ppo_are_adapters_of_one_base_and_decoding_merges_nothing(tiny_llama, tmp_path):
    run = ppo_trainer(tiny_llama, tmp_path, trainer_options={"peft_config": random()})
    assert set(run.model.policy.peft_config) == {"policy", "value"} and run.model.reference_role == "base"
    layers = [module for module in run.model.modules() if isinstance(module, BottleneckLayer)]
    weights = [made.get_base_layer().weight for made in layers]
    run.train()
    assert all(made.get_base_layer().weight is weight for made, weight in zip(layers, weights, strict=True))


@pytest.mark.parametrize("option", ["merge_adapter", "use_vllm"])
def test_decoding_with_merged_weights_is_refused(tiny_llama, tmp_path, option):
    with pytest.raises(ValueError, match=f"{option} needs an adapter that can be merged, and BOTTLENECK can't"):
        ppo_trainer(tiny_llama, tmp_path, trainer_options={"peft_config": BottleneckConfig()}, **{option: True})


# Prefix tuning


def prefix():
    return PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)


def test_prefix_tuning_trains_in_sft(tiny_llama, tmp_path):
    make_model, _ = tiny_llama
    given = {"peft_config": prefix(), "eval_dataset": TEXTS}
    run = MAKE["sft"](tiny_llama, tmp_path, max_steps=8, learning_rate=0.05, trainer_options=given)
    before = run.evaluate()["eval_loss"]
    model = run.model.eval()
    row = run.eval_dataset[0]
    ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
    assert model(input_ids=ids, labels=labels).loss.item() == pytest.approx(loss_of_row(run, row), rel=1e-5)
    run.train()
    assert run.evaluate()["eval_loss"] < before - 0.01
    run.save_model(str(tmp_path / "out"))
    again = PeftModel.from_pretrained(make_model(), tmp_path / "out").eval()
    assert torch.equal(again(input_ids=ids).logits, run.model.eval()(input_ids=ids).logits)


def loss_of_row(run, row):
    return run.evaluate(Dataset.from_list([row]))["eval_loss"]


@pytest.mark.parametrize("options", [{}, {"activation_checkpointing": True}])
def test_prefix_tuning_and_checkpointing_are_refused_before_training(tiny_llama, tmp_path, options):
    args = SFTConfig(str(tmp_path), report_to="none", use_cpu=True, **options)
    with pytest.raises(ValueError, match="PREFIX_TUNING does not work with gradient checkpointing.*=False"):
        SFTTrainer(tiny_llama[0](), args, TEXTS, processing_class=tiny_llama[1], peft_config=prefix())


@pytest.mark.parametrize("config", [prefix(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)])
def test_virtual_tokens_and_packed_rows_are_refused(tiny_llama, tmp_path, config):
    with pytest.raises(ValueError, match="does not work with packed rows.*packing=False"):
        MAKE["sft"](tiny_llama, tmp_path, packing=True, max_length=64, trainer_options={"peft_config": config})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dpo", "changes layers, such as LoRA .prompt learning does not"),
        ("kto", "changes layers, such as LoRA .prompt learning does not"),
        ("ppo", "changes layers, such as LoRA .prompt learning does not"),
        ("reward", "can't be a prompt-learning adapter .prefix, prompt, p-tuning.: use LoRA"),
    ],
)
def test_trainers_that_score_refuse_prefix_tuning(tiny_llama, tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        MAKE[name](tiny_llama, tmp_path, trainer_options={"peft_config": prefix()})
