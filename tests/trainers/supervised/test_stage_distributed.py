"""Supervised stages in two processes on CPU give what one gives, held-out metrics included."""

import pytest
from launching import launch_jobs, needs_deepspeed, results
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from lifecycle_hf.models.loading import load_causal_lm, load_classifier, load_reward_model

TASKS = {
    "classification": ("SEQ_CLS", AutoModelForSequenceClassification),
    "qa": ("QUESTION_ANS", AutoModelForQuestionAnswering),
    "seq2seq": ("CAUSAL_LM", AutoModelForCausalLM),
    "t5": ("SEQ_2_SEQ_LM", AutoModelForSeq2SeqLM),
}


@pytest.fixture(scope="module")
def base(tiny_llama, tmp_path_factory):
    make_model, tokenizer = tiny_llama
    path = tmp_path_factory.mktemp("base")
    make_model().save_pretrained(path), tokenizer.save_pretrained(path)
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": len(tokenizer)}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    t5 = T5Config(**sizes, **ends, decoder_start_token_id=tokenizer.pad_token_id, dropout_rate=0.0)
    T5ForConditionalGeneration(t5).save_pretrained(path / "t5"), tokenizer.save_pretrained(path / "t5")
    return path


def run(config, output, batch, *arguments, fsdp=False):
    return results(launch_jobs(config, [("stage_invariance", [output, batch, *arguments])], fsdp))["run"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "reward", "classification", "qa", "seq2seq", "t5"])
@pytest.mark.parametrize(
    ("config", "mode"),
    [
        ("cpu_ddp", "full"),
        pytest.param("cpu_zero2", "full", marks=needs_deepspeed),
        pytest.param("cpu_zero3", "full", marks=needs_deepspeed),
        pytest.param("cpu_zero3", "lora", marks=needs_deepspeed),
    ],
)
def test_two_processes_of_four_equal_one_of_eight(base, tmp_path, stage, config, mode):
    """7 held-out rows in batches of 2 × 2: the row that fills up the last batch must not count."""
    base = base / "t5" if stage == "t5" else base
    one = run("cpu", tmp_path / "one", 8, stage, mode, base)
    two = run(config, tmp_path / "two", 4, stage, mode, base)
    assert (one["world_size"], two["world_size"]) == (1, 2)
    assert two["held_out"] == pytest.approx(one["held_out"], rel=1e-3, abs=1e-4)
    for first, second in zip(one["steps"], two["steps"], strict=True):
        assert second == pytest.approx(first, rel=1e-3, abs=1e-4)
    if stage in TASKS:
        task, auto = TASKS[stage]
        load_classifier(str(tmp_path / "two"), task=task) if mode == "lora" else auto.from_pretrained(tmp_path / "two")
    elif stage == "reward":
        assert load_reward_model(str(tmp_path / "two")).config.reward_center == two["held_out"]["eval_reward_center"]
    elif mode == "full":
        AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    else:
        load_causal_lm(str(tmp_path / "two"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "fsdp"),
    [("cpu_ddp", False), ("cpu_ddp", True), pytest.param("cpu_zero2", False, marks=needs_deepspeed)],
)
def test_a_constrained_run_has_one_multiplier_over_all_processes(base, tmp_path, config, fsdp):
    one = run("cpu", tmp_path / "one", 8, "sft", "constrained", base)
    two = run(config, tmp_path / "two", 4, "sft", "constrained", base, fsdp=fsdp)
    assert (one["world_size"], two["world_size"]) == (1, 2) and (two["engine"] == "FSDP") == fsdp
    for first, second in zip(one["steps"], two["steps"], strict=True):
        assert second == pytest.approx(first, rel=1e-3, abs=1e-4)
    losses = [step["loss/capability"] for step in one["steps"]]
    by_hand = [0.1 * (losses[0] - 1), 0.1 * (sum(losses) - 2)]
    assert [step["lambda/capability"] for step in one["steps"]] == pytest.approx(by_hand) and by_hand[0] > 0
