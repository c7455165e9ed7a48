"""Pretraining on the curated embedded crawl against pretraining on the raw one, at equal tokens.

    export OMP_NUM_THREADS=1
    python benchmarks/curated_pretraining.py               # three seeds, about twelve CPU minutes
    python benchmarks/curated_pretraining.py --seeds 0 --steps 5

The crawl is that of recipes/curate.py, which curates it by its default steps. Its trusted text is one half of the
documents that are not in the crawl, and the held-out text is the other half. For each seed two models of 0.9M
parameters with the same start read as many tokens, one of each corpus. A third reads the crawl that was curated
without the step of quality, which has seen trusted text of the kind that is held out.
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
STEPS = {"curated": ["url", "rules", "pii", "quality", "minhash", "substring"],
         "curated without quality": ["url", "rules", "pii", "minhash", "substring"]}  # fmt: skip


def curated(folder: Path, name: str, trusted: list[str]) -> list[str]:
    """Texts that the recipe leaves of the crawl."""
    rows = {"crawl": crawl.crawl(), "trusted": [{"text": text} for text in trusted]}
    for kind, own in rows.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    words = [sys.executable, RECIPE, folder / "crawl.jsonl", "--output_dir", folder / name, "--steps", *STEPS[name]]
    words += ["--trusted_dataset", folder / "trusted.jsonl"] if "quality" in STEPS[name] else []
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
    parser.add_argument("--steps", type=int, default=300, help="of 2,048 tokens")
    args = parser.parse_args()
    prepare()
    trusted = crawl.trusted()
    held_out = Dataset.from_dict({"text": trusted[1::2]})
    with tempfile.TemporaryDirectory() as folder:
        corpora = {"raw": [row["text"] for row in crawl.crawl()]}
        corpora |= {name: curated(Path(folder), name, trusted[::2]) for name in STEPS}
        tokenizer = train_tokenizer(corpora["raw"], 2048)
        found = {
            name: [held_out_loss(texts, held_out, tokenizer, args, seed, f"{folder}/run") for seed in args.seeds]
            for name, texts in corpora.items()
        }
    cells = []
    for name, losses in found.items():
        gains = np.array(losses) - np.array(found["raw"])
        half = stats.t.ppf(0.975, len(gains) - 1) * gains.std(ddof=1) / len(gains) ** 0.5 if len(gains) > 1 else np.nan
        told = f"{gains.mean():+.3f} ({gains.mean() - half:+.3f} to {gains.mean() + half:+.3f})"
        cells.append([name, f"{len(corpora[name])}", *(f"{x:.3f}" for x in losses), told if name != "raw" else ""])
    headings = ["corpus", "documents", *(f"loss, seed {seed}" for seed in args.seeds), "difference from raw"]
    print(markdown_table(headings, cells))


if __name__ == "__main__":
    main()
