"""Says in how many processes and on which engine a Trainer made from a recipe's options runs."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from lifecycle_hf.cli import parse

(args,) = parse([TrainingArguments], default_config=None)
model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
trainer = Trainer(model, args)
total = torch.ones(1, device=args.device)
if args.world_size > 1:
    torch.distributed.all_reduce(total)
if trainer.is_world_process_zero():
    print(f"world_size {total.item():.0f} on {trainer.accelerator.distributed_type.value}")
