"""Three steps and an evaluation of preference trainers; prints what must not depend on the number of processes.

Arguments: output folder, per-device batch, path of the base model, then names in RUNS, by commas, and the
folder of the reference's log-probs.
"""

import json

from datasets import Dataset
from peft import LoraConfig

from lifecycle_hf import BottleneckConfig, DPOTrainer, KTOTrainer, OnlineDPOTrainer, ORPOTrainer
from lifecycle_hf.models.lm_head import CHUNK_LOGITS
from lifecycle_hf.trainers.base import sampler

WORDS = ["Paris", "a small red fox", "seven is a prime number", "hello"]
LORA = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
# trainer, adapters, gradient accumulation, whether the reference's log-probs are computed once
RUNS = {
    "dpo": (DPOTrainer, None, 2, False),
    "dpo_cached": (DPOTrainer, None, 1, True),
    "dpo_lora": (DPOTrainer, LORA, 1, False),
    "dpo_bottleneck": (DPOTrainer, BottleneckConfig(init_bottleneck_weights=False), 1, False),
    "kto": (KTOTrainer, None, 2, False),
    "orpo": (ORPOTrainer, None, 1, False),
    "online": (OnlineDPOTrainer, None, 2, False),
}
NAMES = (
    "loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
    "logps/chosen", "logps/rejected", "logps/chosen_displacement", "entropy", "kl",
    "score", "ties",
)  # fmt: skip
sampled = sampler.generate


def recorded(policy, prompt_ids, *, num_generations, **options):
    """The completions of a prompt depend on the prompt alone; lengths are ragged."""
    seeds = [sum(ids) + 3 * k for ids in prompt_ids for k in range(num_generations)]
    return [[(7 * seed + i) % 200 + 50 for i in range(1 + seed % 5)] for seed in seeds]


def letters(prompts, completions):
    """A reward of few values, so that there are ties."""
    return [float(sum(map(ord, text)) % 3) for text in completions]


def rows(number, trainer):
    """Ragged rows; `number` need not divide by the batch."""
    texts = [" ".join([WORDS[i % 4]] * (i % 5 + 1)) for i in range(number)]
    prompts = [f"word {i}:" + " please" * (i % 3) for i in range(number)]
    if trainer is OnlineDPOTrainer:
        return [{"prompt": prompt} for prompt in prompts]
    if trainer is KTOTrainer:
        return [{"prompt": p, "completion": t, "label": i % 2 == 0} for i, (p, t) in enumerate(zip(prompts, texts))]
    return [{"prompt": p, "chosen": t, "rejected": f"no {i}"} for i, (p, t) in enumerate(zip(prompts, texts))]


def run(output, batch, model, kept, name):
    trainer_class, peft, accumulation, cached = RUNS[name]
    keep = {"precompute_ref_log_probs": True, "ref_log_probs_path": kept} if cached else {}
    online = trainer_class is OnlineDPOTrainer
    keep |= {"log_completions": False, "max_completion_length": 6} if online else {}
    given = {"reward_funcs": letters} if online else {}
    sampler.generate = recorded
    args = trainer_class.config_class(
        output, per_device_train_batch_size=int(batch), per_device_eval_batch_size=int(batch), max_steps=3,
        gradient_accumulation_steps=accumulation, learning_rate=1e-2, lr_scheduler_type="constant", logging_steps=1,
        report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True,
        activation_checkpointing=peft is not None, **keep,
    )  # fmt: skip
    train, held_out = (Dataset.from_list(rows(number, trainer_class)) for number in (24, 5))
    trainer = trainer_class(model, args=args, train_dataset=train, eval_dataset=held_out, peft_config=peft, **given)
    trainer.train()
    held_out = trainer.evaluate()
    sampler.generate = sampled
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        result = {
            "world_size": trainer.accelerator.num_processes,
            "engine": trainer.accelerator.distributed_type.value,
            "steps": [{k: entry[k] for k in NAMES if k in entry} for entry in trainer.state.log_history[:3]],
            "held_out": {k: held_out[f"eval_{k}"] for k in NAMES if f"eval_{k}" in held_out},
        }
        print(f"RESULT {name} " + json.dumps(result))
    return trainer


def main(output, batch, model, names, kept):
    usual, CHUNK_LOGITS["cpu"] = CHUNK_LOGITS["cpu"], 384 * 3  # so that the ranks have different numbers of chunks
    for name in names.split(","):
        trainer = run(f"{output}/{name}", batch, model, kept, name)
    CHUNK_LOGITS["cpu"] = usual
    return trainer
