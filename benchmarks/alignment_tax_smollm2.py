"""What alignment costs a real model: SmolLM2-135M, PPO with LoRA against a sentiment lexicon, and what buys it back.

    python benchmarks/alignment_tax_smollm2.py SMOLLM2 hh_harmless_1500.jsonl.gz gsm8k_train_1000.jsonl.gz

SMOLLM2 is a checkpoint (docs/real_runs.md says how to get it), the second has the prompts, of which the short ones are
taken, the third school maths (`question`, `answer`). The reward is vaderSentiment's, on prompts that no run has seen.
Capability is perplexity on held-out solutions and the accuracy of choosing the right number among four; what PTX, EWC
and projection protect are other solutions. One seed: intervals are over items. Runs that stand in --output_dir are
kept. Plain PPO, PTX and two interpolations take about 40 CPU minutes; --settings names more.
"""

import argparse
import os
import random
import re
import sys
from pathlib import Path

from alignment_tax import interpolated, table, train, verdicts
from measuring import prepare, read_rows

REWARD = """from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

analyzer = SentimentIntensityAnalyzer()


def positive(prompts, completions, **columns):
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [analyzer.polarity_scores(text)["compound"] for text in texts]
"""
HELD_OUT, PROMPT_CHARACTERS = 100, 250
ADAPTIVE = {"kl_control": "adaptive", "kl_coef": 0.05, "kl_target": 8.0, "kl_horizon": 32}
SETTINGS = {
    "plain": {},
    "PTX": {"ptx_coef": 0.5},
    "EWC": {"ewc_coef": 0.1, "ewc_rows": 64},
    "projection, update": {"projection": "update"},
    "adaptive KL": ADAPTIVE,
    "PTX + adaptive KL": ADAPTIVE | {"ptx_coef": 0.5},
}
SHOWN = {"positive": True, "perplexity solutions": False, "accuracy questions": True, "ECE questions": False,
         "token entropy (nats)": True, "self-BLEU": False, "KL (nats per sequence)": False}  # fmt: skip


def number(text):
    return text.rpartition("####")[2].strip().replace(",", "")


def choices_of(row, rng):
    """The right number and three others: numbers of the question and the solution, or near ones."""
    right = number(row["answer"])
    near = {n.replace(",", "") for n in re.findall(r"\d[\d,]*", row["question"] + row["answer"])}
    near |= {str(int(float(right)) + step) for step in (1, 2, 5, 10)}
    options = [right, *rng.sample(sorted(near - {right}), 3)]
    rng.shuffle(options)
    return {"question": f"Question: {row['question']}\nAnswer: The answer is", "choices": options,
            "answer": options.index(right)}  # fmt: skip


def short_prompts(pairs):
    from datasets import Dataset

    from lifecycle_hf.data.schemas import to_prompts

    found = to_prompts(Dataset.from_list(read_rows(pairs)), "prompts")["prompt"]
    return [{"prompt": chat} for chat in found if sum(len(turn["content"]) for turn in chat) < PROMPT_CHARACTERS]


def write_data(pairs, maths, folder):
    """Prompts, solutions as texts, and questions as multiple choice, train and test apart."""
    from datasets import Dataset, DatasetDict

    rows, rng = read_rows(maths), random.Random(0)
    rng.shuffle(rows)
    texts = [{"text": f"Question: {row['question']}\nAnswer: {row['answer']}"} for row in rows]
    questions = [choices_of(row, rng) for row in rows[:HELD_OUT]]
    parts = {"prompts": short_prompts(pairs), "solutions": texts}
    splits = {name: {"train": part[HELD_OUT:], "test": part[:HELD_OUT]} for name, part in parts.items()}
    for name, made in (splits | {"questions": {"test": questions}}).items():
        DatasetDict({split: Dataset.from_list(part) for split, part in made.items()}).save_to_disk(folder / name)


def main(args):
    from lifecycle_hf.evaluation import Evaluation

    folder = Path(args.output_dir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sentiment.py").write_text(REWARD)
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    if not (folder / "questions").exists():
        write_data(args.prompts, args.maths, folder)
    model, prompts = str(Path(args.model).resolve()), str(folder / "prompts")
    options = {
        "config": "recipes/configs/ppo_smollm2.yaml", "model_name_or_path": model, "dataset_name": prompts,
        "reward_funcs": "sentiment:positive", "ptx_dataset_name": str(folder / "solutions"), "ptx_batch_size": 4,
        "ptx_max_length": 128, "ptx_coef": 0, "max_prompt_length": 64, "max_completion_length": 24,
        "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "num_mini_batches": 1, "ppo_epochs": 2,
        "max_steps": 2 * args.updates, "learning_rate": 1e-3, "value_learning_rate": 3e-3, "kl_coef": 0.01,
        "kl_control": "fixed", "activation_checkpointing": False, "measure_updates": 0, "save_strategy": "no",
        "log_completions": False,
    }  # fmt: skip
    evaluation = Evaluation(
        [f"perplexity:{folder / 'solutions'}", f"multiple_choice:{folder / 'questions'}"],
        ["sentiment:positive", "diversity", "drift"], prompts, rows=args.rows, max_new_tokens=24, batch_size=16,
    )  # fmt: skip
    reference = evaluation.load(model)[0]
    results = {}
    for name, more in ((name, SETTINGS[name]) for name in args.settings):
        made = train("ppo", name, options | more, 0, folder / name.replace(", ", "_").replace(" ", "_"))
        results[name] = [evaluation.measure(*evaluation.load(str(made)), reference)]
    for alpha in (0.3, 0.6):
        made = interpolated(folder / "plain", alpha, model)
        results[f"interpolation, {alpha}"] = [evaluation.measure(*evaluation.load(str(made)), reference)]
    base = evaluation.measure(*evaluation.load(model), reference)
    judged = {name: SHOWN[name] for name in list(SHOWN)[:3]}
    text = f"{table(results, base, SHOWN)}\n\n{verdicts(results, judged)}\n"
    (folder / "results.md").write_text(text)
    print(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("prompts")
    parser.add_argument("maths")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["plain", "PTX"], help="plain among them")
    parser.add_argument("--rows", type=int, default=50, help=f"held-out items of each kind, {HELD_OUT} at most")
    parser.add_argument("--updates", type=int, default=12, help="of PPO, 16 completions each")
    parser.add_argument("--output_dir", default="output/benchmark_tax_smollm2")
    prepare()
    main(parser.parse_args())
