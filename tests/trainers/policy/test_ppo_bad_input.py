"""Test that wrong input stops a run before training, with a message that names the place and the remedy."""

import pytest
import torch
from datasets import Dataset
from ppo_setting import PROMPTS, config, count_e, trainer
from transformers import LlamaForSequenceClassification

from lifecycle_hf.trainers.policy.ppo import PPOTrainer

TEXTS = Dataset.from_dict({"text": ["The capital of France is Paris."]})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"promt": PROMPTS}, r"train_dataset.*'prompt'.*Columns found: \['promt'\].*misspelt"),
        ({"prompt": []}, "train_dataset is empty"),
        ({"prompt": ["hello " * 400]}, "longer than .* No row is left"),
        ({"prompt": [""]}, "empty prompt"),
    ],
)
def test_prompts(tiny_llama, tmp_path, data, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        trainer(tiny_llama, tmp_path, dataset=Dataset.from_dict(data))


def test_no_dataset(tiny_llama, tmp_path):
    make_model, tokenizer = tiny_llama
    with pytest.raises(ValueError, match="train_dataset is missing"):
        PPOTrainer(make_model(), count_e, config(tmp_path), processing_class=tokenizer)


def test_bad_rows_are_dropped_with_a_count_or_refused(tiny_llama, tmp_path):
    data = Dataset.from_dict({"prompt": ["hello", "", "Please"]})
    with pytest.warns(UserWarning, match=r"1 of 3 rows.*the first is row 1"):
        run = trainer(tiny_llama, tmp_path, dataset=data)
    assert list(run.train_dataset["prompt"]) == ["hello", "Please"]
    with pytest.raises(ValueError, match="row 1.*strict_data"):
        trainer(tiny_llama, tmp_path, dataset=data, strict_data=True)


def test_completions_must_leave_room_for_a_prompt(tiny_llama, tmp_path):
    with pytest.raises(ValueError, match="max_completion_length=256 leaves no room.*256 positions"):
        trainer(tiny_llama, tmp_path, max_completion_length=256)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "returned 1 values for 4 completions"),
        (None, "returned None for 4 completions"),
        ([0.0, None, 0.0, 0.0], "returned None for row 1"),
        ([0.0, 0.0, float("nan"), 0.0], "returned nan for row 2"),
        ([0.0, {"score": 1.0}, 0.0, 0.0], r"returned \{'score': 1.0\} for row 1"),
        ([0.0, 0.0, 0.0, "good"], "returned good for row 3"),
        (torch.zeros(4, 2), r"returned \[0.0, 0.0\] for row 0"),
    ],
)
def test_reward_functions(tiny_llama, tmp_path, returned, message):
    def broken(prompts, completions):
        return returned

    run = trainer(tiny_llama, tmp_path, reward_funcs=broken)
    before = [p.detach().clone() for p in run.model.parameters()]
    with pytest.raises(ValueError, match=f"reward function 'broken' {message}"):
        run.train()
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))


def test_reward_funcs_missing_or_miscounted(tiny_llama, tmp_path):
    with pytest.raises(ValueError, match="reward_funcs is missing"):
        trainer(tiny_llama, tmp_path, reward_funcs=None)
    with pytest.raises(ValueError, match="reward_weights has 2 entries for 1 reward_funcs"):
        trainer(tiny_llama, tmp_path, reward_weights=[1.0, 2.0])


def test_reward_model_of_another_tokenizer(tiny_llama, tmp_path):
    make_model, _ = tiny_llama
    small = make_model(vocab_size=100).config
    small.num_labels = 1
    with pytest.raises(ValueError, match="another tokenizer.*reward_processing_classes"):
        trainer(tiny_llama, tmp_path, reward_funcs=LlamaForSequenceClassification(small))


def test_tokenizer_without_eos_or_chat_template(tiny_llama, tmp_path):
    import copy

    make_model, tokenizer = tiny_llama
    bare = copy.deepcopy(tokenizer)
    bare.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        trainer((make_model, bare), tmp_path)
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    chat = Dataset.from_dict({"prompt": [[{"role": "user", "content": "hello"}]]})
    with pytest.raises(ValueError, match="no chat template"):
        trainer((make_model, plain), tmp_path, dataset=chat)


def test_pad_token_outside_the_vocabulary(tiny_llama, tmp_path):
    import copy

    make_model, tokenizer = tiny_llama
    padded = copy.deepcopy(tokenizer)
    padded.add_special_tokens({"pad_token": "<|nowhere|>"})
    with pytest.raises(ValueError, match=r"pad token '<\|nowhere\|>' .*outside the vocabulary"):
        trainer((make_model, padded), tmp_path)


def test_ptx_coef_needs_a_dataset(tiny_llama, tmp_path):
    with pytest.raises(ValueError, match="ptx_coef=0.5 is set, but ptx_dataset is not"):
        trainer(tiny_llama, tmp_path, ptx_coef=0.5)
    with pytest.warns(UserWarning, match="ptx_dataset is given, but ptx_coef is 0"):
        trainer(tiny_llama, tmp_path, trainer_options={"ptx_dataset": TEXTS})


def test_value_model_that_is_none(tiny_llama, tmp_path):
    make_model, _ = tiny_llama
    with pytest.raises(ValueError, match="num_labels=1"):
        trainer(tiny_llama, tmp_path, trainer_options={"value_model": make_model()})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_control": "adaptve"}, "kl_control='adaptve' is unknown: choose one of fixed, adaptive, ziegler"),
        ({"advantage_estimator": "vtrace"}, "advantage_estimator"),
        ({"reward_normalization": "z"}, "reward_normalization"),
        ({"value": "critic"}, "value='critic' is unknown"),
        ({"on_fault": "ignore"}, "on_fault='ignore' is unknown: choose one of stop, skip"),
        ({"ppo_epochs": 0}, "ppo_epochs=0 must be at least 1"),
        ({"ppo_epochs": 1.5}, "ppo_epochs=1.5 must be at least 1, and whole"),
        ({"num_mini_batches": 2.0}, "num_mini_batches=2.0 must be at least 1, and whole"),
        ({"reward_retries": 0.5}, "reward_retries=0.5 must be a whole number, and not negative"),
        ({"generation_batch_size": 0}, "generation_batch_size=0 must be at least 1"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"reward_clip": 0.0}, "reward_clip=0.0 must be above 0"),
        ({"kl_target": float("nan")}, "kl_target=nan must be above 0"),
        ({"gamma": 1.5}, "gamma=1.5 must lie between 0 and 1"),
        ({"kl_coef": -0.1}, "kl_coef=-0.1 must not be negative"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must not be negative, nor infinite"),
        ({"reward_weights": [1.0, float("inf")]}, "reward_weights=.* must be finite numbers"),
        ({"reward_weights": [0.0, 0.0]}, "reward_weights=.* must be finite numbers, not all of them 0"),
        ({"stop_tokens": []}, "stop_tokens=.* is empty"),
        ({"advantage_estimator": "reinforce", "bootstrap_truncated": True}, "bootstrap_truncated=True has no effect"),
        ({"advantage_estimator": "reinforce", "value": "head"}, "value='head' has no effect with .*reinforce"),
        ({"advantage_estimator": "reinforce", "value_learning_rate": 1e-3}, "value_learning_rate=0.001 has no effect"),
        ({"kl_control": "adaptive", "kl_coef": 0.0}, "kl_coef=0 would stay 0 with kl_control='adaptive'"),
        ({"kl_control": "exponential", "kl_coef": 2.0}, "kl_coef=2.0 is above kl_coef_max=1.0"),
        ({"kl_control": "adaptive", "max_kl": 5.0}, "max_kl=5.0 must be above kl_target=6.0"),
        ({"use_vllm": True, "merge_adapter": False}, "use_vllm sends merged weights"),
        ({"use_vllm": True, "generation_batch_size": 4}, "use_vllm decodes whole rollouts.* generation_batch_size=4"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True would change the rollout's size"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0 makes the first ratio differ"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 has no effect"),
        ({"remove_unused_columns": True}, "remove_unused_columns"),
    ],
)  # fmt: skip
def test_options_are_checked_against_their_bounds_and_each_other(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_reward_function_that_needs_an_absent_column(tiny_llama, tmp_path):
    def graded(prompts, completions, answer):
        return [0.0] * len(prompts)

    with pytest.raises(ValueError, match=r"'graded' needs \['answer'\], and train_dataset has the columns"):
        trainer(tiny_llama, tmp_path, reward_funcs=graded)
