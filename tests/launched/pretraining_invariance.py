"""Three steps of pretraining; prints what ranks must not change. Arguments: output folder, batch, objectives."""

import json
import sys

import torch

from lifecycle_hf import LifecycleConfig, LifecycleForCausalLM, PretrainingConfig, PretrainingTrainer
from lifecycle_hf.data.corpora import python_documentation, train_tokenizer


def run(output, batch, objective):
    data = python_documentation().select(range(3))
    tokenizer = train_tokenizer(data["text"], 300)
    args = PretrainingConfig(
        output, objective=objective, per_device_train_batch_size=int(batch), max_steps=3, logging_steps=1,
        report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True, max_length=128,
        learning_rate=1e-2, warmup_steps=0,
    )  # fmt: skip
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    attention = "causal" if objective == "causal" else "prefix"
    model = LifecycleForCausalLM(LifecycleConfig(vocab_size=300, attention=attention, **sizes))
    trainer = PretrainingTrainer(model, args, data, processing_class=tokenizer)
    trainer.train()
    if trainer.is_world_process_zero():
        lines = [entry for entry in trainer.state.log_history if "loss" in entry]
        kept = [{k: v for k, v in e.items() if k == "grad_norm" or k.startswith(("loss", "perp"))} for e in lines]
        accelerator = trainer.accelerator
        launched = {"world_size": accelerator.num_processes, "engine": accelerator.distributed_type.value}
        print(f"RESULT {objective} " + json.dumps({"lines": kept} | launched))
    return trainer


if __name__ == "__main__":
    output, batch, objectives = sys.argv[1:]
    for objective in objectives.split(","):
        trainer = run(f"{output}/{objective}", batch, objective)
    trainer.end()
