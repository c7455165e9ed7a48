"""RLOO and GRPO: advantages, gradients beside TRL's, whole groups, no critic and no second pass."""

import random

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from ppo_setting import PROMPTS, KeepGradients, count_e, logged

from lifecycle_hf import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from lifecycle_hf.trainers.base import sampler
from lifecycle_hf.trainers.policy import rollout

close = torch.testing.assert_close
OWN = {"grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}
TRL = {"grpo": (trl.GRPOConfig, trl.GRPOTrainer), "rloo": (trl.RLOOConfig, trl.RLOOTrainer)}
COMMON = {
    "per_device_train_batch_size": 8, "max_steps": 1, "learning_rate": 1e-3, "max_completion_length": 6,
    "logging_steps": 1, "report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True,
    "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "bf16": False,
}  # fmt: skip
OURS = {"activation_checkpointing": False, "log_completions": False}


def trainer(
    tiny_llama, tmp_path, method="grpo", model=None, prompts=PROMPTS, trainer_options=None, reward=count_e, **options
):
    make_model, tokenizer = tiny_llama
    config, kind = OWN[method]
    defaults = COMMON | OURS | {"num_generations": 4}
    return kind(
        make_model() if model is None else model, reward, config(str(tmp_path), **(defaults | options)),
        Dataset.from_dict({"prompt": prompts}), processing_class=tokenizer, **(trainer_options or {}),
    )  # fmt: skip


def answers(prompt_ids, n, tokenizer):
    """N completions of a prompt, of 1 to 6 tokens; those of fewer than 6 end with the EOS token."""
    draw = random.Random(sum(prompt_ids))
    lengths = [draw.randint(1, 6) for _ in range(n)]
    return [[draw.randrange(8, 40) for _ in range(k - (k < 6))] + [tokenizer.eos_token_id] * (k < 6) for k in lengths]


def scores(prompts, completions, **columns):
    """A score for each text, which a group does not share."""
    return [float(sum(map(ord, text)) % 17) / 7 for text in completions]


def first_gradient_of_trl(tiny_llama, tmp_path, method, **options):
    make_model, tokenizer = tiny_llama
    config, kind = TRL[method]
    keep, n = KeepGradients(), options["num_generations"]
    args = config(str(tmp_path / "trl"), shuffle_dataset=False, gradient_checkpointing=False, **(COMMON | options))
    make_model().save_pretrained(tmp_path / "model")  # which TRL loads again as the reference
    run = kind(
        str(tmp_path / "model"), scores, args, Dataset.from_dict({"prompt": PROMPTS[:2]}), processing_class=tokenizer
    )

    def answered(prompt_ids, *args, **kwargs):
        rows = [row for ids in prompt_ids[::n] for row in answers(ids, n, tokenizer)]
        return (rows, None) if method == "grpo" else rows

    run._generate_single_turn = answered
    run.add_callback(keep)
    run.train()
    return keep.steps[0]


def first_gradient(tiny_llama, tmp_path, monkeypatch, method, **options):
    keep, tokenizer = KeepGradients(), tiny_llama[1]
    fixed = lambda model, prompts, num_generations, **kwargs: [
        row for ids in prompts for row in answers(ids, num_generations, tokenizer)
    ]
    monkeypatch.setattr(sampler, "generate", fixed)
    run = trainer(
        tiny_llama, tmp_path / "own", method, prompts=PROMPTS[:2], reward=scores,
        trainer_options={"callbacks": [keep]}, **options,
    )  # fmt: skip
    run.train()
    return {name.removeprefix("policy."): gradient for name, gradient in keep.steps[0].items()}


CASES = [
    ("grpo", {}),
    ("grpo", {"loss_type": "grpo", "beta": 0.3}),
    ("grpo", {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    ("grpo", {"loss_type": "dapo", "scale_rewards": "batch", "beta": 0.1, "use_bias_correction_kl": False}),
    ("grpo", {"importance_sampling_level": "sequence", "loss_type": "grpo", "epsilon": 3e-4, "epsilon_high": 4e-4}),
    ("rloo", {}),
    ("rloo", {"num_generations": 2, "beta": 0.2}),
]


@pytest.mark.parametrize(("method", "options"), CASES)
def test_the_first_gradient_is_trls(tiny_llama, tmp_path, monkeypatch, method, options):
    options = {"num_generations": 4} | options
    if options["num_generations"] == 2:
        options["per_device_train_batch_size"] = 4
    theirs = first_gradient_of_trl(tiny_llama, tmp_path, method, **options)
    ours = first_gradient(tiny_llama, tmp_path, monkeypatch, method, **options)
    assert ours.keys() == theirs.keys()
    largest = max(gradient.abs().max() for gradient in theirs.values())
    assert largest > 1e-4
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7 * largest, name


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_the_gradient_does_not_depend_on_micro_batches(tiny_llama, tmp_path, aggregation):
    found = {}
    for size in (8, 4, 2):  # the last holds half a group
        keep = KeepGradients()
        run = trainer(
            tiny_llama, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size,
            loss_aggregation=aggregation, kl_coef=0.1, entropy_coef=0.01, trainer_options={"callbacks": [keep]},
        )  # fmt: skip
        run.train()
        found[size] = (logged(run, "loss"), logged(run, "entropy"), logged(run, "score"), keep.steps[0])
    for size in (4, 2):
        for here, there in zip(found[8][:3], found[size][:3], strict=True):
            assert here == pytest.approx(there, rel=1e-4)
        for name, gradient in found[8][3].items():
            close(found[size][3][name], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", OWN)
def test_equal_scores_give_no_gradient_at_all(tiny_llama, tmp_path, method):
    keep = KeepGradients()
    options = {"trainer_options": {"callbacks": [keep]}, "reward": lambda prompts, **_: [0.1] * len(prompts)}
    run = trainer(tiny_llama, tmp_path, method, num_generations=8, kl_coef=0.0, **options)
    run.train()
    assert all(gradient.count_nonzero() == 0 for gradient in keep.steps[0].values())
    assert logged(run, "frac_reward_zero_std") == [1.0] and logged(run, "group_reward_std") == [0.0]


def backbone_calls(run, name="policy"):
    calls = []
    model = getattr(run.model, name).model
    model.register_forward_hook(lambda module, args, kwargs, out: calls.append(module.training), with_kwargs=True)
    return calls


def test_one_step_per_rollout_reads_each_completion_once(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(
        sampler, "generate", lambda model, prompts, num_generations, **_: [[9, 2]] * len(prompts) * num_generations
    )
    run = trainer(tiny_llama, tmp_path, gradient_accumulation_steps=3, per_device_train_batch_size=4)
    calls = backbone_calls(run)
    run.train()
    assert run.model.reference is None and run.model.value is None and not run.model.value_parameters
    assert calls[-3:] == [True] * 3 and not any(calls[:-3])  # those before probe whether the model can be packed
    options = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 4, "model": run.model.policy}
    again = trainer(tiny_llama, tmp_path, **options)
    calls = backbone_calls(again)
    again.train()
    assert calls == [True] * 3


def test_what_is_deferred_is_what_was_scored_before(tiny_llama, tmp_path, monkeypatch):
    """The KL in the loss, two micro-batches: with and without a second pass the same losses, metrics and weights."""
    found = []
    for defers in (True, False):
        if not defers:
            monkeypatch.setattr(rollout.RolloutMaker, "defers", False)
        run = trainer(
            tiny_llama, tmp_path, kl_coef=0.2, kl_control="adaptive", kl_target=1e-4, kl_horizon=20, max_steps=3,
            gradient_accumulation_steps=2, per_device_train_batch_size=4,
        )  # fmt: skip
        run.train()
        assert run.rollouts.defers == defers
        timed = ("tokens_per_second", "train_runtime", "train_samples_per_second", "train_steps_per_second")
        logs = [{k: v for k, v in entry.items() if k not in timed} for entry in run.state.log_history]
        found.append((logs, run.model.state_dict(), run.kl_control.kl_coef))
    for here, there in zip(found[0][0], found[1][0], strict=True):
        assert here == pytest.approx(there, rel=1e-3, abs=2e-5)
    assert found[0][2] == pytest.approx(found[1][2]) != 0.2
    for name, weight in found[0][1].items():
        close(found[1][1][name], weight, rtol=1e-4, atol=1e-5)


def test_a_fault_of_a_deferred_rollout_skips_its_step(tiny_llama, tmp_path):
    run = trainer(tiny_llama, tmp_path, min_entropy=99.0, on_fault="skip", max_faults=2)
    before = {name: weight.clone() for name, weight in run.model.state_dict().items()}
    with pytest.warns(UserWarning, match="Step 1 is skipped: the policy has collapsed"):
        run.train()
    for name, weight in run.model.state_dict().items():
        assert torch.equal(weight, before[name])
    assert logged(run, "faults/skipped_steps") == [1.0]


@pytest.mark.parametrize("method", OWN)
@pytest.mark.parametrize("peft", [False, True])
def test_a_resumed_run_equals_the_uninterrupted_one(tiny_llama, tmp_path, method, peft):
    options = {"max_steps": 6, "num_mini_batches": 2, "ppo_epochs": 2, "kl_coef": 0.1, "save_strategy": "steps"}
    options |= {"save_steps": 3, "kl_control": "adaptive", "kl_target": 1e-3, "kl_horizon": 50}
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if peft else None
    start = {"trainer_options": {"peft_config": config}}
    whole = trainer(tiny_llama, tmp_path, method, **options, **start)
    whole.train()
    resumed = trainer(tiny_llama, tmp_path, method, **options, **start)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))  # within a rollout
    assert resumed.kl_control.kl_coef == whole.kl_control.kl_coef
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


def test_mitigations_and_an_evaluation_go_together(tiny_llama, tmp_path):
    texts = Dataset.from_dict({"text": ["The capital of France is Paris.", "Two and three make five."]})
    make_model, tokenizer = tiny_llama
    for options in ({"ptx_coef": 0.5}, {"ewc_coef": 1.0, "ewc_rows": 2}, {"projection": "gradient"}):
        args = GRPOConfig(str(tmp_path), **(COMMON | OURS | {"num_generations": 4, "max_steps": 2} | options))
        prompts = Dataset.from_dict({"prompt": PROMPTS})
        inputs = {"eval_dataset": prompts, "ptx_dataset": texts, "processing_class": tokenizer}
        run = GRPOTrainer(make_model(), count_e, args, prompts, **inputs)
        run.train()
        assert all(torch.isfinite(weight).all() for weight in run.model.state_dict().values())
        measured = run.evaluate()
        assert measured["eval_score"] == measured["eval_reward/count_e"] and "eval_kl" not in measured


def test_trls_names_set_the_options(tmp_path):
    args = GRPOConfig(str(tmp_path), beta=0.04, epsilon=0.1, epsilon_high=0.3, num_iterations=2, loss_type="dr_grpo")
    found = (args.kl_coef, args.cliprange, args.cliprange_high, args.ppo_epochs, args.loss_aggregation, args.beta)
    assert found == (0.04, 0.1, 0.3, 2, "constant", None)
    grpo, rloo = (trl.GRPOConfig("x", bf16=False), GRPOConfig("x")), (trl.RLOOConfig("x", bf16=False), RLOOConfig("x"))
    for theirs, ours in (grpo, rloo):
        assert (ours.kl_coef, ours.cliprange, ours.ppo_epochs) == (theirs.beta, theirs.epsilon, theirs.num_iterations)
        for name in ("num_generations", "max_completion_length", "learning_rate", "temperature"):
            assert getattr(ours, name) == getattr(theirs, name), name
    assert grpo[0].loss_type == "dapo" and grpo[1].loss_aggregation == "token"
    with pytest.raises(ValueError, match="beta=0.1 and kl_coef=0.2 are one option"):
        GRPOConfig(str(tmp_path), beta=0.1, kl_coef=0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_generations": 1},
            "advantage_estimator='grpo' compares completions of one prompt, and num_generations=1",
        ),
        (
            {"per_device_train_batch_size": 6, "num_generations": 4},
            "per_device_train_batch_size × gradient_accumulation_steps is 6, and num_generations=4 .* make it 4 or 8",
        ),
        (
            {"per_device_train_batch_size": 2, "num_generations": 4, "num_mini_batches": 2},
            "per_device_train_batch_size is 2, and num_generations=4 .* make it 4",
        ),
        ({"vf_coef": 0.5}, "vf_coef=0.5 has no effect with advantage_estimator='grpo'"),
        ({"gamma": 0.9}, "gamma=0.9 has no effect with advantage_estimator='grpo'"),
        ({"kl_in_loss": False, "use_bias_correction_kl": False}, "use_bias_correction_kl=False has no effect"),
    ],
)
def test_options_that_can_not_be(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        GRPOConfig(str(tmp_path), **options)
