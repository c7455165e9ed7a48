"""What each pretraining objective learns of one text, and whether UL2 fills and continues better than causal LM.

    export OMP_NUM_THREADS=1
    python benchmarks/pretraining_objectives.py tinyshakespeare.txt          # five models, about ten CPU minutes each
    python benchmarks/pretraining_objectives.py tinyshakespeare.txt --objectives causal ul2 --steps 1000

Each objective trains a new model of the same shape by `recipes/pretrain.py`; one that stands in --output_dir is kept.
Losses are nats per target on held-out text. The unigram entropy is that of the held-out targets themselves, which no
model that ignores the context can beat. In the second table both models predict the same held-out tokens: UL2 reads
the row as its denoiser shows it, with the text to both sides of a span; the causal model reads all that stands to
the left in the plain text.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from measuring import prepare, show
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from lifecycle_hf import PretrainingConfig
from lifecycle_hf.data.corpora import python_documentation, read_corpus, split_tail
from lifecycle_hf.data.denoising import IGNORED, is_any_of
from lifecycle_hf.trainers.pretraining import OBJECTIVES, PretrainingTrainer

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "pretrain.py"


def train(objective, args, folder):
    """CPU minutes that the recipe took; it trained before where the folder holds a report."""
    taken = folder / "cpu_minutes.json"
    if not taken.exists():
        command = [sys.executable, str(RECIPE), "--dataset_name", args.text or "python", "--objective", objective]
        options = {"max_steps": args.steps, "vocab_size": args.vocab_size, "output_dir": folder, "bf16": args.bf16,
                   "eval_strategy": "no", "eval_on_start": False, "learning_rate": args.learning_rate}  # fmt: skip
        command += [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        taken.write_text(json.dumps(seconds / 60))
    return json.loads(taken.read_text())


def trainer_of(objective, folder, texts, args):
    """The trained model and its held-out rows."""
    kind = AutoModelForMaskedLM if objective == "masked" else AutoModelForCausalLM
    options = PretrainingConfig(str(folder), objective=objective, max_length=256, report_to="none", use_cpu=True,
                                per_device_eval_batch_size=16, bf16=False, disable_tqdm=True)  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return PretrainingTrainer(kind.from_pretrained(folder), options, *texts, tokenizer)


def entropy(labels):
    counts = np.bincount(labels)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


@torch.no_grad()
def log_probs(model, ids, **given):
    """Of every token but the first [T-1], and whether it was the likeliest."""
    scores = model(input_ids=torch.as_tensor(ids)[None], **given).logits[0, :-1].float().log_softmax(-1)
    following = torch.as_tensor(ids)[1:]
    return scores.gather(1, following[:, None])[:, 0].numpy(), (scores.argmax(-1) == following).numpy()


def hidden_places(denoiser, length, rng, tokens):
    """Positions in the text of the targets that `denoiser` makes with `rng`, in their order."""
    _, targets = denoiser.corrupt(np.arange(length) + tokens.vocab_size, rng, tokens)
    return targets[targets >= tokens.vocab_size] - tokens.vocab_size


def compare(ul2, causal, rows):
    """[denoiser, tokens, UL2's and the causal model's nats per token, their shares of right guesses] per denoiser."""
    plan, ids = ul2.eval_dataset.plan, ul2.eval_dataset.stream.ids
    table = []
    for kind, denoiser in enumerate(plan.denoisers):
        sums, length = np.zeros(5), plan.lengths[kind]
        for number in range(rows):
            first = int(np.random.default_rng((kind, number)).integers(len(ids) - length))
            text = ids[first : first + length].astype(np.int64)
            row = plan.row(kind, text, np.random.default_rng(number))
            hidden = hidden_places(denoiser, length, np.random.default_rng(number), plan.tokens)
            prefix, targets = row["prefix_length"], row["input_ids"][row["prefix_length"] :]
            words = prefix - 1 + np.flatnonzero(~is_any_of(targets, plan.tokens.special_ids))
            assert np.array_equal(row["input_ids"][words + 1], text[hidden])
            filled = log_probs(ul2.model, row["input_ids"], prefix_lengths=torch.tensor([prefix]))
            read = log_probs(causal.model, text)
            found = [part[places] for part, places in zip((*filled, *read), (words, words, hidden - 1, hidden - 1))]
            sums += [len(hidden), -found[0].sum(), found[1].sum(), -found[2].sum(), found[3].sum()]
        tokens, (mine, right, theirs, guessed) = int(sums[0]), sums[1:] / sums[0]
        table.append([denoiser.name, denoiser.mode, tokens, mine, theirs, 100 * right, 100 * guessed])
    return table


def main(args):
    texts = split_tail(read_corpus(Path(args.text)) if args.text else python_documentation())
    trainers, rows = {}, []
    for objective in args.objectives:
        folder = Path(args.output_dir) / objective
        minutes = train(objective, args, folder)
        trainer = trainers[objective] = trainer_of(objective, folder, texts, args)
        loss = trainer.evaluate()["eval_loss"]
        first = 0 if objective == "masked" else 1
        targets = np.concatenate([row["labels"][first:] for row in trainer.eval_dataset])
        unigram = entropy(targets[targets != IGNORED])
        rows.append([objective, args.steps, minutes, loss, unigram, unigram - loss])
    header = "objective | steps | CPU minutes | held-out loss | unigram entropy of its targets | below it"
    show("Nats per target", header, "{} | {} | {:.1f} | {:.2f} | {:.2f} | {:.2f}", rows)
    if {"ul2", "causal"} <= trainers.keys():
        header = "denoiser | mode | tokens | UL2 | causal | UL2 right, % | causal right, %"
        pattern = "{} | {} | {} | {:.2f} | {:.2f} | {:.1f} | {:.1f}"
        show(
            "The same hidden tokens, nats per token",
            header,
            pattern,
            compare(trainers["ul2"], trainers["causal"], args.rows),
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", help="a text file or folder; Python's documentation by default")
    parser.add_argument("--objectives", nargs="+", default=OBJECTIVES, choices=OBJECTIVES)
    parser.add_argument("--steps", type=int, default=500, help="optimizer steps of 16 rows of 256 tokens")
    parser.add_argument("--vocab_size", type=int, default=512)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--bf16", type=lambda word: word.lower() == "true", default=True, metavar="true|false")
    parser.add_argument("--rows", type=int, default=200, help="rows per denoiser in the comparison")
    parser.add_argument("--output_dir", default="output/objectives")
    prepare()
    main(parser.parse_args())
