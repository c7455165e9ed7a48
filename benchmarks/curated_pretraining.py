"""Pretraining on the curated embedded crawl against pretraining on the raw one, at equal tokens.

    export OMP_NUM_THREADS=1
    python benchmarks/curated_pretraining.py               # three seeds, about fifteen CPU minutes
    python benchmarks/curated_pretraining.py --seeds 0 --steps 5

The crawl is that of recipes/curate.py, and with each seed another one. The recipe curates it as its default does;
without the step of quality; and as it curates a crawl of your own, where the classifier of quality learns to tell the
trusted text from a sample of the crawl. For each seed models of 0.9M parameters with the same start read as many
tokens, each of one corpus. The held-out text is documentation that is neither in the crawl nor trusted.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from datasets import Dataset, load_dataset
from measuring import prepare
from scipy import stats

from lifecycle_hf import PretrainingConfig, PretrainingTrainer
from lifecycle_hf.data.corpora import train_tokenizer
from lifecycle_hf.scaling.tables import markdown_table
from lifecycle_hf.toyworld import crawl
from lifecycle_hf.trainers.supervised.pretraining import new_model

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "curate.py"
SIZES = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 344}  # fmt: skip
OWN = "as a crawl of your own"
CORPORA = {
    "raw": None,
    "embedded default": [],
    "without quality": ["--steps", "url", "rules", "pii", "minhash", "substring"],
    OWN: ["--trusted_dataset"],
}
"""{corpus: options of the recipe}."""


def corpus(folder: Path, name: str, seed: int) -> list[str]:
    """Return the texts of a corpus."""
    rows = crawl.crawl(seed)
    if name == "raw":
        return [row["text"] for row in rows]
    words = [sys.executable, RECIPE, "--output_dir", folder / name, "--seed", str(seed), *CORPORA[name]]
    if name == OWN:
        for kind, own in {"crawl": rows, "trusted": [{"text": text} for text in crawl.trusted()]}.items():
            (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
        words += [folder / "trusted.jsonl", "--dataset_name", folder / "crawl.jsonl"]
    subprocess.run(list(map(str, words)), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return list(load_dataset(str(folder / name), split="train")["text"])


def held_out_loss(texts: list[str], held_out: Dataset, tokenizer, args, seed: int, folder: str) -> float:
    given = PretrainingConfig(
        folder, objective="causal", max_length=128, max_steps=args.steps, per_device_train_batch_size=16,
        per_device_eval_batch_size=32, learning_rate=2e-3, warmup_steps=20, seed=seed, save_strategy="no",
        report_to="none", use_cpu=True, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    model = new_model(given, tokenizer, **SIZES)
    trainer = PretrainingTrainer(model, given, Dataset.from_dict({"text": texts}), held_out, tokenizer)
    trainer.train()
    return trainer.evaluate()["eval_loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--corpora", nargs="+", choices=list(CORPORA)[1:], default=list(CORPORA)[1:])
    parser.add_argument("--steps", type=int, default=300, help="of 2,048 tokens")
    args = parser.parse_args()
    prepare()
    held_out = Dataset.from_dict({"text": crawl.held_out()})
    found, documents = ({name: [] for name in ["raw", *args.corpora]} for _ in range(2))
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            corpora = {name: corpus(Path(folder), name, seed) for name in found}
            tokenizer = train_tokenizer(corpora["raw"], 2048)
            for name, texts in corpora.items():
                documents[name].append(str(len(texts)))
                found[name].append(held_out_loss(texts, held_out, tokenizer, args, seed, f"{folder}/run"))
                print(seed, name, len(texts), found[name][-1], file=sys.stderr, flush=True)
    cells = []
    for name, losses in found.items():
        gains = np.array(losses) - np.array(found["raw"])
        half = stats.t.ppf(0.975, len(gains) - 1) * gains.std(ddof=1) / len(gains) ** 0.5 if len(gains) > 1 else np.nan
        told = f"{gains.mean():+.3f} ({gains.mean() - half:+.3f} to {gains.mean() + half:+.3f})"
        cells.append([name, ", ".join(documents[name]), *(f"{x:.3f}" for x in losses), told if name != "raw" else ""])
    headings = ["corpus", "documents", *(f"loss, seed {seed}" for seed in args.seeds), "difference from raw"]
    print(markdown_table(headings, cells))


if __name__ == "__main__":
    main()
