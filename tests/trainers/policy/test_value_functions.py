"""Test the value functions (a head on frozen states, an adapter, a model), and when their gradients are taken."""

import copy
import math

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, get_peft_model
from ppo_setting import KeepGradients, logged, trainer
from transformers import LlamaForSequenceClassification, TrainerCallback

from lifecycle_hf.completions.scoring import Completions
from lifecycle_hf.models.adapters.names import split_adapter
from lifecycle_hf.models.heads import NormalisedHead
from lifecycle_hf.models.roles import SharedBase
from lifecycle_hf.trainers.policy import ppo
from lifecycle_hf.trainers.policy.actor_critic import ActorCritic, settled

close = torch.testing.assert_close
BATCH = Completions.from_lists([[7, 8, 9], [10]], [[20, 21], [22, 23, 24]], 0)
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def kinds():
    return [("head", False), ("head", True), ("adapter", True), ("model", False), ("model", True)]


def peft(wanted):
    return {"peft_config": copy.deepcopy(LORA)} if wanted else {}


def test_normalised_head_by_hand():
    head = NormalisedHead(2)
    with torch.no_grad():
        head.linear.weight.copy_(torch.tensor([[3.0, 1.0]]))
        head.linear.bias.fill_(0.5)
        head.dense.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        head.dense.bias.copy_(torch.tensor([0.0, 1.0]))
    # mean 7, deviation 3: the state is (-1, 1) after normalisation, whatever its size; then (-1, 3) and tanh
    expected = 3 * math.tanh(-1) + math.tanh(3) + 0.5
    for scale in (1.0, 100.0):
        close(head(scale * torch.tensor([[4.0, 10.0]])), torch.tensor([expected]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("with_peft", [False, True])
def test_head_reads_the_references_states_whatever_the_policy_learns(tiny_llama, tmp_path, with_peft):
    make_model, _ = tiny_llama
    base = make_model()
    run = trainer(
        tiny_llama, tmp_path, copy.deepcopy(base), value="head", learning_rate=1e-2, trainer_options=peft(with_peft)
    )
    run.train()
    model = run.model.eval()
    assert model.value_head.linear.weight.abs().max() > 0
    out = model(BATCH, want=("ref_logprobs", "ref_states", "values", "logprobs"))
    states = base.model(torch.tensor([[10, 22, 23, 24]])).last_hidden_state[0]
    close(out["ref_states"][1], states, atol=1e-5, rtol=1e-5)
    close(out["values"][1], model.value_head(states), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(out["logprobs"], out["ref_logprobs"], atol=1e-3)
    for batch in run.buffer.batches:
        again = Completions(batch["input_ids"], batch["prompt_lengths"], batch["completion_lengths"])
        assert torch.equal(batch["features"], model(again, want=("ref_logprobs", "ref_states"))["ref_states"])


def test_an_update_with_a_head_runs_the_backbone_for_policy_and_reference_alone(tiny_llama, tmp_path):
    for kind, expected in (("head", 3), ("model", 6)):  # one per epoch: the policy's, and the value model's
        run = trainer(tiny_llama, tmp_path, value=kind, max_steps=3, ppo_epochs=3)
        passes = count_passes(run.model)
        run.train()
        assert passes.count(True) == expected


def count_passes(model):
    """Record of every later pass through a backbone of `model` whether its graph is kept."""
    passes = []
    for part in filter(None, (model.policy, model.reference, model.value_model)):
        backbone = (part.get_base_model() if hasattr(part, "get_base_model") else part).model
        backbone.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    return passes


@pytest.mark.parametrize("options", [{}, {"entropy_coef": 0.1}, {"activation_checkpointing": True}])
@pytest.mark.parametrize("with_peft", [False, True])
def test_the_graph_kept_from_scoring_changes_no_gradient(tiny_llama, tmp_path, monkeypatch, with_peft, options):
    steps, passes, runs = {}, {}, {}
    for keeps in (True, False):
        if not keeps:
            monkeypatch.setattr(ppo, "keeps_graphs", lambda trainer: False)
        keep = KeepGradients()
        run = runs[keeps] = trainer(
            tiny_llama, tmp_path, value="head", max_steps=4, ppo_epochs=2, per_device_train_batch_size=2,
            gradient_accumulation_steps=2, learning_rate=1e-2, logging_steps=2, **options,
            trainer_options=peft(with_peft) | {"callbacks": [keep]},
        )  # fmt: skip
        assert ppo.keeps_graphs(run) is keeps
        passes[keeps] = count_passes(run.model)
        run.train()
        steps[keeps] = keep.steps
    for kept, plain in zip(steps[True], steps[False], strict=True):
        assert kept.keys() == plain.keys() and any(gradient.abs().max() > 0 for gradient in plain.values())
        for name, gradient in plain.items():
            close(kept[name], gradient, atol=1e-7, rtol=1e-5)
    assert logged(runs[True], "policy/ratio_error_at_start") == [0, 0]
    assert logged(runs[True], "entropy") == pytest.approx(logged(runs[False], "entropy"), rel=1e-6)
    assert len(passes[True]) == len(passes[False]) - 2  # one micro-batch of each of the two updates


@pytest.mark.parametrize(("kind", "with_peft"), kinds())
def test_every_kind_saves_and_resumes_bit_for_bit(tiny_llama, tmp_path, kind, with_peft):
    def run():
        return trainer(
            tiny_llama, tmp_path, value=kind, max_steps=4, ppo_epochs=2, learning_rate=1e-2, save_strategy="steps",
            save_steps=3, trainer_options=peft(with_peft),
        )  # fmt: skip

    whole, resumed = run(), run()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    assert logged(resumed, "loss/value") == logged(whole, "loss/value")
    folder = tmp_path / "saved" / "value"
    whole.save_model(str(tmp_path / "saved"))
    from_file = trainer(
        tiny_llama, tmp_path / "new", value=kind, trainer_options=peft(with_peft) | {"value_model": str(folder)}
    )
    features = whole.model.eval()(BATCH, want=("ref_logprobs", "ref_states"))["ref_states"]
    ours, theirs = (
        m.eval()(BATCH, want=("values",), features=features)["values"] for m in (whole.model, from_file.model)
    )
    close(ours, theirs)
    assert ours.abs().max() > 0


@pytest.mark.parametrize(("kind", "with_peft"), [("adapter", True), ("model", False)])
def test_settling_the_value_loss_changes_no_gradient(tiny_llama, tmp_path, kind, with_peft):
    gradients = {}
    for settles in (True, False):
        keep = KeepGradients()
        run = trainer(
            tiny_llama, tmp_path, value=kind, max_steps=2, ppo_epochs=2, per_device_train_batch_size=2,
            gradient_accumulation_steps=2, learning_rate=1e-2, trainer_options=peft(with_peft) | {"callbacks": [keep]},
        )  # fmt: skip
        assert run.model.settles_values
        run.model.settles_values = settles
        run.train()
        gradients[settles] = keep.steps[1]
    assert gradients[True].keys() == gradients[False].keys()
    for name, gradient in gradients[False].items():
        close(gradients[True][name], gradient, atol=1e-7, rtol=1e-5)
    assert any("value" in name and gradient.abs().max() > 0 for name, gradient in gradients[True].items())


def test_activations_of_the_value_function_are_gone_before_the_policys_arise(tiny_llama):
    make_model, _ = tiny_llama
    shared = SharedBase(get_peft_model(make_model(), copy.deepcopy(LORA), adapter_name="policy"))
    shared.add_role("value", LORA, trainable=True)
    model = ActorCritic(shared.model, value="adapter", shared=shared, reference_role="base").train()
    model.value_head.linear.weight.data.fill_(0.1)
    held = {}
    for settles in (True, False):
        model.settles_values, alive = settles, set()

        def pack(tensor, alive=alive):
            return Kept(tensor, alive)

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
            out = model(BATCH, want=("logprobs", "value_loss"), value_loss=lambda values: values.square().sum())
        held[settles] = len(alive)
        (out["logprobs"].sum() + out["value_loss"]).backward()
    assert held[True] <= 0.6 * held[False]


class Kept:
    """A tensor that is saved for a backward pass; it lives as long as the graph holds it."""

    def __init__(self, tensor, alive):
        self.tensor, self.alive = tensor, alive
        alive.add(id(self))

    def __del__(self):
        self.alive.discard(id(self))


def test_settled_loss_by_hand():
    w, unused = torch.nn.Parameter(torch.tensor([2.0, 3.0])), torch.nn.Parameter(torch.zeros(1))
    loss = settled((w**2).sum(), [w, unused])
    assert loss.item() == 13.0
    (0.5 * loss).backward()
    close(w.grad, torch.tensor([2.0, 3.0]))  # 0.5 · 2w
    assert unused.grad is None


def test_value_functions_that_can_not_be(tiny_llama, tmp_path):
    with pytest.raises(ValueError, match="value='adapter' needs a base.*peft_config"):
        trainer(tiny_llama, tmp_path, value="adapter")
    with pytest.raises(ValueError, match="value='heads' is unknown"):
        trainer(tiny_llama, tmp_path, value="heads")
    adapter = trainer(tiny_llama, tmp_path, trainer_options=peft(True))
    adapter.save_model()
    with pytest.raises(ValueError, match="does not hold the value function of value='head'"):
        trainer(tiny_llama, tmp_path / "b", value="head", trainer_options={"value_model": str(tmp_path / "value")})
    make_model, _ = tiny_llama
    config = make_model().config
    config.num_labels = 1
    with pytest.raises(ValueError, match="a head on the reference's states; give the `value` folder"):
        options = {"value_model": LlamaForSequenceClassification(config)}
        trainer(tiny_llama, tmp_path / "c", value="head", trainer_options=options)


@pytest.mark.parametrize("names", [["q_proj", "down_proj"], "all-linear"])
@pytest.mark.parametrize("dora", [False, True])
def test_merged_decoding_weights_are_the_policys_and_leave_the_base_bit_for_bit(tiny_llama, names, dora):
    make_model, _ = tiny_llama
    config = LoraConfig(r=4, target_modules=names, task_type="CAUSAL_LM", use_dora=dora, init_lora_weights=False)
    shared = SharedBase(get_peft_model(make_model(attention_bias=True), config, adapter_name="policy"))
    shared.add_role("value", config, trainable=True)
    model, ids = shared.model.eval(), torch.tensor([[7, 8, 9, 10]])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = model(ids).logits
    calls = []
    for module in model.modules():
        if type(module).__name__ == "Linear" and hasattr(module, "lora_A"):
            module.lora_A["policy"].register_forward_hook(lambda *_: calls.append(1))
    with shared.merged():
        close(model(ids).logits, plain, atol=1e-5, rtol=1e-4)
        assert not calls  # the adapter's own products are saved
    assert torch.equal(model(ids).logits, plain) and calls
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_merging_leaves_layers_alone_that_are_replaced_and_not_changed(tiny_llama):
    make_model, _ = tiny_llama
    shared = SharedBase(get_peft_model(make_model(), LNTuningConfig(target_modules=["norm"]), adapter_name="policy"))
    model, ids = shared.model.eval(), torch.tensor([[7, 8, 9, 10]])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ln_tuning_layers.policy" in name:
                parameter.mul_(1.5)
    policy = model(ids).logits
    with shared.role("base"):
        base = model(ids).logits
    assert not torch.allclose(policy, base, atol=1e-3)
    with shared.merged():
        close(model(ids).logits, policy)
    assert torch.equal(model(ids).logits, policy)
    with shared.role("base"):
        assert torch.equal(model(ids).logits, base)


def test_a_layer_with_an_adapters_name_belongs_to_the_base():
    layer = "bert.encoder.layer.0.attention.self.value"
    assert split_adapter(f"{layer}.base_layer.weight", "lora_") == (None, f"{layer}.base_layer.weight")
    for name, expected in (
        (f"{layer}.lora_A.policy.weight", ("policy", f"{layer}.lora_A.weight")),
        ("embed.lora_embedding_A.value", ("value", "embed.lora_embedding_A")),
        ("lm_head.modules_to_save.policy.dense.weight", ("policy", "lm_head.modules_to_save.dense.weight")),
        ("embed.trainable_tokens_delta.policy", ("policy", "embed.trainable_tokens_delta")),
    ):
        assert split_adapter(name, "lora_") == expected


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_policy_is_in_force_after_every_step(tiny_llama, tmp_path, reentrant):
    roles = []

    class Roles(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            roles.append((model.shared.role_in_force, model.policy.active_adapters))

    run = trainer(
        tiny_llama, tmp_path, value="adapter", max_steps=3, activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": reentrant},
        trainer_options=peft(True) | {"callbacks": [Roles()]},
    )  # fmt: skip
    assert run.model.settles_values is not reentrant
    run.train()
    policy = run.model.policy_role
    assert roles == [(policy, [policy])] * 3


def test_low_precision_bases_are_not_merged_unless_asked(tiny_llama, tmp_path):
    make_model, _ = tiny_llama
    single, half = torch.float32, torch.bfloat16
    cases = [(single, None, True), (half, None, False), (half, True, True), (single, False, False)]
    for dtype, asked, merges in cases:
        run = trainer(
            tiny_llama, tmp_path, make_model().to(dtype), merge_adapter=asked, max_steps=1, trainer_options=peft(True)
        )
        assert run.rollouts.sampler._merges(run.model) is merges
        run.train()
