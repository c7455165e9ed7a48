"""KTO: the reference point, loss aversion, TRL's numbers, and mismatched answers from other prompts only."""

import math

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from preference_setting import ANSWERS, OPTIONS, PAIRS, logged, trainer

from lifecycle_hf import KTOTrainer
from lifecycle_hf.trainers.preference.kto import RunningReference, with_mismatched


def run_kto(tiny_llama, tmp_path, dataset=ANSWERS, trainer_options=None, **options):
    return trainer(tiny_llama, tmp_path, KTOTrainer, dataset=dataset, trainer_options=trainer_options, **options)


def sum_by_hand(model, prompt, completion):
    """log π(y|x) in float64."""
    table = model.double()(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    return sum(table[len(prompt) + t - 1, token].item() for t, token in enumerate(completion))


def logratios_by_hand(make_model, rows, column):
    models = make_model(), make_model(seed=1)
    return [
        sum_by_hand(models[0], row["prompt_ids"], row[column]) - sum_by_hand(models[1], row["prompt_ids"], row[column])
        for row in rows
    ]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("sign", [1, -1])  # the mean over mismatched answers is above zero, or below
def test_loss_is_that_of_the_formula(tiny_llama, tmp_path, sign):
    make_model, _ = tiny_llama
    first, second = (make_model, lambda seed=0: make_model(seed=1 - seed))[::sign]
    options = {"beta": 0.3, "desirable_weight": 1.1, "undesirable_weight": 1.5, "learning_rate": 0.0}
    run = run_kto((first, tiny_llama[1]), tmp_path, trainer_options={"ref_model": first(seed=1)}, **options,
                  per_device_train_batch_size=8)  # fmt: skip
    rows = list(run.train_dataset)
    z0 = max(0.0, sum(logratios_by_hand(first, rows, "KL_completion_ids")) / 8)
    h = logratios_by_hand(first, rows, "completion_ids")
    expected = [
        1.1 * (1 - sigmoid(0.3 * (x - z0))) if row["label"] else 1.5 * (1 - sigmoid(0.3 * (z0 - x)))
        for x, row in zip(h, rows, strict=True)
    ]
    run.train()
    assert logged(run, "kl") == [pytest.approx(z0, abs=1e-5)] * 2
    assert logged(run, "loss") == [pytest.approx(sum(expected) / 8, rel=1e-5)] * 2
    desirable = [0.3 * x for x, row in zip(h, rows, strict=True) if row["label"]]
    others = [0.3 * x for x, row in zip(h, rows, strict=True) if not row["label"]]
    margin = sum(desirable) / len(desirable) - sum(others) / len(others)
    assert logged(run, "rewards/chosen")[0] == pytest.approx(sum(desirable) / len(desirable), abs=1e-5)
    assert logged(run, "rewards/margins")[0] == pytest.approx(margin, abs=1e-5)
    accuracy = sum((x > z0) == row["label"] for x, row in zip(h, rows, strict=True)) / 8
    assert logged(run, "rewards/accuracies")[0] == accuracy


def test_starts_at_one_half(tiny_llama, tmp_path):
    run = run_kto(
        tiny_llama, tmp_path, max_steps=1, trainer_options={"peft_config": LoraConfig(target_modules="all-linear")}
    )
    run.train()
    assert logged(run, "loss") == [pytest.approx(0.5, abs=1e-6)] and logged(run, "kl") == [0.0]


def test_loss_trajectory_is_that_of_trl_on_the_same_mismatched_answers(tiny_llama, tmp_path):
    """TRL's mismatched answer is the one before it in its batch, so both trainers get these rows."""
    tiny_llama[0]().save_pretrained(tmp_path / "base")
    _, tokenizer = tiny_llama
    peer = dict(OPTIONS, max_steps=6, gradient_checkpointing=False, bf16=False, undesirable_weight=1.2)
    peer.pop("activation_checkpointing")
    theirs = trl.KTOTrainer(
        str(tmp_path / "base"),
        args=trl.KTOConfig(str(tmp_path), **peer),
        train_dataset=ANSWERS,
        processing_class=tokenizer,
    )
    assert max(len(r["prompt_ids"]) + len(r["KL_completion_ids"]) for r in theirs.train_dataset) < 64
    rows = theirs.train_dataset.select_columns(["prompt_ids", "completion_ids", "KL_completion_ids", "label"])
    options = {"max_steps": 6, "undesirable_weight": 1.2, "train_sampling_strategy": "sequential"}
    ours = run_kto(tiny_llama, tmp_path, rows, **options)
    ours.train(), theirs.train()
    for name in ("loss", "grad_norm", "kl", "rewards/chosen", "rewards/rejected", "logps/chosen"):
        assert logged(ours, name) == pytest.approx(logged(theirs, name), rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize(
    "prompts", [["a", "b"], ["a", "a", "b"], list("aabbbccd"), list("aaaaaaab"), list("abcdefgh")]
)
def test_no_example_is_paired_with_its_own_prompt(prompts):
    rows = [
        {"prompt_ids": [0], "prompt_key": p, "completion_ids": [i, i, i], "ref_logps": -1.0}
        for i, p in enumerate(prompts)
    ]
    for seed in range(5):
        made = with_mismatched(Dataset.from_list(rows), seed=seed, max_length=3, where="train_dataset")
        assert made["completion_ids"] == [[i, i, i] for i in range(len(prompts))]
        assert "ref_logps" not in made.column_names  # it has no log-probs of the mismatched answers
        for row in made:
            other, again = row["KL_completion_ids"]  # 3 tokens minus the one of the prompt
            assert prompts[other] != row["prompt_key"] and again == other


def test_a_prompt_cut_short_by_merged_tokens_is_still_the_same_prompt(tiny_llama, tmp_path):
    rows = [
        {"prompt": "Please", "completion": text, "label": i % 2 == 0} for i, text in enumerate((" tell", "tell", "s"))
    ]
    with pytest.raises(ValueError, match="all 3 rows have the same prompt"):
        run_kto(tiny_llama, tmp_path, Dataset.from_list(rows))


@pytest.mark.parametrize("reference_point", ["mismatched", "running_mean"])
def test_how_a_step_is_cut_up_plays_no_part(tiny_llama, tmp_path, reference_point):
    """The reference point is that of the whole step, also at batch size 1."""

    def trajectory(size, accumulation):
        cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        run = run_kto(tiny_llama, tmp_path, max_steps=6, reference_point=reference_point, **cut)
        run.train()
        return [logged(run, name) for name in ("loss", "kl", "grad_norm")]

    for whole, single in zip(trajectory(8, 1), trajectory(1, 8), strict=True):
        assert single == pytest.approx(whole, rel=1e-3, abs=1e-5)


def test_a_batch_of_one_class_is_finite(tiny_llama, tmp_path):
    run = run_kto(tiny_llama, tmp_path, per_device_train_batch_size=1, max_steps=4)
    run.train()
    assert all(math.isfinite(x) for x in logged(run, "loss") + logged(run, "grad_norm"))
    assert len(logged(run, "rewards/chosen")) + len(logged(run, "rewards/rejected")) == 4  # each step has one


def test_running_mean_by_hand(tiny_llama, tmp_path):
    mean = RunningReference()
    mean.update(2.0), mean.update(-1.0)
    assert mean.state_dict() == {"mean": pytest.approx(0.9 * 0.2 - 0.1)}
    run = run_kto(tiny_llama, tmp_path, reference_point="running_mean", learning_rate=0.0, max_steps=3,
                  per_device_train_batch_size=8, trainer_options={"ref_model": tiny_llama[0](seed=1)})  # fmt: skip
    h = sum(logratios_by_hand(tiny_llama[0], run.train_dataset, "completion_ids")) / 8
    run.train()
    expected = [0.0, 0.1 * h, 0.19 * h]
    assert logged(run, "kl") == pytest.approx([max(0.0, x) for x in expected], abs=1e-5)
    assert run.stateful["reference_point"].mean == pytest.approx(0.271 * h, abs=1e-5)
    assert "KL_completion_ids" not in run.train_dataset.column_names


def test_pairs_become_answers_of_both_classes(tiny_llama, tmp_path):
    run = run_kto(tiny_llama, tmp_path, PAIRS)
    rows, tokenizer = run.train_dataset, tiny_llama[1]
    assert rows["label"] == [True] * 8 + [False] * 8
    assert tokenizer.decode(rows[0]["completion_ids"]) == PAIRS[0]["chosen"] + tokenizer.eos_token
    assert tokenizer.decode(rows[9]["completion_ids"]) == PAIRS[1]["rejected"] + tokenizer.eos_token
    run.train()
    assert logged(run, "rewards/margins")[-1] > 0


@pytest.mark.parametrize("peft", [None, LoraConfig(r=4, target_modules="all-linear")], ids=["full", "lora"])
def test_cached_reference_gives_the_same_run(tiny_llama, tmp_path, peft):
    given = {"peft_config": peft, "eval_dataset": ANSWERS.select(range(4))}
    keep = {"precompute_ref_log_probs": True, "ref_log_probs_path": str(tmp_path / "kept")}
    online = run_kto(tiny_llama, tmp_path, max_steps=4, trainer_options=given)
    runs = [run_kto(tiny_llama, tmp_path, max_steps=4, trainer_options=given, **keep) for _ in range(2)]
    online.train()
    for cached in runs:
        assert cached.model.reference is None and "ref_KL_logps" in cached.train_dataset.column_names
        cached.train()
        for name in ("loss", "kl"):
            assert logged(cached, name) == pytest.approx(logged(online, name), rel=1e-4, abs=1e-6)
        assert cached.evaluate()["eval_loss"] == pytest.approx(online.evaluate()["eval_loss"], rel=1e-5)


def test_classes_out_of_balance_are_told_with_the_weights_that_would_do(tiny_llama, tmp_path):
    uneven = ANSWERS.select([0, 1, 2, 4, 6])  # 4 desirable, 1 other
    with pytest.warns(UserWarning, match=r"= 4.00, outside \[1, 4/3\].*desirable_weight from 0.25 to 0.33"):
        run_kto(tiny_llama, tmp_path, uneven)


def test_loss_aversion_weighs_the_undesirable(tiny_llama, tmp_path):
    options = {"max_steps": 1, "per_device_train_batch_size": 8}
    even, averse = (run_kto(tiny_llama, tmp_path, undesirable_weight=w, **options) for w in (1.0, 2.0))
    even.train(), averse.train()
    assert logged(even, "loss") == [pytest.approx(0.5)]
    assert logged(averse, "loss") == [pytest.approx((4 * 0.5 + 4 * 2 * 0.5) / 8)]
