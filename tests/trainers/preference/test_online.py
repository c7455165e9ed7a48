"""Online DPO and SPIN: pairs of the present policy, ties, rounds, resumed runs."""

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from preference_setting import OPTIONS, logged

from lifecycle_hf import OnlineDPOConfig, OnlineDPOTrainer, SPINConfig, SPINTrainer
from lifecycle_hf.trainers.base import sampler

PROMPTS = ["Tell me", "The capital", "Please", "Two and", "I am", "Of course", "Here is", "hello"]
TARGETS = Dataset.from_dict({"prompt": PROMPTS, "completion": [" Paris", " seven", " a fox", " three"] * 2})
SHORT = {name: value for name, value in OPTIONS.items() if name != "max_length"} | {"max_completion_length": 6}
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def count_e(prompts, completions, **columns):
    return [float(text.count("e")) for text in completions]


def online(tiny_llama, folder, rewards=count_e, trainer_options=None, **options):
    make_model, tokenizer = tiny_llama
    args = OnlineDPOConfig(str(folder), **(SHORT | {"log_completions": False} | options))
    return OnlineDPOTrainer(
        make_model(), None, rewards, args, train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tokenizer, **(trainer_options or {}),
    )  # fmt: skip


def spin(tiny_llama, folder, trainer_options=None, **options):
    make_model, tokenizer = tiny_llama
    args = SPINConfig(str(folder), **(SHORT | {"log_completions": False} | options))
    return SPINTrainer(
        make_model(), args=args, train_dataset=TARGETS, processing_class=tokenizer, **(trainer_options or {})
    )


def test_the_best_is_chosen_and_the_worst_rejected(tiny_llama, tmp_path, monkeypatch):
    found, make = [], OnlineDPOTrainer.pairs

    def seen(self, rows, *args, **kwargs):
        pairs = make(self, rows, *args, **kwargs)
        found.extend(pair for group in pairs for pair in group)
        return pairs

    monkeypatch.setattr(OnlineDPOTrainer, "pairs", seen)
    run = online(tiny_llama, tmp_path, num_generations=4)
    run.train()
    decode = run.processing_class.decode
    assert len(found) == 8
    for pair in found:
        texts = [decode(pair[name], skip_special_tokens=True) for name in ("chosen_ids", "rejected_ids")]
        chosen, rejected = (text.count("e") for text in texts)
        assert chosen - rejected == 0 if pair["weight"] == 0 else chosen > rejected
    assert logged(run, "rewards/margins")[0] == pytest.approx(0, abs=1e-6)
    assert logged(run, "ties") == [sum(p["weight"] == 0 for p in found[i : i + 4]) / 4 for i in (0, 4)]


def test_a_step_is_that_of_dpo_on_the_same_pairs(tiny_llama, tmp_path, monkeypatch):
    """Ties count for nothing: with two of four prompts tied, the loss is the mean over the other two."""
    answers = {"Tell me": ([9, 2], [10, 2]), "The capital": ([11, 2], [11, 2])}
    answers |= {"Please": ([12], [13, 14]), "Two and": ([15], [15])}
    make_model, tokenizer = tiny_llama
    by_ids = {tuple(tokenizer(prompt)["input_ids"]): both for prompt, both in answers.items()}
    monkeypatch.setattr(
        sampler, "generate", lambda model, prompts, **_: [row for ids in prompts for row in by_ids[tuple(ids)]]
    )
    rewards = lambda prompts, completions: [float(len(prompts) - i) for i in range(len(prompts))]
    same = lambda prompts, completions: [  # the first is better, unless both are one text
        0.0 if completions[i] == completions[i ^ 1] else s for i, s in enumerate(rewards(prompts, completions))
    ]
    runs = []
    for size in (4, 1):
        args = OnlineDPOConfig(
            str(tmp_path), **(SHORT | {"max_steps": 1, "log_completions": False, "per_device_train_batch_size": size}),
            gradient_accumulation_steps=4 // size, seed=1,
        )  # fmt: skip
        data = Dataset.from_dict({"prompt": list(answers)})
        run = OnlineDPOTrainer(make_model(), None, same, args, train_dataset=data, processing_class=tokenizer)
        run.train()
        runs.append(run)
        assert logged(run, "ties") == [0.5] and logged(run, "loss") == [pytest.approx(0.6931, abs=1e-4)]
        assert logged(run, "rewards/accuracies")[0] in (0.0, 0.5, 1.0)
    for name, weight in runs[0].model.state_dict().items():
        torch.testing.assert_close(runs[1].model.state_dict()[name], weight, rtol=1e-3, atol=2e-4)


def test_ties_alone_move_nothing(tiny_llama, tmp_path):
    run = online(tiny_llama, tmp_path, lambda prompts, completions: [1.0] * len(prompts))
    before = {name: weight.clone() for name, weight in run.model.state_dict().items()}
    run.train()
    assert logged(run, "ties") == [1.0, 1.0] and logged(run, "loss") == [0.0, 0.0]
    for name, weight in run.model.state_dict().items():
        assert torch.equal(weight, before[name]), name


def test_a_judge_ranks(tiny_llama, tmp_path):
    longer = lambda prompts, pairs: [float(len(a) > len(b)) for a, b in pairs]
    run = online(tiny_llama, tmp_path, None, {"judge": longer}, num_generations=3)
    run.train()
    assert logged(run, "score") == pytest.approx([0.5, 0.5])
    with pytest.raises(ValueError, match="either reward_funcs or a judge"):
        online(tiny_llama, tmp_path, None)
    with pytest.raises(ValueError, match="either reward_funcs or a judge"):
        online(tiny_llama, tmp_path, count_e, {"judge": longer})
    garbage = online(tiny_llama, tmp_path, None, {"judge": lambda prompts, pairs: ["A"] * len(pairs)})
    with pytest.raises(ValueError, match="returned 'A' for pair 0"):
        garbage.train()


@pytest.mark.parametrize("peft", [False, True])
def test_the_reference_moves_with_the_rounds(tiny_llama, tmp_path, peft):
    run = online(
        tiny_llama, tmp_path, max_steps=4, rounds=2, sample_from="reference",
        trainer_options={"peft_config": LORA if peft else None},
    )  # fmt: skip
    start = {name: weight.clone() for name, weight, _ in run.moved.parameters()}
    run.train()
    assert start and run.moved.round == 1
    moved = [(weight - start[name]).abs().max() for name, weight, _ in run.moved.parameters()]
    assert max(moved) > 1e-3
    margins = logged(run, "rewards/margins")
    assert margins[0] == pytest.approx(0, abs=1e-6) and margins[2] == pytest.approx(0, abs=1e-6)
    assert abs(margins[1]) > 1e-4


@pytest.mark.parametrize("make", [online, spin])
@pytest.mark.parametrize("peft", [False, True])
def test_a_resumed_run_equals_the_uninterrupted_one(tiny_llama, tmp_path, make, peft):
    options = {
        "max_steps": 6,
        "rounds": 3,
        "save_strategy": "steps",
        "save_steps": 3,
        "gradient_accumulation_steps": 2,
    }
    options |= {"per_device_train_batch_size": 2, "trainer_options": {"peft_config": LORA if peft else None}}
    whole = make(tiny_llama, tmp_path, **options)
    whole.train()
    resumed = make(tiny_llama, tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))  # within the second round
    assert resumed.moved.round == whole.moved.round == 2
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
    assert logged(resumed, "completions/length") == logged(whole, "completions/length")


def test_spin_chooses_the_target_over_the_references_sample(tiny_llama, tmp_path):
    run = spin(tiny_llama, tmp_path, max_steps=6, rounds=2)
    rows = [run.train_dataset[i] for i in range(8)]
    pairs = run.pairs(rows, 0)
    for row, (pair,) in zip(rows, pairs, strict=True):
        assert pair["chosen_ids"] == row["target_ids"] and pair["weight"] == 1.0
        assert pair["chosen_ids"][-1] == run.processing_class.eos_token_id
    run.train()
    margins = logged(run, "rewards/margins")
    assert margins[0] == pytest.approx(0, abs=1e-6) and margins[2] > 0 and margins[5] > 0


def test_an_evaluation_samples_and_leaves_the_run_alone(tiny_llama, tmp_path):
    data = {"eval_dataset": Dataset.from_dict({"prompt": PROMPTS[:5]})}
    run = online(tiny_llama, tmp_path, trainer_options=data, per_device_eval_batch_size=2)
    first, again = run.evaluate(), run.evaluate()
    for name in ("eval_score", "eval_ties", "eval_rewards/margins", "eval_logps/chosen", "eval_reward/count_e"):
        assert first[name] == again[name], name
    chats = {
        "messages": [[{"role": "user", "content": p}, {"role": "assistant", "content": "Paris"}] for p in PROMPTS]
    }
    make_model, tokenizer = tiny_llama
    args = SPINConfig(str(tmp_path), **(SHORT | {"log_completions": False}))
    run = SPINTrainer(make_model(), args=args, train_dataset=Dataset.from_dict(chats), processing_class=tokenizer)
    assert run.processing_class.decode(run.train_dataset[0]["target_ids"], skip_special_tokens=True).strip() == "Paris"
    with pytest.raises(ValueError, match="chat of row 0 does not end with an answer"):
        bad = Dataset.from_dict({"messages": [chats["messages"][0][:1]]})
        SPINTrainer(make_model(), args=args, train_dataset=bad, processing_class=tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_generations": 1}, "num_generations=1: a pair needs the best and the worst of 2 or more"),
        ({"max_length": 99}, "max_length=99 has no effect"),
        ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs=True can't be done"),
        ({"rounds": 0}, "rounds=0 must be at least 1"),
        ({"sample_from": "data"}, "sample_from='data' is unknown"),
    ],
)
def test_options_that_can_not_be(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        OnlineDPOConfig(str(tmp_path), **options)


def test_an_objective_without_reference_has_no_rounds_and_spin_no_rewards(tiny_llama, tmp_path):
    for options in ({"rounds": 2}, {"sample_from": "reference"}):
        with pytest.raises(ValueError, match="need a reference, and this objective has none"):
            online(tiny_llama, tmp_path, trainer_options={"objective": "orpo"}, **options)
    run = online(tiny_llama, tmp_path, trainer_options={"objective": "orpo"})
    run.train()
    assert all(map(math.isfinite, logged(run, "loss"))) and run.model.reference is None
    for name, value in {"missing_eos_penalty": 1.0, "reward_weights": [1.0], "chat_template_kwargs": {"a": 1}}.items():
        with pytest.raises(ValueError, match=f"{name}=.* has no effect"):
            SPINConfig(str(tmp_path), **{name: value})
    judge = {"judge": lambda prompts, pairs: [0.5] * len(pairs)}
    with pytest.raises(ValueError, match="reward_weights=.1.0. has no effect with a judge"):
        online(tiny_llama, tmp_path, None, judge, reward_weights=[1.0])
