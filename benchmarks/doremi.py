"""DoReMi on three real domains: a model trained by the weights it finds against one trained by uniform weights.

    export OMP_NUM_THREADS=1
    python benchmarks/doremi.py --data DIR                    # about three CPU minutes; a seed is written at once
    python benchmarks/doremi.py --data DIR --seeds 0 --steps 20 --smoke

The domains are Shakespeare (`tinyshakespeare.txt` in DIR), Python's documentation, and GSM8K's questions and answers
(`gsm8k_train_1000.jsonl.gz` in DIR). A tenth of the rows of each is held out. For each seed a reference reads by
uniform weights, and a proxy of the same size finds weights. Two models of that size and with the same start then read
as many tokens each: one by the weights that were found, one by uniform weights. The excess loss of a domain is the
model's held-out loss minus the reference's. The last line is the difference of the worst domain's excess loss between
the two models: its mean over seeds, and a 95 % interval by Student's t. Below 0 the weights help.
"""

import argparse
import gzip
import json
import tempfile
from pathlib import Path

import numpy as np
from measuring import prepare, show
from scipy import stats

from lifecycle_hf import DoReMiConfig, DoReMiTrainer, PretrainingConfig, PretrainingTrainer
from lifecycle_hf.data.corpora import python_documentation, train_tokenizer
from lifecycle_hf.data.domains import join_domains, split_domains
from lifecycle_hf.trainers.supervised.pretraining import new_model

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
         "intermediate_size": 172}  # fmt: skip


def load(folder: Path) -> dict[str, list[str]]:
    """Texts of each domain, in pieces of at most 2,000 characters."""
    with gzip.open(folder / "gsm8k_train_1000.jsonl.gz", "rt") as lines:
        problems = [f"{row['question']}\n{row['answer']}" for row in map(json.loads, lines)]
    whole = {
        "gsm8k": problems,
        "python": list(python_documentation()["text"]),
        "shakespeare": [(folder / "tinyshakespeare.txt").read_text()],
    }
    return {
        name: [text[i : i + 2000] for text in texts for i in range(0, len(text), 2000)]
        for name, texts in whole.items()
    }


def losses(trainer: PretrainingTrainer, held_out: dict) -> dict[str, float]:
    return {name: trainer.evaluate(part)["eval_loss"] for name, part in held_out.items()}


def run(seed: int, args, texts: dict[str, list[str]], tokenizer, folder: str) -> dict:
    order = {name: np.random.default_rng(seed).permutation(len(part)) for name, part in texts.items()}
    sides = [{name: [texts[name][i] for i in order[name][cut(len(order[name]))]] for name in texts}
             for cut in (lambda n: slice(n // 10, None), lambda n: slice(n // 10))]  # fmt: skip
    train, held_out = join_domains(sides[0]), split_domains(join_domains(sides[1]), "held out")
    uniform = dict.fromkeys(texts, 1)
    options = {
        "max_length": 128, "max_steps": args.steps, "per_device_train_batch_size": args.batch, "learning_rate": 3e-3,
        "warmup_steps": 20, "report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True,
        "logging_strategy": "no", "per_device_eval_batch_size": 64,
    }  # fmt: skip

    def trained(name: str, weights, number: int) -> PretrainingTrainer:
        given = PretrainingConfig(f"{folder}/{name}", **options, seed=number, domain_weights=weights)
        trainer = PretrainingTrainer(new_model(given, tokenizer, **SIZES), given, train, None, tokenizer)
        trainer.train()
        return trainer

    reference = trained("reference", uniform, seed)
    base = losses(reference, held_out)
    given = DoReMiConfig(f"{folder}/proxy", **options, seed=seed + 1000, weight_step_size=args.step_size)
    proxy = DoReMiTrainer(new_model(given, tokenizer, **SIZES), reference.model, given, train, tokenizer)
    proxy.train()
    found = {"weights": proxy.weights}
    for name, weights in (("doremi", proxy.weights), ("uniform", uniform)):
        found[name] = {k: x - base[k] for k, x in losses(trained(name, weights, seed + 2000), held_out).items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100, help="of each model")
    parser.add_argument("--batch", type=int, default=24, help="rows of a step")
    parser.add_argument("--step_size", type=float, default=0.1, help="η")
    parser.add_argument("--smoke", action="store_true", help="a tenth of the texts")
    parser.add_argument("--output", default="output/bench_doremi.json")
    args = parser.parse_args()
    prepare()
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    texts = {name: part[:: 10 if args.smoke else 1] for name, part in load(args.data).items()}
    tokenizer = train_tokenizer([text for part in texts.values() for text in part], 1024)
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for seed in args.seeds:
            found[seed] = run(seed, args, texts, tokenizer, f"{folder}/{seed}")
            output.write_text(json.dumps({"options": vars(args) | {"data": str(args.data)}, "seeds": found}, indent=2))
    rows = [
        [seed, *result["weights"].values(), *(max(result[side].values()) for side in ("doremi", "uniform"))]
        for seed, result in found.items()
    ]
    title = (
        f"worst domain's excess loss, nats per token, {args.steps} steps of {args.batch} rows, η = {args.step_size}"
    )
    header = f"seed | {' | '.join(f'w {name}' for name in sorted(texts))} | by DoReMi | uniform"
    show(title, header, "{} | {:.3f} | {:.3f} | {:.3f} | {:+.3f} | {:+.3f}", rows)
    gains = np.array([row[-2] - row[-1] for row in rows])
    half = stats.t.ppf(0.975, len(gains) - 1) * gains.std(ddof=1) / len(gains) ** 0.5 if len(gains) > 1 else np.nan
    print(f"\ndifference {gains.mean():+.3f} ({gains.mean() - half:+.3f} to {gains.mean() + half:+.3f})")


if __name__ == "__main__":
    main()
