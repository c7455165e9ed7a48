"""Three steps of pretraining; prints what ranks must not change.

Arguments: output folder, batch, objectives by commas; "ewc" is the causal one with EWC on as many texts as the batch,
"doremi" a proxy on three domains beside an untrained reference.
"""

import json

import torch
from datasets import Dataset

from lifecycle_hf import (
    DoReMiConfig,
    DoReMiTrainer,
    LifecycleConfig,
    LifecycleForCausalLM,
    PretrainingConfig,
    PretrainingTrainer,
)
from lifecycle_hf.data.corpora import python_documentation, train_tokenizer

KEPT = ("loss", "perp", "weight/", "excess/")
FACTS = Dataset.from_dict({"text": [f"fact {i}: " + "so and " * i for i in range(8)]})


def run(output, batch, name):
    objective = "causal" if name in ("ewc", "doremi") else name
    ewc = {"ewc_coef": 1.0, "ewc_rows": int(batch)} if name == "ewc" else {}
    data = python_documentation().select(range(3))
    tokenizer = train_tokenizer(data["text"], 300)
    args = (DoReMiConfig if name == "doremi" else PretrainingConfig)(
        output, objective=objective, per_device_train_batch_size=int(batch), max_steps=3, logging_steps=1,
        report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True, max_length=128,
        learning_rate=1e-2, warmup_steps=0, **ewc,
    )  # fmt: skip
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    attention = "causal" if objective == "causal" else "prefix"
    model = LifecycleForCausalLM(LifecycleConfig(vocab_size=300, attention=attention, **sizes))
    texts = FACTS if ewc else None
    if name == "doremi":
        domains = {f"topic {i}": [text] for i, text in enumerate(data["text"])}
        reference = LifecycleForCausalLM(LifecycleConfig(vocab_size=300, attention=attention, **sizes))
        reference.lm_head.weight.data.mul_(0.5)
        trainer = DoReMiTrainer(model, reference, args, domains, tokenizer)
    else:
        trainer = PretrainingTrainer(model, args, data, processing_class=tokenizer, ptx_dataset=texts)
    trainer.train()
    if trainer.is_world_process_zero():
        lines = [entry for entry in trainer.state.log_history if "loss" in entry]
        kept = [{k: v for k, v in e.items() if k == "grad_norm" or k.startswith(KEPT)} for e in lines]
        accelerator = trainer.accelerator
        launched = {"world_size": accelerator.num_processes, "engine": accelerator.distributed_type.value}
        fisher = trainer._auxiliary["ewc"][0].fisher if ewc else {}
        sums = {key: tensor.double().sum().item() for key, tensor in fisher.items()}
        print(f"RESULT {name} " + json.dumps({"lines": kept, "fisher": sums} | launched))
    return trainer


def main(output, batch, names):
    for name in names.split(","):
        trainer = run(f"{output}/{name}", batch, name)
    return trainer
