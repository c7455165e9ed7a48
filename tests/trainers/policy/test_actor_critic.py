"""Test roles on one base: joint gradients, checkpointing, quantisation, a reward adapter of the same base."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from ppo_setting import count_e, logged, trainer
from reward_setting import save_reward_adapter
from transformers import BitsAndBytesConfig

from lifecycle_hf.completions.scoring import Completions
from lifecycle_hf.models.loading import load_causal_lm, load_reward_model
from lifecycle_hf.models.roles import SharedBase
from lifecycle_hf.trainers.policy.actor_critic import ActorCritic, SharedReward
from lifecycle_hf.trainers.policy.ppo import PPOTrainer

close = torch.testing.assert_close
BATCH = Completions.from_lists([[7, 8, 9], [10]], [[20, 21], [22, 23, 24]], 0)
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def shared_actor_critic(base):
    """Policy and value adapters with non-zero weights over `base`."""
    shared = SharedBase(get_peft_model(base, copy.deepcopy(LORA), adapter_name="policy"))
    shared.add_role("value", LORA, trainable=True)
    model = ActorCritic(shared.model, value="adapter", shared=shared, reference_role="base")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def joint_gradients(model):
    model.train().zero_grad()
    out = model(BATCH, BATCH, want=("logprobs", "values", "texts"))
    (out["logprobs"].sum() + out["values"].square().sum() + out["texts"].square().sum()).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_roles_differ_and_the_base_is_untouched(tiny_llama):
    make_model, _ = tiny_llama
    alone = ActorCritic(make_model())(BATCH, want=("logprobs",))["logprobs"]
    out = shared_actor_critic(make_model())(BATCH, want=("logprobs", "values", "ref_logprobs"))
    close(out["ref_logprobs"], alone)
    assert not torch.allclose(out["logprobs"], alone, atol=1e-2)


def test_policy_starts_equal_to_the_base_exactly(tiny_llama):
    make_model, _ = tiny_llama
    shared = SharedBase(get_peft_model(make_model(), copy.deepcopy(LORA), adapter_name="policy"))
    out = ActorCritic(shared.model, shared=shared, reference_role="base")(BATCH, want=("logprobs", "ref_logprobs"))
    assert torch.equal(out["logprobs"], out["ref_logprobs"])


def test_joint_gradient_reaches_both_adapters_and_equals_separate_ones(tiny_llama):
    make_model, _ = tiny_llama
    model = shared_actor_critic(make_model())
    joint = joint_gradients(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} >= joint.keys()
    for want, adapter, other in ((("logprobs", "texts"), ".policy.", ".value."), (("values",), ".value.", ".policy.")):
        model.zero_grad()
        out = model(BATCH, BATCH, want=want)
        loss = (
            out["values"].square().sum()
            if want == ("values",)
            else out["logprobs"].sum() + out["texts"].square().sum()
        )
        loss.backward()
        own = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and adapter in n}
        assert own and not any(other in n and p.grad is not None for n, p in model.named_parameters())
        for name, gradient in own.items():
            close(joint[name], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_each_layer_under_its_own_role(tiny_llama, reentrant):
    make_model, _ = tiny_llama
    model = shared_actor_critic(make_model())
    plain = joint_gradients(model)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    checkpointed = joint_gradients(model)
    assert checkpointed.keys() == plain.keys()
    for name, gradient in plain.items():
        close(checkpointed[name], gradient, atol=1e-6, rtol=1e-5)


def test_values_match_a_plain_forward_of_the_value_adapter(tiny_llama):
    make_model, _ = tiny_llama
    model = shared_actor_critic(make_model()).eval()
    values = model(BATCH, want=("values",))["values"]
    with model.role("value"):
        hidden = model.policy.get_base_model().model(torch.tensor([[10, 22, 23, 24]])).last_hidden_state[0]
    close(values[1], model.value_head(hidden), atol=1e-5, rtol=1e-5)
    assert values.shape == (2, 4)


def quantised(path):
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return load_causal_lm(str(path), quantization_config=config)


def test_qlora_gradients_equal_those_of_a_dequantised_twin_after_a_rollout(tiny_llama, tmp_path):
    make_model, tokenizer = tiny_llama
    make_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    model = shared_actor_critic(quantised(tmp_path))
    twin = shared_actor_critic(quantised(tmp_path).dequantize(dtype=torch.float32))
    with torch.no_grad():  # a forward pass without gradients packs the weights for another kernel
        model.eval()(BATCH, want=("logprobs", "values", "ref_logprobs"))
    ours, theirs = joint_gradients(model), joint_gradients(twin)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        close(ours[name], gradient, atol=1e-4 * gradient.abs().max().item() + 1e-7, rtol=1e-3)


def test_qlora_trains_saves_and_merges(tiny_llama, tmp_path):
    make_model, tokenizer = tiny_llama
    make_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    run = trainer(
        tiny_llama, tmp_path / "out", str(tmp_path / "base"), learning_rate=1e-2,
        trainer_options={"peft_config": LORA, "quantization_config": config},
    )  # fmt: skip
    run.train()
    run.save_model()
    assert logged(run, "policy/ratio_error_at_start") == [0.0, 0.0]
    from lifecycle_hf.models.loading import merge_adapter

    merged = merge_adapter(str(tmp_path / "out"), tmp_path / "merged").eval()
    ids = torch.tensor([[7, 8, 9, 10]])
    with run.model.role("policy"):
        close(merged(ids).logits, run.model.policy.eval()(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.fixture
def reward_adapter(tiny_llama, tmp_path):
    """Return the path of a base, and the path of a reward adapter with random weights over it."""
    make_model, tokenizer = tiny_llama
    base, path = tmp_path / "base", tmp_path / "reward"
    make_model().save_pretrained(base), tokenizer.save_pretrained(base)
    save_reward_adapter(base, path, tokenizer, center=0.5)
    return base, path


def test_reward_adapter_of_the_same_base_shares_it_and_scores_the_same(tiny_llama, tmp_path, reward_adapter):
    base, path = reward_adapter
    run = trainer(
        tiny_llama, tmp_path / "out", str(base), reward_funcs=str(path), trainer_options={"peft_config": LORA}
    )
    assert isinstance(run.model.rewards["reward"], SharedReward)
    ours = run.model.eval()(BATCH, want=("reward:reward",))["reward:reward"]
    theirs = load_reward_model(str(path)).score(BATCH.input_ids, BATCH.prompt_lengths + BATCH.completion_lengths)
    close(ours, theirs, atol=1e-5, rtol=1e-5)
    # the value function starts as a copy of the reward model: at the last state it is the score
    values = run.model(BATCH, want=("values",))["values"]
    close(values.gather(1, BATCH.completion_lengths[:, None])[:, 0], theirs, atol=1e-5, rtol=1e-5)
    run.train()
    frozen = {n: p for n, p in run.model.named_parameters() if ".reward." in n}
    assert frozen and not any(p.requires_grad for p in frozen.values())
    after = run.model.eval()(BATCH, want=("reward:reward",))["reward:reward"]
    close(after, theirs, atol=1e-5, rtol=1e-5)


def test_a_checkpoint_of_another_base_model_is_refused(tiny_llama, tmp_path, reward_adapter):
    make_model, tokenizer = tiny_llama
    base, _ = reward_adapter
    run = trainer(tiny_llama, tmp_path / "out", str(base), trainer_options={"peft_config": LORA})
    run.save_model()
    other = tmp_path / "other"
    make_model(seed=1).save_pretrained(other), tokenizer.save_pretrained(other)
    elsewhere = trainer(tiny_llama, tmp_path / "out2", str(other), trainer_options={"peft_config": LORA})
    with pytest.raises(ValueError, match=r"belongs to the base model .*base.*other"):
        elsewhere.model.load_pretrained(str(tmp_path / "out"))
    big = trainer(tiny_llama, tmp_path / "out3", make_model(hidden_size=64))
    big.save_model()
    small = trainer(tiny_llama, tmp_path / "out4")
    with pytest.raises(ValueError, match="another base model: its hidden_size is 64, the model here has 32"):
        small.train(resume_from_checkpoint=str(tmp_path / "out3"))


def test_policy_may_be_a_peft_model_or_an_adapters_path(tiny_llama, tmp_path, reward_adapter):
    _, tokenizer = tiny_llama
    base, _ = reward_adapter
    model = get_peft_model(load_causal_lm(str(base)), copy.deepcopy(LORA))
    run = trainer(tiny_llama, tmp_path / "out", model, max_steps=1)
    run.train()
    run.save_model()
    data = Dataset.from_dict({"prompt": ["hello", "Please"]})
    again = PPOTrainer(str(tmp_path / "out"), count_e, run.args, data, processing_class=tokenizer)
    out = again.model.eval()(BATCH, want=("logprobs", "ref_logprobs"))
    close(out["logprobs"], run.model.eval()(BATCH, want=("logprobs",))["logprobs"])
    assert torch.equal(out["logprobs"], out["ref_logprobs"])
