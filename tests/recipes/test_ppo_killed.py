"""A PPO run that is killed at any moment goes on from its last checkpoint as if nothing had happened."""

import json
import os
import subprocess
import sys

import pytest
from launching import REPOSITORY, results

SCRIPT = REPOSITORY / "tests" / "launched" / "ppo_killed.py"
MODES = {
    "full": [],
    "lora": ["--use_peft", "--lora_r", "4", "--save_total_limit", "2"],
    "qlora": ["--use_peft", "--lora_r", "4", "--load_in_4bit"],
}
OPTIONS = [
    "--max_steps", "14", "--save_strategy", "steps", "--save_steps", "3", "--logging_steps", "2",
    "--disable_tqdm", "true", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2",
    "--ppo_epochs", "2", "--num_mini_batches", "2", "--max_completion_length", "8", "--ptx_coef", "0.5",
    "--ptx_batch_size", "2", "--kl_control", "adaptive", "--kl_horizon", "40",
    "--reward_normalization", "running", "--entropy_coef", "0.01",
    "--learning_rate", "1e-2", "--lr_scheduler_type", "linear", "--measure_updates", "1", "--log_completions", "false",
]  # fmt: skip
REWARD = """
def letters(prompts, completions, **columns):
    return [float(text.count("e")) - 0.1 * len(text) for text in completions]
"""


@pytest.fixture
def killed(tiny_llama, tmp_path):
    """killed(mode, kills, seed, kinds): what tests/launched/ppo_killed.py found."""
    make_model, tokenizer = tiny_llama
    # 4-bit weights are quantised in blocks of 64.
    make_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    words = ["Paris", "a small red fox", "seven is a prime number", "hello"]
    for file, column in (("prompts", "prompt"), ("texts", "text")):
        rows = [{column: f"{i} {words[i % 4]}"} for i in range(20)]
        (tmp_path / f"{file}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "killed_reward.py").write_text(REWARD)

    def run(mode, kills, seed, *kinds):
        files = {"model_name_or_path": "base", "dataset_name": "prompts.jsonl", "ptx_dataset_name": "texts.jsonl"}
        data = [word for option, file in files.items() for word in (f"--{option}", str(tmp_path / file))]
        command = [
            *(sys.executable, str(SCRIPT), str(tmp_path), str(kills), str(seed), ",".join(kinds), *data, *OPTIONS),
            *("--reward_funcs", "killed_reward:letters", *MODES[mode]),
        ]
        path = os.pathsep.join([str(REPOSITORY), str(tmp_path)])
        env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "cache")}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        found = results(done.stdout)["killed"]
        print({"mode": mode, "seed": seed} | found)
        return found

    return run


def within_an_update(found):
    """Whether a run went on from a checkpoint that stands within an update of 4 optimizer steps."""
    return any(int(step) % 4 for step in found["resumed_at"])


def test_a_run_killed_twice_ends_as_if_it_had_not_been(killed):
    found = killed("lora", 2, 0, "file", "update")
    assert found["wrong"] == []
    assert found["kills"] == {"file": 1, "update": 1} and within_an_update(found)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_twenty_kills_at_any_moment_change_nothing(killed, mode):
    found = killed(mode, 20, 0, "time", "rollout", "update", "saving", "file", "finishing")
    assert found["wrong"] == []
    assert sum(found["doing"].values()) == 20 and within_an_update(found)
    assert found["doing"].keys() >= {"rollout", "update", "saving", "finishing"}
