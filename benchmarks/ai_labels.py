"""What a reward model learns from the labels of a judge that errs: does it rank held-out pairs as well as the judge?

    python benchmarks/ai_labels.py                       # judges that err in .1, .2 and .3 of the pairs, three seeds

Pairs of answers of the toy world's SFT model, of which the better one is known, are labelled by a judge of a known
error rate (`lifecycle_hf.synthesis.label`), and recipes/reward.py trains on the labels. Its accuracy is measured on
pairs for held-out requests, with their true labels. The printed table is Markdown; docs/synthetic_data.md holds it.
"""

import argparse
from functools import cache
from pathlib import Path

import torch
from measuring import prepare
from toyworld_runs import Run, complete, train


@cache
def true_pairs(split: str, rows: int):
    """Requests, and pairs of the SFT model's answers of which the first is truly better; ties are left out."""
    from lifecycle_hf import toyworld
    from lifecycle_hf.models.loading import load_causal_lm, load_tokenizer
    from lifecycle_hf.synthesis import LocalWriter
    from lifecycle_hf.toyworld.gold import judge, request_of

    name = str(toyworld.stage_checkpoint("sft"))
    write = LocalWriter(load_causal_lm(name).eval(), load_tokenizer(name), batch_size=256)
    asked = [prompt for prompt in toyworld.dataset("ppo")[split]["prompt"] for _ in range(4)]
    texts, found = write(asked, max_tokens=32, temperature=1.0, seed=0), []
    for prompt, first, second in zip(asked[::2], texts[::2], texts[1::2], strict=True):
        gold = [judge(request_of(prompt), text) for text in (first, second)]
        if gold[0] != gold[1]:
            found.append((prompt, (first, second) if gold[0] > gold[1] else (second, first)))
    return list(zip(*found[:rows], strict=True))


def accuracy(folder: Path):
    """Of each held-out pair, whether the reward model ranks it right; a Measurement."""
    from lifecycle_hf.completions.rewards import Samples
    from lifecycle_hf.data.collators import pad_sequences
    from lifecycle_hf.evaluation.bootstrap import Measurement
    from lifecycle_hf.models.loading import load_reward_model

    model = load_reward_model(str(folder)).eval()
    prompts, pairs = true_pairs("test", 1000)
    scores = []
    for side in range(2):
        ids = Samples(prompts, [pair[side] for pair in pairs]).encode(model.tokenizer)
        with torch.no_grad():
            scores.append(model(pad_sequences(ids, 0), torch.tensor(list(map(len, ids)))))
    return Measurement((scores[0] > scores[1]).tolist())


def main(args):
    from datasets import Dataset

    from lifecycle_hf.data.json_lines import write_samples
    from lifecycle_hf.evaluation.bootstrap import bootstrap_interval
    from lifecycle_hf.synthesis import label, load_constitution
    from lifecycle_hf.toyworld.critic import judge_with_errors

    prompts, pairs = true_pairs("train", args.pairs)
    asked = Dataset.from_dict({"prompt": list(prompts)})
    print(f"\n{len(pairs)} pairs to train on\n\n| judge's error | seed | right labels | reward model, held out |")
    print("|---:|---:|---:|---:|")
    for rate in args.error_rates:
        for seed in args.seeds:
            folder = Path(args.output_dir).resolve() / f"error_{rate}" / f"seed_{seed}"
            rows, _ = label(
                judge_with_errors(rate), asked, pairs, load_constitution(), output_dir=folder.parent, seed=0
            )
            write_samples(folder.parent / "preferences.jsonl", rows.to_list())
            run = Run("reward", {"dataset_name": str(folder.parent / "preferences.jsonl"), "seed": seed}, folder)
            if not complete(run, "model.safetensors"):
                train(run)
            right = sum(row["chosen"][0]["content"] == pair[0] for row, pair in zip(rows, pairs, strict=True)) / len(
                rows
            )
            found = accuracy(folder)
            low, high = bootstrap_interval(found)
            print(f"| {rate} | {seed} | {right:.3f} | {float(found):.3f} ({low:.3f} to {high:.3f}) |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--error_rates", type=float, nargs="+", default=[0.1, 0.2, 0.3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[5, 6, 7])
    parser.add_argument("--pairs", type=int, default=3000)
    parser.add_argument("--output_dir", default="output/benchmark_ai_labels")
    prepare()
    main(parser.parse_args())
