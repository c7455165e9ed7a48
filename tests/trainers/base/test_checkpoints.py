"""A checkpoint is complete or absent, and a stop within a log line leaves no trace."""

from pathlib import Path

import pytest
import torch
from ppo_setting import logged, trainer
from safetensors.torch import load_file
from trainer_setting import MAKE

import lifecycle_hf.trainers.base.checkpoints as checkpoints


def run(tiny_llama, tmp_path, **options):
    defaults = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1}
    return trainer(tiny_llama, tmp_path, **(defaults | options))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("at", ["save_state", "_save_optimizer_and_scheduler", "save_to_json", "rotate_checkpoints"])
def test_a_save_that_breaks_off_leaves_the_checkpoints_before_it(tiny_llama, tmp_path, monkeypatch, at):
    broken = run(tiny_llama, tmp_path)

    def stop(*args, **kwargs):
        if broken.state.global_step == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    owner = {"save_state": checkpoints, "save_to_json": broken.state}.get(at, broken)
    if at == "save_to_json":
        owner = type(broken.state)
    original = getattr(owner, at)
    monkeypatch.setattr(owner, at, stop)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    monkeypatch.undo()
    whole = ["checkpoint-1", "checkpoint-2"] if at == "rotate_checkpoints" else ["checkpoint-1"]
    left = [name for name in names(tmp_path) if name.startswith("checkpoint")]
    assert left == whole
    files = names(tmp_path / "checkpoint-1")
    assert {"trainer_state.json", "optimizer.pt", "lifecycle_log_rank0.json", "model.safetensors"} <= set(files)
    again = run(tiny_llama, tmp_path)
    again.train(resume_from_checkpoint=True)
    assert not list(tmp_path.glob("_tmp-*")) and names(tmp_path / "checkpoint-6") == files


def test_old_checkpoints_go_and_the_best_stays(tiny_llama, tmp_path):
    scores = iter([0.0, 5.0, 1.0, 2.0, 3.0, 4.0])
    best = run(
        tiny_llama, tmp_path, save_total_limit=2, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        metric_for_best_model="eval_x", greater_is_better=True,
        trainer_options={"eval_dataset": trainer(tiny_llama, tmp_path).train_dataset.select_columns(["prompt"])},
    )  # fmt: skip
    evaluate = best.evaluate

    def with_score(*args, **kwargs):
        return evaluate(*args, **kwargs) | {"eval_x": next(scores)}

    best.evaluate = with_score
    best.train()
    assert [name for name in names(tmp_path) if "checkpoint" in name] == ["checkpoint-2", "checkpoint-6"]
    assert Path(best.state.best_model_checkpoint) == tmp_path / "checkpoint-2"
    state = type(best.state).load_from_json(tmp_path / "checkpoint-6" / "trainer_state.json")
    assert Path(state.best_model_checkpoint) == tmp_path / "checkpoint-2"


def test_a_checkpoint_is_pushed_once_it_stands(tiny_llama, tmp_path, monkeypatch):
    saver, pushed = run(tiny_llama, tmp_path, max_steps=2), []

    def push(self, folder):
        pushed.append((Path(folder), (Path(folder) / "trainer_state.json").exists()))

    monkeypatch.setattr("transformers.Trainer._push_from_checkpoint", push)
    monkeypatch.setattr("transformers.Trainer._finalize_training", lambda *args: None)
    saver.args.push_to_hub = True
    saver.train()
    assert pushed == [(tmp_path / f"checkpoint-{n}", True) for n in (1, 2)]


@pytest.mark.parametrize("stop", [2, 4, 5])
def test_a_log_line_that_a_stop_cuts_in_two_is_that_of_the_whole_run(tiny_llama, tmp_path, stop):
    options = {"logging_steps": 3, "max_steps": 9, "ppo_epochs": 2, "learning_rate": 1e-2, "save_steps": stop}
    whole = run(tiny_llama, tmp_path, **options)
    whole.train()
    resumed = run(tiny_llama, tmp_path, **options)
    result = resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    for metric in ("loss", "grad_norm", "kl", "score", "entropy", "loss/policy", "loss/value", "policy/clip_fraction"):
        assert logged(resumed, metric) == logged(whole, metric) and len(logged(whole, metric)) == 3
    since = [entry["loss"] * 3 for entry in whole.state.log_history if "loss" in entry]
    assert abs(result.training_loss) <= max(map(abs, since))


def test_a_finished_run_that_is_resumed_makes_no_step_more(tiny_llama, tmp_path):
    run(tiny_llama, tmp_path, max_steps=1).train()
    (tmp_path / "_tmp-checkpoint-1").mkdir()  # what a kill right after the last save leaves
    (tmp_path / "_tmp-mine").mkdir()
    again = run(tiny_llama, tmp_path, max_steps=1)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 1 and names(tmp_path) == ["_tmp-mine", "checkpoint-1"]


@pytest.mark.parametrize("name", ["pretraining", "sft", "reward", "classification", "qa", "seq2seq", "dpo", "kto"])
def test_no_trainer_makes_a_step_more_than_max_steps(tiny_llama, tmp_path, name):
    options = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2}
    MAKE[name](tiny_llama, tmp_path, **options).train()
    weights = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    again = MAKE[name](tiny_llama, tmp_path, **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 1 and len(again.train_dataset) > 2  # so that a second step was to be had
    for key, tensor in getattr(again.model, "policy", again.model).state_dict().items():
        if key in weights:
            assert torch.equal(tensor, weights[key]), key
