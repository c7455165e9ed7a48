"""What full fine-tuning, LoRA, QLoRA, bottleneck adapters and prefix tuning cost and gain on one task.

    export OMP_NUM_THREADS=1
    python benchmarks/adapters.py --model PATH                       # SmolLM2-135M, three seeds, with and without EWC
    python benchmarks/adapters.py --methods lora bottleneck --seeds 0
    python benchmarks/adapters.py --tune                             # another seed, other rows, several learning rates
    python benchmarks/adapters.py --compose                          # two adapters of the toy world, each and both
    python benchmarks/adapters.py --smoke                            # two steps of the toy world's new model: a minute

Each run is a process of its own, so that its peak of memory is its own, and is not made again if its result stands.
The task is prompts with short answers (AG News of T0); the score is the share of held-out answers that greedy decoding
gives word for word. The perplexity is that of a text that has nothing to do with the task, EWC protects it. The
products of matrices are in bf16. The last columns are memory and time of a step of a new Llama of 0.3 B parameters.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import Dataset
from measuring import clocks, memory, prepare, read_rows, show
from peft import LoraConfig, PeftModel, PrefixTuningConfig, initialize_kv_prefix_from_text
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from lifecycle_hf import BottleneckConfig, SFTConfig, SFTTrainer, merge_adapter, toyworld

TUNING_SEED = 100
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
METHODS = {
    "full": (lambda: None, 1e-4),
    "lora": (lambda: LoraConfig(**LORA), 5e-4),
    "qlora": (lambda: LoraConfig(**LORA), 5e-4),
    "bottleneck": (lambda: BottleneckConfig(task_type="CAUSAL_LM"), 3e-4),
    "prefix": (lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=16), 1e-2),
}
"""{method: (its adapter, its learning rate)}, those of --tune with the best score below three times the perplexity."""
COMPOSED = {"lora": 3e-3, "bottleneck": 1e-2}
"""Learning rates of --compose."""
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
HEADER = (
    "method | trained % | peak MiB | CPU s / step | forward s | decode s | merged: forward, decode | score before | "
    "score (seeds) | perplexity before | after | with EWC: score | perplexity | 0.3 B: peak MiB | CPU s / step"
)


KINDS = ("before", "train", "memory", "large", "latency", "ewc", "tune")


class Job(NamedTuple):
    """One run of a kind of [`KINDS`]: "before" and "latency" take no step, "memory" and "large" (0.3 B) two."""

    method: str
    seed: int
    kind: str
    rate: float = 1.0  # times the learning rate of the method

    @property
    def ewc(self) -> bool:
        return self.kind == "ewc"

    @property
    def name(self) -> str:
        return f"{self.method}_{self.seed}_{self.kind}_{self.rate:.3g}"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--task", default=str(DATA / "t0_tasks" / "ag_news_classify_question_first.jsonl"))
    parser.add_argument("--text", default=str(DATA / "tinyshakespeare.txt"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ewc_seeds", type=int, nargs="*", default=[0, 1, 2], help="of the runs with EWC")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--characters", type=int, default=200, help="of a prompt; the rest is cut")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--held_out", type=int, default=80, help="rows that are scored")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of a timed decoding")
    parser.add_argument("--ewc", type=float, default=1e3, help="weight of EWC in the runs with it")
    parser.add_argument(
        "--tune", action="store_true", help="score rows of the training part at several learning rates"
    )
    parser.add_argument("--rates", type=float, nargs="+", default=[1 / 3, 1, 3], help="of --tune, times the method's")
    parser.add_argument("--output", default="output/adapters", help="folder of the results")
    parser.add_argument("--compose", action="store_true", help="switch between two adapters of a base, and stack them")
    parser.add_argument("--smoke", action="store_true", help="two steps of a small new model on made-up rows")
    parser.add_argument("--only", nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args()


def load_data(args) -> tuple[list[dict], list[dict], list[str], list[str]]:
    """Return training rows and held-out rows of the task, texts to protect, and held-out texts."""
    if args.smoke:
        rows = [{"prompt": f"is {i} even?", "completion": " no" if i % 2 else " yes"} for i in range(40)]
        texts = [f"{i} and {i + 1} are {2 * i + 1}." for i in range(16)]
    else:
        rows = [{k: v.replace("<|endoftext|>", "") for k, v in row.items()} for row in read_rows(args.task)]
        rows = [
            {"prompt": f"{row['prompt'].strip()[: args.characters]}\nAnswer:", "completion": f" {row['completion']}"}
            for row in rows
            if row["completion"].strip()
        ]
        random.Random(0).shuffle(rows)  # the file is sorted by classes
        whole = Path(args.text).read_text()
        texts = [whole[start : start + 500] for start in range(0, 64_000, 2000)]
    half = len(texts) // 2
    train, held_out = rows[args.held_out :], rows[: args.held_out]
    if args.tune:
        train, held_out = train[args.held_out // 2 :], train[: args.held_out // 2]
    return train, held_out, texts[:half], texts[half:]


def random_model(tokenizer: str, folder: Path) -> str:
    """Return the folder of a new Llama of 0.3 B parameters, which is written if it is not there."""
    if not folder.exists():
        words = AutoTokenizer.from_pretrained(tokenizer)
        config = LlamaConfig(
            vocab_size=len(words), hidden_size=1024, intermediate_size=2816, num_hidden_layers=22,
            num_attention_heads=16, num_key_value_heads=4, tie_word_embeddings=True, eos_token_id=words.eos_token_id,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder)
        words.save_pretrained(folder)
    return str(folder)


def build(args, model: str, job: Job, folder: Path, data) -> SFTTrainer:
    adapter, rate = METHODS[job.method]
    options = SFTConfig(
        str(folder / "model"), seed=job.seed, max_steps=args.steps, learning_rate=rate * job.rate,
        lr_scheduler_type="cosine", warmup_steps=args.steps // 10, per_device_train_batch_size=args.batch,
        per_device_eval_batch_size=args.batch, max_length=384, bf16=True, report_to="none", save_strategy="no",
        logging_steps=10, activation_checkpointing=False, disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
        ewc_coef=args.ewc if job.ewc else 0.0, **({"ewc_rows": len(data[2])} if job.ewc else {}),
    )  # fmt: skip
    trainer = SFTTrainer(
        model, options, Dataset.from_list(data[0]), peft_config=adapter(),
        quantization_config=BitsAndBytesConfig(**NF4) if job.method == "qlora" else None,
        ptx_dataset=Dataset.from_dict({"text": data[2]}) if job.ewc else None,
    )  # fmt: skip
    if job.method == "prefix":  # a random prefix destroys what the model knows; Li and Liang 2021, §7.4
        text = " ".join(row["prompt"] for row in data[0][:4])
        initialize_kv_prefix_from_text(trainer.model, trainer.processing_class, text=text, use_chat_template=False)
    return trainer


@torch.no_grad()
def decode(model, tokenizer, prompts: list[str], length: int, stop: bool = True) -> list[str]:
    """Return greedy answers in bf16, or if `stop` is False in fp32, each of exactly `length` tokens."""
    tokenizer.padding_side = "left"
    batch = tokenizer(prompts, return_tensors="pt", padding=True).to(model.device)
    batch.pop("token_type_ids", None)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=stop):
        ids = model.generate(
            **batch, max_new_tokens=length, min_new_tokens=None if stop else length, do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    return tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def score(model, tokenizer, rows: list[dict], batch: int, length: int = 8) -> float:
    model.eval()
    right = 0
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        answers = decode(model, tokenizer, [row["prompt"] for row in part], length)
        right += sum(a.strip() == row["completion"].strip() for a, row in zip(answers, part, strict=True))
    return right / len(rows)


def latency(model, tokenizer, rows: list[dict], tokens: int) -> tuple[float, float]:
    """Return the median seconds of a forward pass over one prompt, and of decoding `tokens` tokens behind it.

    All are in fp32, since autocast would cast the weights of a frozen base again for each token. On a CPU they are
    seconds of the CPU, on a GPU of the clock.
    """
    model.eval()
    ids = tokenizer(rows[0]["prompt"], return_tensors="pt")["input_ids"].to(model.device)

    @torch.no_grad()
    def forward():
        model(input_ids=ids)

    found, cuda = [], torch.cuda.is_available()
    for work in (forward, lambda: decode(model, tokenizer, [rows[0]["prompt"]], tokens, stop=False)):
        work()
        seconds = []
        for _ in range(5):
            start = clocks(cuda)[cuda]
            work()
            seconds.append(clocks(cuda)[cuda] - start)
        found.append(statistics.median(seconds))
    return tuple(found)


def run(args, job: Job, folder: Path) -> dict:
    """Train one model and return what it cost and gained."""
    data = load_data(args)
    _, held_out, _, texts = data
    path = str(toyworld.stage_checkpoint("init")) if args.smoke else args.model
    if job.kind == "large":
        path = random_model(path, folder.parent / "new_0.3b")
    if job.kind in ("memory", "large"):
        args.steps = 2
    trainer = build(args, path, job, folder, data)
    model, tokenizer = trainer.model, trainer.processing_class
    texts = Dataset.from_dict({"text": texts})

    def measure():
        perplexity = trainer.evaluate(texts, metric_key_prefix="text")["text_perplexity"]
        return {"perplexity": perplexity, "score": score(model, tokenizer, held_out, args.batch)}

    if job.kind == "before":
        return measure()
    if job.kind == "latency":
        found = {"latency": latency(model, tokenizer, held_out, args.tokens)}
        if job.method in ("lora", "qlora"):
            merged = merge_adapter(model, folder / "merged").eval()
            found["merged"] = latency(merged, tokenizer, held_out, args.tokens)
        return found
    own = sum(p.numel() for p in model.parameters() if p.requires_grad)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    found = {"trained": own / base.num_parameters()}
    start, cuda = time.process_time(), torch.cuda.is_available()
    reset_peak(cuda)
    trainer.train()
    found |= {"step": (time.process_time() - start) / args.steps, "peak": memory(cuda)[1]}
    return found if job.kind in ("memory", "large") else found | measure()


def reset_peak(cuda: bool) -> None:
    """Forget the peak of memory up to now, such as that of loading a model before it is quantised."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def table_row(method: str, found: dict[str, list[dict]]) -> list[str]:
    """Return the cells of a method, means over its seeds; a score has that of each seed beside it."""

    def mean(kind: str, key: str) -> float:
        return statistics.mean(one[key] for one in found[kind])

    def scored(kind: str) -> str:
        each = ", ".join(f"{one['score']:.3f}" for one in found[kind])
        return f"{mean(kind, 'score'):.3f} ({each})"

    def seconds(name: str) -> list[str]:
        return [f"{value:.{digits}f}" for value, digits in zip(found["latency"][0][name], (3, 2))]

    merged = ", ".join(seconds("merged")) if "merged" in found["latency"][0] else "not possible"
    cells = [method, f"{100 * mean('train', 'trained'):.2f}", f"{mean('memory', 'peak'):.0f}"]
    cells += [f"{mean('train', 'step'):.2f}", *seconds("latency"), merged if method != "full" else "nothing to merge"]
    cells += [f"{mean('before', 'score'):.3f}", scored("train"), f"{mean('before', 'perplexity'):.2f}"]
    cells += [f"{mean('train', 'perplexity'):.2f}"]
    cells += [scored("ewc"), f"{mean('ewc', 'perplexity'):.2f}"] if found["ewc"] else ["not possible"] * 2
    return [*cells, f"{mean('large', 'peak'):.0f}", f"{mean('large', 'step'):.2f}"]


def jobs_of(args) -> dict[str, dict[str, list[Job]]]:
    """Return the runs of each method by their kind."""
    found = {}
    for method in args.methods:
        if args.tune:
            found[method] = {"tune": [Job(method, TUNING_SEED, "tune", rate) for rate in args.rates]}
            continue
        weights = "qlora" if method == "qlora" else "full"
        found[method] = {
            "before": [Job(weights, 0, "before")],
            "latency": [Job(method, 0, "latency")],
            "memory": [Job(method, 0, "memory")],
            "large": [Job(method, 0, "large")],
            "train": [Job(method, seed, "train") for seed in args.seeds],
            "ewc": [
                Job(method, seed, "ewc") for seed in args.ewc_seeds if method != "prefix"
            ],  # the Fisher is of scored rows
        }
    return found


def compose(method: str, seeds: list[int], folder: Path) -> list[list]:
    """Return rows of (method, active adapters, score of each task) of adapters that were trained apart on one base."""
    base, config = str(toyworld.stage_checkpoint("sft")), METHODS[method][0]()
    tasks = {
        "kind": lambda row: {"prompt": f"What kind is this? {row['text']}", "completion": f" {row['label']}"},
        "answer": lambda row: {"prompt": f"Answer shortly. {row['prompt']}", "completion": f" {row['completion']}"},
    }
    sources = {"kind": toyworld.task_dataset("classify"), "answer": toyworld.task_dataset("seq2seq")}
    rows = {
        task: {split: [build_row(row) for row in part] for split, part in sources[task].items()}
        for task, build_row in tasks.items()
    }
    choices, scores = ([], ["kind"], ["answer"], ["kind", "answer"], ["answer", "kind"]), {}
    for seed in seeds:
        for task in tasks:
            options = SFTConfig(
                str(folder / f"{method}_{task}"), seed=seed, max_steps=300, learning_rate=COMPOSED[method],
                warmup_steps=30,
                lr_scheduler_type="cosine", per_device_train_batch_size=16, report_to="none", save_strategy="no",
                logging_steps=100, use_cpu=not torch.cuda.is_available(), disable_tqdm=True,
            )  # fmt: skip
            trainer = SFTTrainer(base, options, Dataset.from_list(rows[task]["train"]), peft_config=config)
            trainer.train()
            trainer.save_model()
        plain, tokenizer = AutoModelForCausalLM.from_pretrained(base), trainer.processing_class
        model = PeftModel.from_pretrained(plain, str(folder / f"{method}_kind"), adapter_name="kind")
        model.load_adapter(str(folder / f"{method}_answer"), adapter_name="answer")
        for active in choices:
            if active:
                model.base_model.set_adapter(active)
            with nullcontext() if active else model.disable_adapter():
                for task in tasks:
                    found = score(model, tokenizer, rows[task]["test"][:100], 50, length=32)
                    scores.setdefault((*active, task), []).append(found)
    return [
        [method, " then ".join(active) or "none", *(statistics.mean(scores[*active, task]) for task in tasks)]
        for active in choices
    ]


def main() -> None:
    args = parse_args()
    if args.compose:
        rows = [row for method in COMPOSED for row in compose(method, args.seeds, Path(args.output))]
        show("Two adapters", "method | active | score: kind | score: answer", "{} | {} | {:.3f} | {:.3f}", rows)
        return
    if args.smoke:
        args.steps, args.held_out, args.batch, args.tokens = 2, 8, 4, 4
        args.seeds, args.ewc_seeds = args.seeds[:1], args.ewc_seeds[:1]
    output = Path(args.output + ("_smoke" if args.smoke else ""))
    if args.only:
        job = Job(args.only[0], int(args.only[1]), args.only[2], float(args.only[3]))
        folder = output / job.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "found.json").write_text(json.dumps(run(args, job, folder)))
        return
    wanted, rows = jobs_of(args), []
    jobs = [job for kinds in wanted.values() for jobs in kinds.values() for job in jobs]
    for job in sorted(jobs, key=lambda job: (KINDS.index(job.kind), job.seed)):
        if not (output / job.name / "found.json").exists():
            subprocess.run([sys.executable, *sys.argv, "--only", *map(str, job)], check=True)
    for method, kinds in wanted.items():
        found = {
            kind: [json.loads((output / job.name / "found.json").read_text()) for job in jobs]
            for kind, jobs in kinds.items()
        }
        if args.tune:
            rates = [f"{METHODS[method][1] * job.rate:.1e}" for job in kinds["tune"]]
            rows += [[method, rate, one["score"], one["perplexity"]] for rate, one in zip(rates, found["tune"])]
        else:
            rows.append(table_row(method, found))
    if args.tune:
        show("Learning rates", "method | learning rate | score | perplexity", "{} | {} | {:.3f} | {:.2f}", rows)
    else:
        show("Adapters", HEADER, " | ".join(["{}"] * len(rows[0])), rows)


if __name__ == "__main__":
    prepare()
    main()
