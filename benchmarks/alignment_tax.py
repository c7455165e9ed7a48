"""What alignment costs in the toy world, and what each mitigation buys back: PPO and DPO, three seeds each.

    python benchmarks/alignment_tax.py                         # both, under an hour on two cores
    python benchmarks/alignment_tax.py --only ppo --seeds 0
    python benchmarks/alignment_tax.py --study projection      # why projection does what it does, under half an hour

Every run is a recipe with options that you could type (they are printed); one that stands in --output_dir is kept, so
that a killed benchmark goes on. Each model is then measured on the same held-out requests, documents and questions.
Written to --output_dir: results.md with the tables, results.json with every model's values, pareto_ppo.png,
pareto_dpo.png, overoptimization.png and reliability_*.png.

A tax is the difference to the SFT model, a mitigation's effect the difference to the plain run of the same seed.
Intervals are 95 % ones, each by itself: of many, one in twenty is off by chance. Seeds are a sample of runs and items
one of requests: mean ± t(seeds − 1)·√(variance over seeds / seeds + bootstrap variance over items), where items are
drawn alike for all seeds and both models. Of one seed they are bootstrap percentiles over items alone. A setting beats
plain where its means are no worse in gold reward and perplexity, and one is better outside its interval. The pictures
have 68 % intervals.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from measuring import interval_over_seeds, prepare

ROOT = Path(__file__).resolve().parents[1]
PLAIN = {
    "ppo": {
        "kl_control": "fixed",
        "kl_coef": 0.1,
        "ptx_coef": 0,
        "log_completions": False,
        "measure_updates": 0,
        "max_steps": 160,
    },
    "dpo": {"measure_rows": 32},
}
TEXTS = {"ptx_dataset_name": "toyworld", "ptx_batch_size": 32, "ptx_max_length": 64}
ADAPTIVE = {"kl_control": "adaptive", "kl_coef": 0.4, "max_kl": 1000}
SETTINGS = {
    "ppo": {
        "plain": {"measure_updates": 3},
        "PTX": {"ptx_coef": 0.5},
        "EWC": {"ewc_coef": 30.0},
        "projection, gradient": {"projection": "gradient"},
        "projection, gradient, on conflict": {"projection": "gradient", "projection_when": "conflict"},
        "projection, update": {"projection": "update"},
        "projection, update, on conflict": {"projection": "update", "projection_when": "conflict"},
        "adaptive KL": ADAPTIVE,
        "exponential KL": {"kl_control": "exponential", "kl_coef": 0.05, "kl_rate": 0.3, "kl_coef_max": 2.0},
        "KL budget": {"kl_control": "budget", "kl_budget": 8.0, "kl_rate": 0.05},
        "PTX + adaptive KL": ADAPTIVE | {"ptx_coef": 0.5},
        "EWC + adaptive KL": ADAPTIVE | {"ewc_coef": 30.0},
        "projection, update + adaptive KL": ADAPTIVE | {"projection": "update"},
    },
    "dpo": {
        "plain": {},
        "PTX": {"ptx_coef": 0.5},
        "EWC": {"ewc_coef": 30.0},
        "projection, gradient": {"projection": "gradient"},
        "projection, gradient, on conflict": {"projection": "gradient", "projection_when": "conflict"},
        "projection, update": {"projection": "update"},
        "projection, update, on conflict": {"projection": "update", "projection_when": "conflict"},
    },
}
STUDY = {
    "one batch": {},
    "eight batches averaged": {"projection_batches": 8},
    "16 directions, running": {"projection_k": 16, "projection_refresh": "running"},
    "each tensor by itself": {"projection_scope": "tensor"},
    "16 directions, each tensor": {"projection_k": 16, "projection_refresh": "running", "projection_scope": "tensor"},
    "SGD": {"optim": "sgd", "learning_rate": 0.3},
    "SGD, no projection": {"optim": "sgd", "learning_rate": 0.3, "projection": None},
}
ALPHAS = (0.2, 0.4, 0.6, 0.8)
SHOWN = {"gold_reward": True, "refusal_rate": True, "benign_accuracy": True, "perplexity": False,
         "accuracy facts and sums": True, "ECE facts and sums": False, "token entropy (nats)": True,
         "self-BLEU": False, "KL (nats per sequence)": False}  # fmt: skip
ALIGNMENT, CAPABILITY = "gold_reward", "perplexity"
BARS = 0.68
JUDGED = {ALIGNMENT: True, CAPABILITY: False, "benign_accuracy": True}


def is_made(folder, options):
    """Whether what stands in the folder was made with these options.

    Raises:
        ValueError: it was made with others.
    """
    noted = folder / "made_with.json"
    if not noted.exists():
        return False
    if json.loads(noted.read_text()) != options:
        raise ValueError(f"{folder} holds a model made with {noted.read_text()}, not {options}: delete it.")
    return True


def train(stage, name, options, seed, folder):
    """Run the recipe unless the model that these options make is there."""
    options = TEXTS | PLAIN[stage] | options | {"disable_tqdm": True, "seed": seed}
    options = {option: value for option, value in options.items() if value is not None}
    if not is_made(folder, options):
        command = [sys.executable, f"recipes/{stage}.py", "--output_dir", str(folder)]
        command += [str(word) for option, value in options.items() for word in (f"--{option}", value)]
        print(f"{stage}, {name}, seed {seed}: {' '.join(command[1:])}", flush=True)
        done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
        if done.returncode:
            raise RuntimeError(f"{name}, seed {seed} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        (folder / "made_with.json").write_text(json.dumps(options))
    return folder


def interpolated(plain, alpha, base):
    from lifecycle_hf.mitigation.interpolation import interpolate

    folder = plain.with_name(f"{plain.name}_alpha_{alpha}")
    made = json.loads((plain / "made_with.json").read_text()) | {"alpha": alpha}
    if not is_made(folder, made):
        shutil.rmtree(folder, ignore_errors=True)
        interpolate(base, plain, alpha, folder)
        (folder / "made_with.json").write_text(json.dumps(made))
    return folder


class Judge:
    """Measures checkpoints on the same items, and remembers what it found."""

    def __init__(self, rows):
        from lifecycle_hf.evaluation import Evaluation
        from lifecycle_hf.toyworld.stages import stage_checkpoint

        self.base = str(stage_checkpoint("sft"))
        alignment = [str(stage_checkpoint("reward")), "diversity", "drift"]
        options = {"rows": rows, "batch_size": 64, "max_new_tokens": 32}
        self.evaluation = Evaluation(["toyworld"], alignment, "toyworld", **options)
        self.reference = self.evaluation.load(self.base)[0]
        self.found = {}

    def __call__(self, folder):
        if folder not in self.found:
            self.found[folder] = self.evaluation.measure(*self.evaluation.load(str(folder)), self.reference)
        return self.found[folder]


def table(results, base, shown, against="plain"):
    """Markdown: per setting the mean of every metric, with the interval of its difference to `against`."""
    lines = [f"| run | {' | '.join(shown)} |", "|---" + "|---:" * len(shown) + "|"]
    cells = [f"{base.values[name]:.3f}" if name in base.values else "0" for name in shown]
    lines.append(f"| SFT model | {' | '.join(cells)} |")
    for name, runs in results.items():
        cells = []
        for metric in shown:
            values = [run.values[metric] for run in runs]
            cell = f"{np.mean([float(v) for v in values]):.3f}"
            if name != against:
                change, low, high = interval_over_seeds(values, [run.values[metric] for run in results[against]])
                cell += f" ({change:+.3f}: {low:+.3f} to {high:+.3f})" if np.isfinite(low) else f" ({change:+.3f})"
            cells.append(cell)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def verdicts(results, judged, against="plain"):
    """Which settings beat the plain run: no worse in the mean of the first and second of the metrics `judged` ({name:
    whether higher is better}), and better in one of them outside its interval."""
    lines = []
    for name, runs in results.items():
        if name == against:
            continue
        gains = []
        for metric, higher in judged.items():
            change, low, high = interval_over_seeds(
                *([run.values[metric] for run in side] for side in (runs, results[against]))
            )
            better = (change >= 0) == higher or change == 0
            gains.append((metric, better, not low <= 0 <= high, change, low, high))
        beats = all(better for _, better, *_ in gains[:2]) and any(sure for _, _, sure, *_ in gains[:2])
        words = [
            f"{'better' if better else 'worse'}{'' if sure else ', within noise'}" for _, better, sure, *_ in gains
        ]
        told = "; ".join(
            f"{metric} {word} ({change:+.3f}: {low:+.3f} to {high:+.3f})"
            for word, (metric, *_, change, low, high) in zip(words, gains)
        )
        lines.append(f"- **{name}** {'beats' if beats else 'does not beat'} plain: {told}.")
    return "\n".join(lines)


def point(name, runs, base):
    """A setting in the plane of gold reward and −perplexity tax, with intervals of `BARS`."""
    zero = [base.values[ALIGNMENT]] * len(runs)
    mean = float(np.mean([float(run.values[ALIGNMENT]) for run in runs]))
    change, low, high = interval_over_seeds([run.values[ALIGNMENT] for run in runs], zero, BARS)
    row = {"label": name, "alignment": mean, "alignment_interval": (mean + low - change, mean + high - change)}
    zero = [base.values[CAPABILITY]] * len(runs)
    change, low, high = interval_over_seeds([run.values[CAPABILITY] for run in runs], zero, BARS)
    return row | {"capability": -change, "capability_interval": (-high, -low)}


def report(stage, results, base, folder):
    """The part of results.md about one stage; draws its Pareto front."""
    from lifecycle_hf.evaluation.pareto import hypervolume, pareto_front
    from lifecycle_hf.evaluation.pictures import plot_pareto

    rows = [point("SFT model", [base] * len(results["plain"]), base)]
    rows += [point(name, runs, base) for name, runs in results.items()]
    points = [(row["alignment"], row["capability"]) for row in rows]
    title = f"{stage.upper()} in the toy world, means of {len(results['plain'])} seeds with {BARS:.0%} intervals"
    plot_pareto(
        rows, folder / f"pareto_{stage}.png", alignment="gold reward", capability="−perplexity tax", title=title
    )
    corner = (base.values[ALIGNMENT], min(y for _, y in points))
    plain = hypervolume([points[0], points[1]], corner)
    front = ", ".join(rows[i]["label"] for i in pareto_front(points))
    plane = f"Hypervolume against ({corner[0]:.3f}, {corner[1]:.3f}): {hypervolume(points, corner):.4f}"
    return (
        f"## {stage.upper()}\n\n{table(results, base, SHOWN)}\n\n{verdicts(results, JUDGED)}\n\n"
        f"Pareto front: {front}. {plane}, the SFT model's and the plain run's alone {plain:.4f}.\n"
    )


def pictures(results, base, folder):
    """Over-optimisation of the plain PPO runs, and how well models know what they know."""
    from lifecycle_hf.evaluation.pictures import plot_reliability

    for name, run in (("SFT", base), ("plain_PPO", results["plain"][0]), ("PPO_with_PTX", results["PTX"][0])):
        plot_reliability(*run.confidences["facts and sums"], folder / f"reliability_{name}.png", title=name)
    drawn = sorted((folder / "ppo" / "plain").glob("seed_*/overoptimization.png"))
    shutil.copy(drawn[0], folder)


def main(args):
    folder = Path(args.output_dir).resolve()
    settings = (
        {"ppo": {"plain": {}} | {n: {"projection": "update"} | o for n, o in STUDY.items()}}
        if args.study
        else SETTINGS
    )
    stages = [args.only] if args.only else list(settings)
    judge = Judge(args.rows)
    jobs = [
        (stage, name, options, seed, folder / stage / name.replace(", ", "_").replace(" ", "_") / f"seed_{seed}")
        for seed in args.seeds
        for stage in stages
        for name, options in settings[stage].items()
    ]
    with ThreadPoolExecutor(args.workers) as pool:
        runs = [pool.submit(train, *job) for job in jobs]
    for run in runs:  # all have ended: what one raises costs the others nothing
        run.result()
    text, values = [], {}
    for stage in stages:
        results = {name: [] for name in settings[stage]}
        for _, name, _, _, made in (job for job in jobs if job[0] == stage):
            results[name].append(judge(made))
        if not args.study:
            for alpha in ALPHAS:
                made = [interpolated(folder / stage / "plain" / f"seed_{s}", alpha, judge.base) for s in args.seeds]
                results[f"interpolation, {alpha} of the way"] = [judge(path) for path in made]
        base = judge(Path(judge.base))
        text.append(report(stage, results, base, folder))
        values[stage] = {
            name: [run.values for run in runs] for name, runs in (results | {"SFT model": [base]}).items()
        }
        if stage == "ppo" and not args.study:
            pictures(results, base, folder)
    (folder / "results.md").write_text("\n".join(text))
    (folder / "results.json").write_text(json.dumps(values, indent=1))
    print("\n".join(text))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("ppo", "dpo"), help="one of the two")
    parser.add_argument("--study", choices=("projection",), help="variants of the projection instead")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=256, help="held-out requests per model")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--output_dir", default="output/benchmark_tax")
    prepare()
    main(parser.parse_args())
