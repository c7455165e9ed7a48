"""Every field of transformers.TrainingArguments works in every trainer, or a config that has it is refused by name."""

import dataclasses
import gc
import math

import pytest
import torch
from datasets import Dataset
from ppo_setting import PROMPTS
from preference_setting import ANSWERS, PAIRS
from trainer_setting import LABELLED, MAKE, QUESTIONS, TEXTS, WRITTEN
from transformers import TrainingArguments

from lifecycle_hf import (
    ClassificationConfig,
    DPOConfig,
    KTOConfig,
    PPOConfig,
    PretrainingConfig,
    QuestionAnsweringConfig,
    RewardConfig,
    Seq2SeqConfig,
    SFTConfig,
)

CONFIGS = {
    "ppo": PPOConfig, "dpo": DPOConfig, "kto": KTOConfig, "sft": SFTConfig, "reward": RewardConfig,
    "pretraining": PretrainingConfig, "classification": ClassificationConfig, "qa": QuestionAnsweringConfig,
    "seq2seq": Seq2SeqConfig,
}  # fmt: skip
EVAL = {
    "ppo": Dataset.from_dict({"prompt": PROMPTS[:3]}), "dpo": PAIRS.select(range(3)), "kto": ANSWERS.select(range(4)),
    "classification": LABELLED.select(range(3)), "qa": QUESTIONS.select(range(3)),
    "seq2seq": WRITTEN.select(range(3)),
    "sft": TEXTS.select(range(3)), "reward": PAIRS.select(range(3)),
    "pretraining": Dataset.from_dict({"text": [row["chosen"] * 20 for row in PAIRS.select(range(4))]}),
}  # fmt: skip
LOSS_OF = {"ppo": "eval_score"}

# Every trainer makes two runs with these options, apart from those that it refuses.
FIRST = {
    "per_device_train_batch_size": 2, "max_steps": 2, "learning_rate": 1e-3, "lr_scheduler_type": "polynomial",
    "lr_scheduler_kwargs": {"power": 2.0}, "warmup_steps": 1, "optim": "adamw_torch", "weight_decay": 0.1,
    "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6, "gradient_accumulation_steps": 2,
    "max_grad_norm": 0.5, "bf16": True, "bf16_full_eval": True, "activation_checkpointing": True,
    "activation_checkpointing_kwargs": {"use_reentrant": False}, "use_cache": True, "torch_empty_cache_steps": 1,
    "logging_steps": 1, "logging_first_step": True, "log_on_each_node": False, "logging_nan_inf_filter": False,
    "include_num_input_tokens_seen": "non_padding", "log_level": "error", "log_level_replica": "error",
    "disable_tqdm": True, "run_name": "mine", "project": "ours", "eval_strategy": "steps", "eval_steps": 1,
    "eval_delay": 1, "per_device_eval_batch_size": 3, "prediction_loss_only": True, "eval_on_start": True,
    "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "save_on_each_node": True,
    "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False, "seed": 3,
    "data_seed": 4, "accelerator_config": {"use_seedable_sampler": True}, "dataloader_num_workers": 1,
    "dataloader_pin_memory": False, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 2,
    "dataloader_multiprocessing_context": "fork", "dataloader_in_order": False, "skip_memory_metrics": False,
    "train_sampling_strategy": "sequential", "debug": "underflow_overflow", "do_train": True, "do_eval": True,
    "do_predict": True, "ignore_data_skip": True, "restore_callback_states_from_checkpoint": True,
    "average_tokens_across_devices": False, "label_smoothing_factor": 0.1, "eval_use_gather_object": True,
}  # fmt: skip
SECOND = {
    "num_train_epochs": 0.5, "optim": "sgd", "optim_args": "momentum=0.9", "logging_strategy": "epoch",
    "eval_strategy": "epoch", "save_strategy": "epoch", "save_only_model": True, "enable_jit_checkpoint": True,
    "neftune_noise_alpha": 5.0, "train_sampling_strategy": "group_by_length", "length_column_name": "tokens",
    "dataloader_drop_last": True, "auto_find_batch_size": True, "remove_unused_columns": True,
    "eval_do_concat_batches": False, "eval_accumulation_steps": 1, "include_for_metrics": ["loss"],
    "batch_eval_metrics": True, "label_names": ["labels"], "full_determinism": True,
}  # fmt: skip
OURS_REFUSE = {
    "average_tokens_across_devices", "label_smoothing_factor", "label_names", "eval_do_concat_batches",
    "eval_accumulation_steps", "include_for_metrics", "batch_eval_metrics", "remove_unused_columns",
}  # fmt: skip
POLICIES_REFUSE = OURS_REFUSE | {"neftune_noise_alpha", "auto_find_batch_size", "use_liger_kernel"}
REFUSED = {
    "ppo": POLICIES_REFUSE
    | {"include_num_input_tokens_seen", "train_sampling_strategy", "dataloader_drop_last", "length_column_name"},
    "dpo": POLICIES_REFUSE,
    "kto": POLICIES_REFUSE,
    "sft": set(),
    "reward": {"average_tokens_across_devices", "label_smoothing_factor", "label_names"},
    "pretraining": OURS_REFUSE | {"length_column_name"},
    "classification": OURS_REFUSE - {"eval_accumulation_steps"},
    "qa": OURS_REFUSE - {"eval_accumulation_steps"},
    "seq2seq": OURS_REFUSE - {"eval_accumulation_steps", "label_smoothing_factor"},
}
ELSEWHERE = {
    "output_dir": "every test", "use_cpu": "every test", "resume_from_checkpoint": "the recipes' tests",
    "gradient_checkpointing": "the old name of activation_checkpointing, tests/cli/test_idle_options.py",
    "gradient_checkpointing_kwargs": "the old name of activation_checkpointing_kwargs",
    "fp16": "a GPU", "fp16_full_eval": "a GPU", "tf32": "a GPU",
    "torch_compile": "a compiler", "torch_compile_backend": "a compiler", "torch_compile_mode": "a compiler",
    "use_liger_kernel": "a GPU", "liger_kernel_config": "a GPU", "optim_target_modules": "the packages of GaLore",
    "parallelism_config": "several GPUs", "fsdp": "several GPUs; tests/launched", "fsdp_config": "several GPUs",
    "deepspeed": "several processes; tests/launched", "local_rank": "set by a launcher",
    "ddp_find_unused_parameters": "several processes", "ddp_bucket_cap_mb": "several processes",
    "ddp_broadcast_buffers": "several processes", "ddp_static_graph": "several processes",
    "ddp_backend": "several processes", "ddp_timeout": "several processes", "report_to": "a tracker",
    "trackio_space_id": "a network", "trackio_bucket_id": "a network", "trackio_static_space_id": "a network",
    "push_to_hub": "tests/test_hub.py", "hub_token": "tests/test_hub.py", "hub_private_repo": "tests/test_hub.py",
    "hub_model_id": "tests/test_hub.py", "hub_strategy": "tests/test_hub.py", "hub_always_push": "a network",
    "hub_revision": "a network",
}  # fmt: skip
VALUES = FIRST | SECOND | {"use_liger_kernel": True, "train_sampling_strategy": "group_by_length"}


def fields():
    return [field.name for field in dataclasses.fields(TrainingArguments)]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_field_is_in_the_table(name):
    known = FIRST.keys() | SECOND.keys() | REFUSED[name] | ELSEWHERE.keys()
    assert set(fields()) == known, "transformers has other options: say here what each trainer makes of them"
    assert REFUSED[name] >= CONFIGS[name].refused.keys() & set(fields())


@pytest.mark.parametrize(("name", "field"), [(name, field) for name in CONFIGS for field in sorted(REFUSED[name])])
def test_refused_by_name(name, field, tmp_path):
    with pytest.raises(ValueError, match=rf"{field}.*(leave|set_|set |label_smoothing|take needed)"):
        CONFIGS[name](str(tmp_path), use_cpu=True, report_to="none", bf16=False, **{field: VALUES[field]})


def run(name, options, tiny_llama, tmp_path, **trainer_options):
    options = {key: value for key, value in options.items() if key not in REFUSED[name]}
    if name == "pretraining" and options.get("train_sampling_strategy") == "group_by_length":
        del options["train_sampling_strategy"]
    options |= {"trainer_options": {"eval_dataset": EVAL[name], **trainer_options}}
    return MAKE[name](tiny_llama, tmp_path, **options)


@pytest.fixture(autouse=True, scope="module")
def quick_goodbyes():
    """Wait for workers of data loaders for a moment, and not for the usual 5 s each, before they are terminated."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
        yield
        gc.collect()  # which ends the workers of trainers that nothing refers to


@pytest.mark.parametrize("name", CONFIGS)
def test_the_first_options_train(name, tiny_llama, tmp_path):
    best = LOSS_OF.get(name, "eval_loss")
    trainer = run(name, FIRST | {"metric_for_best_model": best}, tiny_llama, tmp_path)
    trainer.train()
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert trainer.state.best_model_checkpoint and trainer.model.config.use_cache
    if name != "ppo":
        assert trainer.state.num_input_tokens_seen > 0
    assert best in trainer.evaluate()
    predicted = EVAL[name] if name != "sft" else trainer.eval_dataset
    metrics = trainer.predict(predicted).metrics
    assert math.isfinite(metrics[best.replace("eval_", "test_")])


@pytest.mark.parametrize("name", CONFIGS)
def test_the_second_options_train(name, tiny_llama, tmp_path):
    options = {"max_steps": -1, "logging_steps": 10, "learning_rate": 1e-3}
    options |= {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}
    try:
        trainer = run(name, SECOND | options, tiny_llama, tmp_path)
        trainer.train()
    finally:
        torch.use_deterministic_algorithms(False)
    assert trainer.state.global_step > 0
    assert all(map(math.isfinite, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))


@pytest.mark.parametrize("argument", ["compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics"])
@pytest.mark.parametrize("name", CONFIGS)
def test_arguments_of_transformers_trainer_are_used_or_refused(name, argument, tiny_llama, tmp_path):
    if name in ("sft", "reward") and argument != "compute_loss_func":
        given = {"compute_metrics": lambda found: {"rows": len(found.predictions)}}
        given |= {argument: given.get(argument, lambda logits, labels: logits[..., :1])}
        trainer = run(name, {"bf16": False}, tiny_llama, tmp_path, **given)
        assert trainer.evaluate()["eval_rows"] == 3
    elif name != "sft":
        with pytest.raises((ValueError, TypeError), match=f"{argument} would have no effect|unexpected.*{argument}"):
            run(name, {}, tiny_llama, tmp_path, **{argument: len})


LENGTHS = {
    "dpo": ("prompt_ids", "chosen_ids", "rejected_ids"),
    "kto": ("prompt_ids", "completion_ids"),
    "reward": ("chosen_ids", "rejected_ids"),
    "classification": ("input_ids",),
    "qa": ("input_ids",),
    "seq2seq": ("input_ids", "labels"),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_grouping_by_length_reads_the_length_of_all_tokens(name, tiny_llama, tmp_path):
    trainer = run(name, {"train_sampling_strategy": "group_by_length"}, tiny_llama, tmp_path)
    lengths = [sum(len(row[column]) for column in LENGTHS[name]) for row in trainer.train_dataset]
    assert trainer.train_dataset["length"][:] == lengths and len(set(lengths)) > 1


def test_sft_says_how_raw_rows_are_measured(tiny_llama, tmp_path):
    trainer = run("sft", {}, tiny_llama, tmp_path)
    with pytest.raises(ValueError, match=r"test_dataset is not tokenised .* call evaluate\(dataset"):
        trainer.predict(TEXTS)
    assert "test_loss" in trainer.evaluate(TEXTS.select(range(2)), metric_key_prefix="test")
