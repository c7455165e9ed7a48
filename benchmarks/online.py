"""GRPO and RLOO steps of this library against TRL's, and sampling N completions after one prefill against N prompts.

    export OMP_NUM_THREADS=1
    python benchmarks/online.py --model SMOLLM2 --output online.json

One process per side runs the real `trainer.train()`, and their optimizer steps take turns (see preference.py). A step
samples, scores and trains on --prompts prompts with --generations completions each. Full fine-tuning in fp32; both
sides have their defaults but for sizes and the learning rate; TRL's batches are not shuffled. The first step is a
warm-up. The reward is the share of different words, which costs nothing.
"""

import argparse
import json
import os
from pathlib import Path
from statistics import median

import torch
import transformers
import trl
from datasets import Dataset
from measuring import alternate, clocks, prepare, read_rows, show
from preference import SIDES, Gate, summarise
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback

import lifecycle_hf
from lifecycle_hf.completions.sampling import generate, stop_token_ids

METHODS = ("grpo", "rloo")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="smollm2", help="causal LM; docs/real_runs.md makes one")
    parser.add_argument("--data", default="../shared/data/gsm8k_train_1000.jsonl.gz", help="rows with a text")
    parser.add_argument("--column", default="question", help="column of the text")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--prompt_tokens", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--prompts", type=int, default=2, help="prompts of a step")
    parser.add_argument("--generations", type=int, default=8, help="completions N of each prompt")
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps, the first of them a warm-up")
    parser.add_argument("--sampling_rounds", type=int, default=3)
    parser.add_argument("--output", default="online.json")
    return parser.parse_args()


def different_words(prompts, completions, **columns) -> list[float]:
    return [len(set(text.split())) / max(1, len(text.split())) for text in completions]


def make_prompts(args, length: int, count: int) -> list[str]:
    """Texts of `length` tokens each, cut out of the data one after the other."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = "\n".join(row[args.column] for row in read_rows(args.data))
    ids = tokenizer(text)["input_ids"]
    return [tokenizer.decode(ids[i * length : (i + 1) * length]) for i in range(count)]


def make_trainer(side: str, method: str, args, prompts: list[str], gate: Gate, folder: str):
    ours = side == "ours"
    options = {"output_dir": folder, "per_device_train_batch_size": args.prompts * args.generations}
    options |= {"num_generations": args.generations, "max_completion_length": args.new_tokens, "max_steps": args.steps}
    options |= {"learning_rate": 1e-6, "lr_scheduler_type": "constant", "warmup_steps": 0, "optim": "adamw_torch"}
    options |= {"report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True}
    options |= {"bf16": False, "use_cpu": True, "seed": 1, "log_completions": False}
    options |= {"activation_checkpointing": False} if ours else {"gradient_checkpointing": False}
    options |= {} if ours else {"shuffle_dataset": False, "model_init_kwargs": {"dtype": "float32"}}
    library = lifecycle_hf if ours else trl
    trainer, config = (getattr(library, method.upper() + kind) for kind in ("Trainer", "Config"))
    given = {"args": config(**options), "train_dataset": Dataset.from_dict({"prompt": prompts}), "callbacks": [gate]}
    return trainer(args.model, reward_funcs=different_words, **given)


def work(side: str, method: str, args, prompts: list[str], connection, folder: str) -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    gate = Gate(connection, False)
    trainer = make_trainer(side, method, args, prompts, gate, folder)
    trainer.remove_callback(PrinterCallback)
    trainer.training_step = gate.keep("loss", trainer.training_step)
    trainer.accelerator.clip_grad_norm_ = gate.keep("grad_norm", trainer.accelerator.clip_grad_norm_)
    trainer.train()


def compare(method: str, length: int, args) -> dict:
    prompts = make_prompts(args, length, args.prompts * args.steps)
    ready, steps = alternate(work, dict.fromkeys(SIDES, (method, args, prompts)), args.steps)
    tokens = [args.prompts * args.generations * (length + args.new_tokens)] * args.steps
    summary = summarise(steps, ready, tokens, "cpu_s")
    return {"method": method, "prompt_tokens": length, "summary": summary, "steps": steps, "setup": ready}


def compare_sampling(length: int, args) -> dict:
    """CPU seconds of sampling N completions of each prompt: after one prefill, and with N copies of the prompt."""
    tokenizer, model = AutoTokenizer.from_pretrained(args.model), AutoModelForCausalLM.from_pretrained(args.model)
    rows = tokenizer(make_prompts(args, length, args.prompts))["input_ids"]
    copies = [row for row in rows for _ in range(args.generations)]
    options = {
        "max_new_tokens": args.new_tokens,
        "temperature": 1.0,
        "stop_token_ids": stop_token_ids(model, tokenizer),
    }
    options |= {"pad_token_id": 0, "generator_seed": 0}
    ways = {
        "once": lambda: generate(model, rows, **options, num_generations=args.generations),
        "repeated": lambda: generate(model, copies, **options),
    }
    seconds = {name: [] for name in ways}
    assert ways["once"]() == ways["repeated"](), "the same random numbers must give the same tokens"  # a warm-up, too
    for _ in range(args.sampling_rounds):
        for name, way in ways.items():
            start = clocks(False)[0]
            way()
            seconds[name].append(clocks(False)[0] - start)
    ratios = [once / repeated for once, repeated in zip(*seconds.values())]
    return {"prompt_tokens": length, "seconds": seconds, "ratio": [median(ratios), min(ratios), max(ratios)]}


def main() -> None:
    args = parse_args()
    prepare()
    environment = {module.__name__: module.__version__ for module in (torch, transformers, trl)}
    found = {"options": vars(args), "environment": environment, "sampling": [], "steps": []}
    for length in args.prompt_tokens:
        found["sampling"].append(compare_sampling(length, args))
        Path(args.output).write_text(json.dumps(found, indent=1))
    rows = [
        [part["prompt_tokens"], *(median(part["seconds"][name]) for name in ("once", "repeated")), *part["ratio"]]
        for part in found["sampling"]
    ]
    header = "prompt tokens | one prefill, CPU s | N prompts | ratio (min–max)"
    show(f"Sampling {args.generations} completions", header, "{} | {:.2f} | {:.2f} | {:.3f} ({:.3f}–{:.3f})", rows)
    for method in args.methods:
        for length in args.prompt_tokens:
            found["steps"].append(compare(method, length, args))
            Path(args.output).write_text(json.dumps(found, indent=1))
    names = ("time", "ratio_range", "peak_mib")
    rows = [[p["method"], p["prompt_tokens"], *(x for n in names for x in p["summary"][n])] for p in found["steps"]]
    header = "method | prompt tokens | ours, CPU s | TRL | ratio (min–max) | ours peak MiB | TRL | ratio"
    pattern = "{} | {} | {:.1f} | {:.1f} | {:.3f} ({:.3f}–{:.3f}) | {:.0f} | {:.0f} | {:.3f}"
    show("An optimizer step (medians without the first; peaks of all)", header, pattern, rows)


if __name__ == "__main__":
    main()
