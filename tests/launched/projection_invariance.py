"""Three projected steps of pretraining; prints what the number of processes must not change.

Arguments: output folder, batch per process, levels by commas.
"""

import json

import torch
from torch.distributed.tensor import DTensor

from lifecycle_hf import LifecycleConfig, LifecycleForCausalLM, PretrainingConfig, PretrainingTrainer
from lifecycle_hf.data.corpora import python_documentation, train_tokenizer
from lifecycle_hf.trainers.base.mitigations import ProjectionCallback


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().double()


def run(output, batch, level):
    data = python_documentation().select(range(3))
    tokenizer = train_tokenizer(data["text"], 300)
    args = PretrainingConfig(
        output, per_device_train_batch_size=int(batch), max_steps=3, logging_steps=1, report_to="none", use_cpu=True,
        save_strategy="no", disable_tqdm=True, max_length=128, learning_rate=1e-2, warmup_steps=0,
    )  # fmt: skip
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    trainer = PretrainingTrainer(
        LifecycleForCausalLM(LifecycleConfig(vocab_size=300, **sizes)), args, data, processing_class=tokenizer
    )
    rank, world = trainer.accelerator.process_index, trainer.accelerator.num_processes
    held = torch.randint(10, 300, (3, 8, 32), generator=torch.Generator().manual_seed(1))
    drawn = iter(range(6))

    def loss(model):
        """This process's rows of the batch that all draw; each refresh needs two."""
        ids = held[next(drawn) % 3, rank::world]
        return model(input_ids=ids, labels=ids).loss

    callback = ProjectionCallback(loss, k=2, level=level, when="always" if level == "update" else "conflict")
    callback.attach(trainer)
    trainer.train()
    projection = callback.projection
    sharded = any(isinstance(p, DTensor) for p in trainer.model.parameters())
    assert sharded == trainer.is_fsdp_enabled and ("projection" in trainer.stateful_per_rank) == sharded
    pieces = projection.state_dict()
    projection.load_state_dict(pieces)
    assert all(torch.equal(pieces[name], value) for name, value in projection.state_dict().items() if name != "step")
    sums = {name: whole(p).square().sum().item() for name, p in trainer.model.named_parameters()}
    if trainer.is_world_process_zero():
        lines = [entry for entry in trainer.state.log_history if "loss" in entry]
        kept = [{k: v for k, v in e.items() if k in ("loss", "grad_norm") or k.startswith("proj")} for e in lines]
        launched = {"world_size": world, "engine": trainer.accelerator.distributed_type.value}
        print(f"RESULT {level} " + json.dumps({"lines": kept, "sums": sums} | launched))
    return trainer


def main(output, batch, levels):
    for level in levels.split(","):
        trainer = run(f"{output}/{level}", batch, level)
    return trainer
