"""One optimizer step of PPO on recorded completions, then a real rollout; prints what ranks must not change.

Arguments: output folder, per-device batch, paths of base and reward model, then "full", "lora" or both, by commas.
"""

import json
import sys

from datasets import Dataset
from peft import LoraConfig

from lifecycle_hf.trainers import ppo_rollout
from lifecycle_hf.trainers.ppo import PPOTrainer
from lifecycle_hf.trainers.ppo_config import PPOConfig

PROMPTS = ["Tell me", "The capital", "Please", "Two and", "I am", "Of course", "Here is", "hello"]
TEXTS = ["The capital of France is Paris.", "Two and three make five.", "hello there", "a small red fox"] * 2
NAMES = ("loss", "grad_norm", "kl", "reward", "entropy", "loss/policy", "loss/value", "loss/ptx")
sampled = ppo_rollout.generate


def recorded(policy, prompt_ids, **options):
    """The completion of a prompt depends on the prompt alone; lengths are ragged."""
    return [[(7 * sum(ids) + i) % 200 + 50 for i in range(1 + sum(ids) % 5)] for ids in prompt_ids]


def run(output, batch, model, reward, mode):
    args = PPOConfig(
        output, per_device_train_batch_size=int(batch), max_steps=1, learning_rate=1e-3, max_completion_length=6,
        logging_steps=1, report_to="none", use_cpu=True, save_strategy="no", log_completions=False, ptx_coef=0.5,
        entropy_coef=0.01, lr_scheduler_type="constant", activation_checkpointing=mode == "lora", disable_tqdm=True,
    )  # fmt: skip
    peft = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False) if mode == "lora" else None
    trainer = PPOTrainer(
        model, reward, args, Dataset.from_dict({"prompt": PROMPTS}), peft_config=peft,
        ptx_dataset=Dataset.from_dict({"text": TEXTS}),
    )  # fmt: skip
    ppo_rollout.generate = recorded
    trainer.train()
    ppo_rollout.generate = sampled
    rows = [trainer.train_dataset[i] for i in range(args.local_rollout_size)]
    lengths = [b["completion_lengths"].tolist() for b in trainer.rollouts.make(rows, trainer.metrics["eval"])]
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        entry = trainer.state.log_history[0]
        extra = {
            "world_size": trainer.accelerator.num_processes,
            "engine": trainer.accelerator.distributed_type.value,
            "sampled": lengths,
        }
        print(f"RESULT {mode} " + json.dumps({name: entry[name] for name in NAMES} | extra))


if __name__ == "__main__":
    output, *arguments, modes = sys.argv[1:]
    for mode in modes.split(","):
        run(f"{output}/{mode}", *arguments, mode)
