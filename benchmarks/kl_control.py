"""How the KL controllers of PPO hold a target, in a run that over-optimises: ten seeds of each.

    python benchmarks/kl_control.py                        # 20 runs of one to three CPU minutes
    python benchmarks/kl_control.py --seeds 0 1 --target 3

Every run is recipes/ppo.py with recipes/configs/ppo_toyworld_overoptimized.yaml, the same target and the same β at the
start. "First reached" is the first update whose KL is at or above the target. From then on the table counts the
updates whose KL lies within a factor of 1.5 of the target, and those above it; the KL is smoothed over three updates,
because a rollout's mean of 64 completions is noisy. Written to --output_dir: kl_control.png, KL and β of every run.
"""

import argparse
import ast
import os
from pathlib import Path

import numpy as np
from measuring import prepare
from toyworld_runs import ROOT, Run, make_all, spread, values_of

CONTROLS = {
    "ziegler": {"kl_control": "ziegler"},
    "adaptive": {"kl_control": "adaptive", "kl_coef_min": 0.05},
}


def curve(run: Run) -> np.ndarray:
    """[updates, 2]: KL and β of each rollout, from what the recipe printed."""
    lines = (run.folder / "log.txt").read_text().splitlines()
    rows = [ast.literal_eval(line) for line in lines if line.startswith("{'loss'")]
    return np.array([(float(row["kl"]), float(row["kl_coef"])) for row in rows])


def held(kl: np.ndarray, target: float) -> tuple[float, float, float] | None:
    """Share of the updates within a factor of 1.5 since the target was reached, share above it, and the largest KL."""
    reached = np.flatnonzero(kl >= target)
    if not len(reached):
        return None
    after = np.convolve(kl, np.full(3, 1 / 3), mode="valid")[max(reached[0] - 1, 0) :]
    within = (after <= 1.5 * target) & (after >= target / 1.5)
    return float(within.mean()), float((after > 1.5 * target).mean()), float(kl[reached[0] :].max())


def draw(curves, target, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots(2, len(curves), sharex=True, sharey="row", squeeze=False)
    for column, (name, found) in enumerate(curves.items()):
        for values in found:
            axes[0, column].plot(values[:, 0], linewidth=0.9)
            axes[1, column].plot(values[:, 1], linewidth=0.9)
        axes[0, column].axhline(target, color="black", linewidth=0.8)
        axes[0, column].axhspan(target / 1.5, 1.5 * target, color="grey", alpha=0.15)
        axes[0, column].set(title=name, yscale="symlog")
        axes[1, column].set(xlabel="update", yscale="log")
    axes[0, 0].set_ylabel("KL, nats")
    axes[1, 0].set_ylabel("β")
    figure.savefig(path, dpi=150)


def main(args):
    folder = Path(args.output_dir).resolve()
    config = {
        "config": str(ROOT / "recipes" / "configs" / "ppo_toyworld_overoptimized.yaml"),
        "kl_target": args.target,
    }
    quiet = {"log_completions": "false", "measure_updates": 0, "max_kl": 1000}
    runs = {
        name: [Run("ppo", config | quiet | options | {"seed": s}, folder / name / f"seed_{s}") for s in args.seeds]
        for name, options in CONTROLS.items()
        if name in args.only
    }
    make_all([run for kind in runs.values() for run in kind], args.rows, args.workers)
    curves = {name: [curve(run) for run in kind] for name, kind in runs.items()}
    draw(curves, args.target, folder / "kl_control.png")
    names = (
        "control",
        "reached",
        "within a factor of 1.5",
        "above",
        "largest KL",
        "last β",
        "gold reward",
        "accuracy",
    )
    print(f"\n| {' | '.join(names)} |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, found in curves.items():
        marks = [mark for mark in (held(values[:, 0], args.target) for values in found) if mark]
        shares = [spread(column) for column in zip(*marks, strict=True)] or ["–"] * 3
        ends = [values_of(run) for run in runs[name]]
        cells = [f"{len(marks)} of {len(found)}", *shares, spread([values[-1, 1] for values in found])]
        cells += [spread([end[metric] for end in ends]) for metric in ("gold_reward", "benign_accuracy")]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CONTROLS, default=list(CONTROLS))
    parser.add_argument("--target", type=float, default=2.0, help="nats")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5, 15)))
    parser.add_argument("--rows", type=int, default=256, help="held-out requests per model")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--output_dir", default="output/benchmark_kl_control")
    prepare()
    main(parser.parse_args())
