"""The launches that tests compare with one process. Each engine is launched once for all of them, by whichever worker
of pytest comes first."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from launching import launch_jobs, results
from transformers import LlamaForSequenceClassification

CONFIGS = {"NO": "cpu", "MULTI_CPU": "cpu_ddp", "FSDP": "cpu_ddp", "ZERO2": "cpu_zero2", "ZERO3": "cpu_zero3"}
BATCH = {"ppo": 8, "preference": 4, "pretraining": 8, "projection": 8}
"""Rows of a step, over all processes."""
WHOLE = {
    "ppo": "full,lora,head,grpo,resume",
    "preference": "dpo,dpo_cached,dpo_lora,dpo_bottleneck,kto,orpo,online",
    "pretraining": "causal,ul2,ewc,doremi",
    "projection": "gradient,update",
}
QUICK = {
    "NO": WHOLE | {"ppo": "full,lora,head,grpo"},
    "MULTI_CPU": WHOLE | {"ppo": "full,lora,grpo,resume"},
    "ZERO2": {"preference": "dpo,dpo_bottleneck,online"},
    "ZERO3": {"ppo": "full,lora"},
}
SLOW = {
    "MULTI_CPU": {"ppo": WHOLE["ppo"]},
    "FSDP": {name: WHOLE[name] for name in ("ppo", "preference", "projection")},
    "ZERO2": {name: WHOLE[name] for name in ("ppo", "preference", "pretraining")},
    "ZERO3": {"ppo": WHOLE["ppo"], "preference": WHOLE["preference"], "pretraining": "causal,ul2"},
}


@dataclass
class Launched:
    """What a launch left and printed: `folder`/script/mode and {mode: result}."""

    folder: Path
    models: Path
    found: dict


@pytest.fixture(scope="session")
def launched(tiny_llama, shared_folder):
    """launched(engine, slow=False): a `Launched` of two processes, of one where the engine is "NO"."""

    def get(engine, slow=False):
        root = shared_folder / "launched"
        root.mkdir(exist_ok=True)
        with FileLock(root / ".lock"):
            if not (root / "models").exists():
                save_models(tiny_llama, root / "models")
            folder = root / f"{engine}{'_slow' * slow}"
            if not (folder / "found.json").exists():
                printed = launch_jobs(CONFIGS[engine], jobs(engine, slow, root, folder), fsdp=engine == "FSDP")
                (folder / "found.json").write_text(json.dumps(results(printed)))
        return Launched(folder, root / "models", json.loads((folder / "found.json").read_text()))

    return get


def jobs(engine, slow, root, folder):
    # Under ZeRO-3 one process computes the log-probs of the reference before; else the two compute them.
    kept = (root / "NO" if engine == "ZERO3" else folder) / "preference" / "kept"
    base, wide, reward = (root / "models" / name for name in ("base", "wide", "reward"))
    models = {"ppo": ([base, reward], []), "preference": ([wide], [kept])}
    for name, modes in (SLOW if slow else QUICK)[engine].items():
        before, after = models.get(name, ([], []))
        batch = BATCH[name] // (1 if engine == "NO" else 2)
        yield f"{name}_invariance", [folder / name, batch, *before, modes, *after]
    if engine == "MULTI_CPU" and not slow:  # as the last one: a recipe ends with its group of processes
        yield "recipe", ["ppo.py", *recipe_options(base, reward, folder / "recipe")]


def recipe_options(base, reward, folder):
    """What changes recipes/ppo.py from the toy world to two quick steps on a few rows."""
    rows = {"prompts": "prompt", "texts": "text"}
    for name, column in rows.items():
        lines = [json.dumps({column: f"{i} hello Paris"}) for i in range(20)]
        (base.parent / f"{name}.jsonl").write_text("\n".join(lines))
    prompts, texts = (base.parent / f"{name}.jsonl" for name in rows)
    options = {
        "model_name_or_path": base, "reward_funcs": reward, "dataset_name": prompts, "ptx_dataset_name": texts,
        "output_dir": folder, "max_steps": 2, "ppo_epochs": 1, "per_device_train_batch_size": 2,
        "max_completion_length": 8, "ptx_batch_size": 2, "measure_updates": 1, "measure_rows": 8,
    }  # fmt: skip
    return [word for name, value in options.items() for word in (f"--{name}", value)]


def save_models(tiny_llama, folder):
    make_model, tokenizer = tiny_llama
    config = make_model().config
    config.num_labels, config.reward_center = 1, 0.25
    torch.manual_seed(1)
    # The wide head has so many weights that ZeRO-3 shards it.
    models = {"base": make_model(), "wide": make_model(hidden_size=288)}
    for name, model in (models | {"reward": LlamaForSequenceClassification(config)}).items():
        model.save_pretrained(folder / name), tokenizer.save_pretrained(folder / name)
