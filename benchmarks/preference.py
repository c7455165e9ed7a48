"""DPO, KTO and ORPO of this library against TRL's: time, memory, loss and gradient norm of every optimizer step.

    export OMP_NUM_THREADS=1
    python benchmarks/preference.py --compare all --output cpu.json                     # CPU seconds, full fine-tuning
    python benchmarks/preference.py --compare all --lora --prompts long --output lora.json
    python benchmarks/preference.py --compare dpo --device cuda --bf16 --output gpu.json  # wall seconds

One process per side runs the real `trainer.train()`. A callback holds it before each optimizer step until the parent
says go, so the steps of the two sides alternate and never run at the same time; a step is measured from go to
on_step_end and so holds loading its batch, KTO's reference point and the logging of the step before. The first step is
a warm-up: in the losses and the peak memory, not in the times. Both sides get the same rows in the same order.

The default model is made as docs/real_runs.md tells; the data are pairs of transcripts as in Anthropic's hh-rlhf. TRL
is taken as it comes but for two things: its batches are not shuffled (rows are, once), and its ORPOTrainer gets the
tokens of the others, since its own tokenisation puts a second EOS behind a chat template's last line break.
"""

import argparse
import json
import os
import random
from pathlib import Path
from statistics import median

import peft
import torch
import transformers
import trl
from datasets import Dataset
from measuring import alternate, clocks, memory, prepare, read_rows, show
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

import lifecycle_hf
from lifecycle_hf.data.schemas import to_preference
from lifecycle_hf.data.tokenize import tokenize_pairs, tokenize_unpaired

SIDES = ("ours", "trl")
COMPARISONS = ("dpo", "dpo_cached", "kto", "orpo")
PROMPTS = "hh: as they come; short: last user turn, cut to 16 words, longest answers; long: longest prompts, none cut"
ORPO_NOTE = "TRL's NLL is a mean over the batch's tokens, ours a mean per example: losses differ unless --batch is 1."


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add, flag = parser.add_argument, {"action": "store_true"}
    add("--model", default="smollm2", help="causal LM with a chat template; docs/real_runs.md makes one")
    add("--data", default="../shared/data/hh_harmless_1500.jsonl.gz", help="pairs of transcripts, .jsonl or .jsonl.gz")
    add("--compare", default="all", choices=[*COMPARISONS, "all"])
    add("--lora", **flag, help="LoRA (r=16, alpha=32, all linear layers) instead of full fine-tuning")
    add("--pairs", type=int, default=64, help="a multiple of --batch")
    add("--batch", type=int, default=8, help="pairs (KTO: answers) per optimizer step")
    add("--max_length", type=int, default=512)
    add("--steps", type=int, default=10, help="optimizer steps, the first of them a warm-up; at least 2")
    add("--gradient_checkpointing", **flag)
    add("--bf16", **flag, help="bf16 autocast; the weights are float32 with and without")
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--prompts", default="hh", choices=["hh", "short", "long"], help=PROMPTS)
    add("--learning_rate", type=float, default=1e-6)
    add("--seed", type=int, default=42)
    add("--output", default="preference_benchmark.json", help="JSON with every figure of every step")
    args = parser.parse_args()
    if args.pairs % args.batch or args.steps < 2:
        parser.error("--pairs must be a multiple of --batch and --steps at least 2")
    if not Path(args.data).is_file():
        parser.error(
            f"--data {args.data} is not there: give a .jsonl of `chosen` and `rejected` transcripts, as hh-rlhf's"
        )
    return args


def choose_pairs(args, tokenizer) -> tuple[list[dict], list[dict]]:
    """Rows of prompt, chosen and rejected (messages) that both sides can use, in the order of training, and tokens."""
    raw = Dataset.from_list(read_rows(args.data))
    rows = [trl.maybe_extract_prompt(row) for row in to_preference(raw, "--data") if row["chosen"] and row["rejected"]]
    rows = [row for row in rows if row["prompt"] and row["prompt"][-1]["role"] == "user"]
    for i, row in enumerate(rows):
        if args.prompts == "short":
            row["prompt"] = [{"role": "user", "content": " ".join(row["prompt"][-1]["content"].split()[:16])}]
        # tokenize_pairs drops rows and keeps this column: it tells which row a result belongs to.
        row["ref_chosen_logps"] = float(i)
    tokens = list(tokenize_pairs(Dataset.from_list(rows), tokenizer, max_length=args.max_length, where="--data"))
    if args.prompts == "short":
        tokens.sort(key=lambda row: -sum(map(len, completions(row))))
    if args.prompts == "long":
        tokens = [r for r in tokens if len(r["prompt_ids"]) + max(map(len, completions(r))) < args.max_length]
        tokens.sort(key=lambda row: -len(row["prompt_ids"]))
    if len(tokens) < args.pairs:
        raise SystemExit(f"--data has {len(tokens)} usable pairs at max_length={args.max_length}, not {args.pairs}.")
    tokens = tokens[: args.pairs]
    random.Random(args.seed).shuffle(tokens)
    rows = [rows[int(row.pop("ref_chosen_logps"))] for row in tokens]
    return [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows], tokens


def completions(row: dict) -> list[list[int]]:
    return [row[name] for name in ("completion_ids", "chosen_ids", "rejected_ids") if name in row]


def with_mismatched(tokens: list[dict], args) -> list[dict]:
    """Tokenised answers with the KL completions of TRL (that of the row before in the batch), cut to max_length."""
    for i, row in enumerate(tokens):
        room, other = args.max_length - len(row["prompt_ids"]), tokens[i - 1 if i % args.batch else i + args.batch - 1]
        row["KL_completion_ids"] = other["completion_ids"][:room]
    return [r | {"completion_ids": r["completion_ids"][: args.max_length - len(r["prompt_ids"])]} for r in tokens]


def make_data(compare: str, args) -> tuple[dict[str, list[dict]], list[int]]:
    """The rows of each side, and the tokens of each optimizer step without padding."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    pairs, tokens = choose_pairs(args, tokenizer)
    data = {"ours": pairs, "trl": pairs}
    if compare == "kto":
        unpaired = trl.unpair_preference_dataset(Dataset.from_list(pairs)).shuffle(seed=args.seed)
        whole = tokenize_unpaired(unpaired, tokenizer, max_length=None, where="--data")
        tokens = with_mismatched(list(whole), args)
        data = {"ours": tokens, "trl": list(unpaired)}
    if compare == "orpo":
        data["trl"] = [row | ids for row, ids in zip(pairs, tokens)]
    sizes = [sum(len(row["prompt_ids"]) + len(ids) for ids in completions(row)) for row in tokens]
    batches = [sum(sizes[start : start + args.batch]) for start in range(0, len(sizes), args.batch)]
    return data, [batches[step % len(batches)] for step in range(args.steps)]


class Gate(TrainerCallback):
    """Waits for the parent's go before each step, and sends what the step took."""

    def __init__(self, connection, cuda: bool):
        self.connection, self.cuda, self.seen = connection, cuda, {}

    def keep(self, name: str, function):
        def call(*args, **kwargs):
            self.seen[name] = function(*args, **kwargs)
            return self.seen[name]

        return call

    def go(self) -> None:
        self.connection.recv()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")
        self.start = clocks(self.cuda)

    def on_train_begin(self, args, state, control, **kwargs):
        self.connection.send(dict(zip(("before_mib", "setup_peak_mib"), memory(self.cuda))))
        self.go()

    def on_step_end(self, args, state, control, **kwargs):
        cpu, wall = (end - start for start, end in zip(self.start, clocks(self.cuda)))
        seen = {name: float(value) for name, value in self.seen.items()}
        self.connection.send({"cpu_s": cpu, "wall_s": wall, "peak_mib": memory(self.cuda)[1]} | seen)
        self.go()


def make_trainer(side: str, compare: str, args, rows: list[dict], gate: Gate, folder: str):
    method, ours = compare.removesuffix("_cached"), side == "ours"
    options = {"output_dir": folder, "per_device_train_batch_size": args.batch, "max_steps": args.steps}
    options |= {"learning_rate": args.learning_rate, "lr_scheduler_type": "constant", "warmup_steps": 0}
    options |= {"seed": args.seed, "optim": "adamw_torch", "beta": 0.1, "max_length": args.max_length}
    options |= {"bf16": args.bf16, "use_cpu": args.device == "cpu", "train_sampling_strategy": "sequential"}
    options |= {"report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True}
    # transformers renamed it; TRL's configurations still set the old name, to True.
    options["activation_checkpointing" if ours else "gradient_checkpointing"] = args.gradient_checkpointing
    options["model_init_kwargs"] = {"dtype": "float32"} | ({} if ours else {"device_map": None})
    options |= {"precompute_ref_log_probs": True} if compare == "dpo_cached" else {}
    options |= {"nll_on_prompt": True} if ours and method == "orpo" else {}
    lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer, config = SameTokens, ORPOConfig
    if ours or method != "orpo":
        trainer, config = (getattr(lifecycle_hf if ours else trl, method.upper() + x) for x in ("Trainer", "Config"))
    given = {"train_dataset": Dataset.from_list(rows), "peft_config": lora if args.lora else None}
    return trainer(args.model, args=config(**options), callbacks=[gate], **given)


class SameTokens(ORPOTrainer):
    """TRL's, with the tokens that the rows bring."""

    def tokenize_row(self, feature, model=None):
        out, prompt = {}, feature["prompt_ids"]
        for name in ("prompt", "chosen", "rejected"):
            answer = feature[f"{name}_ids"] if name != "prompt" else []
            out |= {f"{name}_input_ids": prompt + answer, f"{name}_labels": [-100] * len(prompt) + answer}
            out[f"{name}_attention_mask"] = [1] * len(prompt + answer)
        return out


def work(side: str, compare: str, args, rows: list[dict], connection, folder: str) -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    gate = Gate(connection, args.device == "cuda")
    trainer = make_trainer(side, compare, args, rows, gate, folder)
    trainer.remove_callback(PrinterCallback)
    trainer.training_step = gate.keep("loss", trainer.training_step)  # as they are: logs may be rounded
    accelerator = trainer.accelerator
    accelerator.clip_grad_norm_ = gate.keep("grad_norm", accelerator.clip_grad_norm_)  # that before clipping
    trainer.train()


def measure(compare: str, args) -> dict:
    data, tokens = make_data(compare, args)
    ready, steps = alternate(work, {side: (compare, args, data[side]) for side in SIDES}, args.steps)
    environment = {module.__name__: module.__version__ for module in (torch, transformers, trl, peft)}
    environment["device"] = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    summary = summarise(steps, ready, tokens, "wall_s" if args.device == "cuda" else "cpu_s")
    found = {"compare": compare, "options": vars(args), "environment": environment, "summary": summary}
    return found | {"setup": ready, "tokens": tokens, "steps": steps}


def difference(a: float, b: float) -> float:
    return abs(a - b) / abs(b) if b else abs(a)


def summarise(steps: dict[str, list[dict]], ready: dict[str, dict], tokens: list[int], clock: str) -> dict:
    """(ours, TRL, ours / TRL) of each measure; the ratio of times is the median of those of the steps."""
    times = [[step[clock] for step in steps[side][1:]] for side in SIDES]
    ratios = [ours / theirs for ours, theirs in zip(*times)]
    peaks = [max(step["peak_mib"] for step in steps[side]) for side in SIDES]
    above = [peak - ready[side]["before_mib"] for peak, side in zip(peaks, SIDES)]
    speeds = [median(count / seconds for count, seconds in zip(tokens[1:], side)) for side in times]
    out = {"clock": clock, "time": [*map(median, times), median(ratios)], "ratio_range": [min(ratios), max(ratios)]}
    out |= {"tokens_per_s": speeds, "peak_mib": [*peaks, peaks[0] / peaks[1]]}
    out |= {"peak_above_start_mib": [*above, above[0] / above[1]]}
    both = list(zip(steps["ours"], steps["trl"]))
    out["differences"] = [max(difference(a[name], b[name]) for a, b in both) for name in ("loss", "grad_norm")]
    return out


def show_steps(result: dict, args) -> None:
    clock, rows = result["summary"]["clock"], []
    for i, (a, b) in enumerate(zip(*(result["steps"][side] for side in SIDES))):
        row = [i + 1, result["tokens"][i], a[clock], b[clock], a[clock] / b[clock], a["peak_mib"], b["peak_mib"]]
        rows.append(row + [x for n in ("loss", "grad_norm") for x in (a[n], b[n], difference(a[n], b[n]))])
    how = f"{'LoRA' if args.lora else 'full'}, {args.prompts} prompts, batch {args.batch}, {args.max_length} tokens"
    header = f"step (1: warm-up) | tokens | ours {clock} | TRL | ratio | ours peak MiB | TRL | "
    header += "ours loss | TRL | rel. diff. | ours grad norm | TRL | rel. diff."
    pattern = "{} | {} | {:.3f} | {:.3f} | {:.3f} | {:.0f} | {:.0f}" + " | {:.8g} | {:.8g} | {:.1e}" * 2
    show(f"{result['compare']} ({how})", header, pattern, rows)
    print(f"\n{ORPO_NOTE}" if result["compare"] == "orpo" else "", flush=True)


def show_summary(results: list[dict]) -> None:
    names = ("time", "ratio_range", "tokens_per_s", "peak_mib", "peak_above_start_mib", "differences")
    rows = [[r["compare"], *(value for name in names for value in r["summary"][name])] for r in results]
    header = f" | ours {results[0]['summary']['clock']} | TRL | ratio (min–max) | ours tokens/s | TRL | "
    header += "ours peak MiB | TRL | ratio | ours peak above start MiB | TRL | ratio | loss diff. | grad norm diff."
    pattern = "{} | {:.3f} | {:.3f} | {:.3f} ({:.3f}–{:.3f}) | {:.0f} | {:.0f}" + " | {:.0f} | {:.0f} | {:.3f}" * 2
    show("Medians without the first step; peaks and differences of all", header, pattern + " | {:.1e}" * 2, rows)


def main() -> None:
    args, results = parse_args(), []
    prepare()
    for compare in COMPARISONS if args.compare == "all" else [args.compare]:
        results.append(measure(compare, args))
        show_steps(results[-1], args)
        Path(args.output).write_text(json.dumps(results, indent=1))
    show_summary(results)


if __name__ == "__main__":
    main()
