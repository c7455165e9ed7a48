"""One optimizer step of PPO on recorded completions, then a real rollout; prints what ranks must not change.

Arguments: output folder, per-device batch, paths of base and reward model, then the modes, by commas: "full", "lora",
"head" (LoRA and a value head), "grpo", "resume" (a whole run of LoRA with a value adapter, and one that was resumed).
"""

import json

from datasets import Dataset
from peft import LoraConfig
from torch.distributed.tensor import DTensor

from lifecycle_hf.trainers.base import sampler
from lifecycle_hf.trainers.policy.config import PPOConfig
from lifecycle_hf.trainers.policy.groups import GRPOConfig, GRPOTrainer
from lifecycle_hf.trainers.policy.ppo import PPOTrainer

PROMPTS = ["Tell me", "The capital", "Please", "Two and", "I am", "Of course", "Here is", "hello"]
TEXTS = ["The capital of France is Paris.", "Two and three make five.", "hello there", "a small red fox"] * 2
NAMES = ("loss", "grad_norm", "kl", "reward", "entropy", "loss/policy", "loss/value", "loss/ptx")
NAMES += ("completions/distinct", "completions/distinct_first_half", "completions/most_common")
NAMES += ("reward/length_correlation",)
sampled = sampler.generate


def recorded(policy, prompt_ids, *, num_generations, **options):
    """The completions of a prompt depend on the prompt alone; lengths are ragged."""
    seeds = [sum(ids) + 3 * k for ids in prompt_ids for k in range(num_generations)]
    return [[(7 * seed + i) % 200 + 50 for i in range(1 + seed % 5)] for seed in seeds]


def local(parameter):
    """The share of a parameter that this process holds; ZeRO-3 keeps it beside the parameter."""
    parameter = getattr(parameter, "ds_tensor", parameter)
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def launched_as(trainer):
    accelerator = trainer.accelerator
    return {"world_size": accelerator.num_processes, "engine": accelerator.distributed_type.value}


def resume(output, batch, model, reward, mode):
    def trainer():
        args = PPOConfig(
            output, per_device_train_batch_size=int(batch), max_steps=6, ppo_epochs=4, max_completion_length=6,
            logging_steps=2, report_to="none", use_cpu=True, save_steps=3, log_completions=False, disable_tqdm=True,
            activation_checkpointing=False, learning_rate=1e-2, kl_control="adaptive", value="adapter",
        )  # fmt: skip
        peft = LoraConfig(r=4, target_modules="all-linear")
        return PPOTrainer(model, reward, args, Dataset.from_dict({"prompt": PROMPTS}), peft_config=peft)

    whole, resumed = trainer(), trainer()
    whole.train()
    resumed.train(resume_from_checkpoint=f"{output}/checkpoint-3")
    logs = [
        {k: v for k, v in entry.items() if "per_second" not in k and k not in ("train_runtime", "train_loss")}
        for run in (whole, resumed)
        for entry in run.state.log_history
    ]
    a, b = (
        {n: local(p) for n, p in run.model.named_parameters() if p.requires_grad and local(p).numel()}
        for run in (whole, resumed)
    )
    far = max((a[name] - b[name]).abs().max().item() for name in a)
    moved = max(a[name].abs().max().item() for name in a if "lora_B" in name)
    if whole.is_world_process_zero():
        half = len(logs) // 2
        found = {"lines": [logs[:half], logs[half:]], "far": far, "moved": moved}
        print("RESULT resume " + json.dumps(found | launched_as(whole)))
    return whole


def run(output, batch, model, reward, mode):
    config, kind = (GRPOConfig, GRPOTrainer) if mode == "grpo" else (PPOConfig, PPOTrainer)
    options = {"grpo": {"num_generations": 2, "kl_coef": 0.1}, "head": {"value": "head"}}.get(mode, {})
    args = config(
        output, per_device_train_batch_size=int(batch), max_steps=1, learning_rate=1e-3, max_completion_length=6,
        logging_steps=1, report_to="none", use_cpu=True, save_strategy="no", log_completions=False, ptx_coef=0.5,
        entropy_coef=0.01, lr_scheduler_type="constant", activation_checkpointing=mode == "lora", disable_tqdm=True,
        **options,
    )  # fmt: skip
    peft = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False) if mode in ("lora", "head") else None
    trainer = kind(
        model, reward, args, Dataset.from_dict({"prompt": PROMPTS}), peft_config=peft,
        ptx_dataset=Dataset.from_dict({"text": TEXTS}),
    )  # fmt: skip
    sampler.generate = recorded
    trainer.train()
    assert trainer.is_fsdp_enabled == any(isinstance(p, DTensor) for p in trainer.model.parameters())
    sampler.generate = sampled
    rows = [trainer.train_dataset[i] for i in range(args.local_prompts)]
    lengths = [b["completion_lengths"].tolist() for b in trainer.rollouts.make(rows, trainer.metrics["eval"])]
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        entry = trainer.state.log_history[0]
        found = {name: entry[name] for name in NAMES if name in entry} | {"sampled": lengths}
        print(f"RESULT {mode} " + json.dumps(found | launched_as(trainer)))
    return trainer


def main(output, batch, model, reward, modes):
    for mode in modes.split(","):
        trainer = (resume if mode == "resume" else run)(f"{output}/{mode}", batch, model, reward, mode)
    return trainer
