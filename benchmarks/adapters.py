"""What full fine-tuning, LoRA, QLoRA, bottleneck adapters and prefix tuning cost and gain on one task.

    python benchmarks/adapters.py --model PATH                       # SmolLM2-135M, three seeds, with and without EWC
    python benchmarks/adapters.py --methods lora bottleneck --seeds 0
    python benchmarks/adapters.py --smoke                            # two steps of the toy world's new model: a minute

Each run is a process of its own, so that its peak of memory is its own, and is not made again if its result stands.
The task is prompts with short answers (AG News of T0); the score is the share of held-out answers that greedy decoding
gives word for word. The perplexity is that of a text that has nothing to do with the task, EWC protects it.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from measuring import memory, prepare, read_rows, show
from peft import LoraConfig, PeftModel, PrefixTuningConfig
from transformers import BitsAndBytesConfig

from lifecycle_hf import BottleneckConfig, SFTConfig, SFTTrainer, merge_adapter, toyworld

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
METHODS = {
    "full": (lambda: None, 2e-5),
    "lora": (lambda: LoraConfig(**LORA), 2e-4),
    "qlora": (lambda: LoraConfig(**LORA), 2e-4),
    "bottleneck": (lambda: BottleneckConfig(task_type="CAUSAL_LM"), 1e-3),
    "prefix": (lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=16), 1e-2),
}
"""{method: (its adapter, its learning rate)}."""
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
HEADER = (
    "method | trained % | peak MiB | CPU s / step | forward s | decode s | merged: forward, decode | score before | "
    "score (seeds) | perplexity before | after | with EWC: score | perplexity"
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--task", default=str(DATA / "t0_tasks" / "ag_news_classify_question_first.jsonl"))
    parser.add_argument("--text", default=str(DATA / "tinyshakespeare.txt"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--held_out", type=int, default=80, help="rows that are scored")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of a timed decoding")
    parser.add_argument("--ewc", type=float, default=1e3, help="weight of EWC in the runs with it")
    parser.add_argument("--output", default="output/adapters", help="folder of the results")
    parser.add_argument("--smoke", action="store_true", help="two steps of a small new model on made-up rows")
    parser.add_argument("--only", nargs=3, metavar=("METHOD", "SEED", "EWC"), help=argparse.SUPPRESS)
    return parser.parse_args()


def load_data(args) -> tuple[list[dict], list[dict], list[str], list[str]]:
    """Return training rows and held-out rows of the task, texts to protect, and held-out texts."""
    if args.smoke:
        rows = [{"prompt": f"is {i} even?", "completion": " no" if i % 2 else " yes"} for i in range(40)]
        texts = [f"{i} and {i + 1} are {2 * i + 1}." for i in range(16)]
    else:
        rows = [{k: v.replace("<|endoftext|>", "") for k, v in row.items()} for row in read_rows(args.task)]
        rows = [row for row in rows if row["completion"].strip()]
        random.Random(0).shuffle(rows)  # the file is sorted by classes
        whole = Path(args.text).read_text()
        texts = [whole[start : start + 1000] for start in range(0, 128_000, 1000)]
    half = len(texts) // 2
    return rows[args.held_out :], rows[: args.held_out], texts[:half], texts[half:]


def build(args, method: str, seed: int, ewc: bool, folder: Path, data) -> SFTTrainer:
    adapter, rate = METHODS[method]
    options = SFTConfig(
        str(folder / "model"), seed=seed, max_steps=args.steps, learning_rate=rate, lr_scheduler_type="cosine",
        per_device_train_batch_size=args.batch, per_device_eval_batch_size=args.batch, max_length=384,
        report_to="none", save_strategy="no", logging_steps=10, activation_checkpointing=False, disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(), ewc_coef=args.ewc if ewc else 0.0,
        **({"ewc_rows": min(32, len(data[2]))} if ewc else {}),
    )  # fmt: skip
    model = str(toyworld.stage_checkpoint("init")) if args.smoke else args.model
    return SFTTrainer(
        model, options, Dataset.from_list(data[0]), peft_config=adapter(),
        quantization_config=BitsAndBytesConfig(**NF4) if method == "qlora" else None,
        ptx_dataset=Dataset.from_dict({"text": data[2]}) if ewc else None,
    )  # fmt: skip


@torch.no_grad()
def decode(model, tokenizer, prompts: list[str], length: int, stop: bool = True) -> list[str]:
    """Return greedy answers, each of exactly `length` tokens if `stop` is False."""
    tokenizer.padding_side = "left"
    batch = tokenizer(prompts, return_tensors="pt", padding=True).to(model.device)
    batch.pop("token_type_ids", None)
    ids = model.generate(
        **batch, max_new_tokens=length, min_new_tokens=None if stop else length, do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def score(model, tokenizer, rows: list[dict], batch: int) -> float:
    model.eval()
    right = 0
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        answers = decode(model, tokenizer, [row["prompt"] for row in part], 12)
        right += sum(a.strip() == row["completion"].strip() for a, row in zip(answers, part, strict=True))
    return right / len(rows)


def latency(model, tokenizer, rows: list[dict], tokens: int) -> tuple[float, float]:
    """Return the median seconds of a forward pass over one prompt, and of decoding `tokens` tokens behind it."""
    model.eval()
    ids = tokenizer(rows[0]["prompt"], return_tensors="pt")["input_ids"].to(model.device)

    @torch.no_grad()
    def forward():
        model(input_ids=ids)

    found = []
    for work in (forward, lambda: decode(model, tokenizer, [rows[0]["prompt"]], tokens, stop=False)):
        work()
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
        found.append(statistics.median(seconds))
    return tuple(found)


def run(args, method: str, seed: int, ewc: bool, folder: Path) -> dict:
    """Train one model and return what it cost and gained."""
    data = load_data(args)
    _, held_out, _, texts = data
    trainer = build(args, method, seed, ewc, folder, data)
    model, tokenizer = trainer.model, trainer.processing_class
    texts = Dataset.from_dict({"text": texts})

    def measure():
        perplexity = trainer.evaluate(texts, metric_key_prefix="text")["text_perplexity"]
        return {"perplexity": perplexity, "score": score(model, tokenizer, held_out, args.batch)}

    own = sum(p.numel() for p in model.parameters() if p.requires_grad)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    found = {"trained": own / base.num_parameters(), "before": measure()}
    start = time.process_time()
    trainer.train()
    found["step"] = (time.process_time() - start) / args.steps
    found |= {"peak": memory(torch.cuda.is_available())[1], "after": measure()}
    found["latency"] = latency(model, tokenizer, held_out, args.tokens)
    if method in ("lora", "qlora"):
        found["merged"] = latency(merge_adapter(model, folder / "merged").eval(), tokenizer, held_out, args.tokens)
    return found


def table_row(method: str, found: dict[bool, list[dict]]) -> list[str]:
    """Return the cells of a method, means over its seeds; a score has that of each seed beside it."""

    def mean(ewc, *path):
        values = []
        for value in found[ewc]:
            for key in path:
                value = value[key]
            values.append(value)
        return statistics.mean(values), values

    def scored(ewc):
        average, each = mean(ewc, "after", "score")
        return f"{average:.3f} ({', '.join(f'{value:.3f}' for value in each)})"

    first = found[False][0]
    merged = "{:.3f}, {:.2f}".format(*first["merged"]) if "merged" in first else "not possible"
    cells = [method, f"{100 * first['trained']:.2f}", f"{mean(False, 'peak')[0]:.0f}", f"{mean(False, 'step')[0]:.2f}"]
    cells += [f"{first['latency'][0]:.3f}", f"{first['latency'][1]:.2f}", merged if method != "full" else ""]
    cells += [f"{first['before']['score']:.3f}", scored(False), f"{first['before']['perplexity']:.2f}"]
    cells += [f"{mean(False, 'after', 'perplexity')[0]:.2f}"]
    if not found[True]:
        return [*cells, "not possible", ""]
    return [*cells, scored(True), f"{mean(True, 'after', 'perplexity')[0]:.2f}"]


def main() -> None:
    args = parse_args()
    if args.smoke:
        args.steps, args.seeds, args.held_out, args.batch, args.tokens = 2, args.seeds[:1], 8, 4, 4
    output = Path(args.output + ("_smoke" if args.smoke else ""))
    if args.only:
        method, seed, ewc = args.only[0], int(args.only[1]), args.only[2] == "True"
        folder = output / f"{method}_{seed}{'_ewc' if ewc else ''}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "found.json").write_text(json.dumps(run(args, method, seed, ewc, folder)))
        return
    rows = []
    for method in args.methods:
        found = {False: [], True: []}
        for ewc in (False, True) if method != "prefix" else (False,):  # EWC's Fisher is that of scored rows
            for seed in args.seeds:
                file = output / f"{method}_{seed}{'_ewc' if ewc else ''}" / "found.json"
                if not file.exists():
                    subprocess.run([sys.executable, *sys.argv, "--only", method, str(seed), str(ewc)], check=True)
                found[ewc].append(json.loads(file.read_text()))
        rows.append(table_row(method, found))
    show("Adapters", HEADER, " | ".join(["{}"] * len(rows[0])), rows)


if __name__ == "__main__":
    prepare()
    main()
