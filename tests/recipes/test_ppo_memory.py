"""Two hundred updates take the memory of twenty."""

import runpy
import sys
from pathlib import Path

import pytest
from transformers import TrainerCallback

RECIPE = Path(__file__).parents[2] / "recipes" / "ppo.py"


def resident_mib():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20


class Watch(TrainerCallback):
    """Resident memory at the end of every update."""

    def __init__(self, steps_per_update):
        self.steps_per_update, self.mib = steps_per_update, []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.steps_per_update == 0:
            self.mib.append(resident_mib())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's account of resident memory")
@pytest.mark.parametrize("options", [[], ["--value", "head"]], ids=["model", "head"])
def test_memory_does_not_creep(tmp_path, monkeypatch, options):
    from lifecycle_hf import PPOTrainer

    watch, train = Watch(2), PPOTrainer.train
    monkeypatch.setattr(PPOTrainer, "train", lambda self, **kw: (self.add_callback(watch), train(self, **kw))[1])
    arguments = [
        "--output_dir", tmp_path, "--ppo_epochs", 1, "--num_mini_batches", 2, "--max_steps", 400,
        "--per_device_train_batch_size", 8, "--ptx_batch_size", 8, "--measure_updates", 50, "--learning_rate", 1e-5,
        "--log_completions", "false", "--save_strategy", "steps", "--save_steps", 100, "--save_total_limit", 1,
        *options,
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["ppo.py", *map(str, arguments)])
    runpy.run_path(str(RECIPE), run_name="__main__")
    assert len(watch.mib) == 200
    assert max(watch.mib[20:]) <= 1.05 * watch.mib[19], watch.mib[::20]
    print([round(x) for x in watch.mib[::20]])
