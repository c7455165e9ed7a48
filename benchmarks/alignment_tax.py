"""What alignment costs in the toy world, and what each mitigation saves: fronts over paired seeds.

    python benchmarks/alignment_tax.py --short     # PPO, two seeds, coarse grids: 20 runs
    python benchmarks/alignment_tax.py             # PPO and DPO, eight seeds: 296 runs
    python benchmarks/alignment_tax.py --only ppo --seeds 10 11 12 13

First the learning rate of each method is chosen on `--tuning_seeds`, which are not reported; --short takes
one rate for all. Then the strength of each method and β are swept, for all seeds alike. "plain, other rate" is plain
training at the rate that was not chosen for it: what it saves, a method with that rate saves by its rate.

Every run is a recipe with options (`made_with.json` in its folder); those of PPO have 20 updates, two thirds of the
default's. A run that stands in --output_dir is kept, so that a benchmark that was stopped goes on.

A method is judged by its front, not by one point: the runs that no other of its runs beats in gold reward and tax.
There are three taxes, each against the SFT model: on perplexity (relative), on benign accuracy, and on known facts.

- Tax at gold reward .90 (`--equal`): read off the front of the means over seeds, linearly between its points.
- Hypervolume: the area between the front and the corner (gold reward of the SFT model, CORNER).

Both are compared with plain training (β alone swept) on the same seeds. Intervals are 95 % jackknife intervals over
seeds with Student's t. p-values are corrected by Holm's method for all comparisons of a stage. Written to
--output_dir: results.md, results.json and front_STAGE_TAX.png.
"""

import argparse
import json
import os
from functools import partial
from pathlib import Path

import numpy as np
from measuring import prepare
from toyworld_runs import TEXTS, Run, base_values, make_all, values_of

QUIET = {
    "ppo": {"max_steps": 160, "log_completions": "false", "measure_updates": 0, "kl_control": "fixed", "ptx_coef": 0},
    "dpo": {"measure_rows": 8},
}
BETA = {"ppo": "kl_coef", "dpo": "beta"}
BETAS = {"ppo": (0.1, 0.3, 0.6, 1.2), "dpo": (0.05, 0.1, 0.3, 1.0)}
FEW = {"ppo": (0.3, 1.2), "dpo": (0.1, 0.3)}
RATES = {"ppo": (2e-4, 4e-4), "dpo": (3e-4, 6e-4)}
ALPHAS = (0.25, 0.5, 0.75)
CORNER = {"perplexity": 0.2, "benign_accuracy": 0.5, "facts": 0.5}
"""The taxes, and the tax of the corner that hypervolumes are measured from."""


def methods(stage: str, short: bool) -> dict[str, list[dict]]:
    """The grid of each method; its learning rate is chosen with the last entry but one."""
    few = FEW[stage]
    betas = few if short else BETAS[stage]

    def grid(name, *strengths):
        """Every strength at the first β, and the last strength at the second."""
        points = [(strength, few[0]) for strength in strengths] + [(strengths[-1], few[1])]
        return [{name: strength, BETA[stage]: beta} for strength, beta in (points[-2:] if short else points)]

    found = {
        "plain": [{BETA[stage]: beta} for beta in betas],
        "PTX": grid("ptx_coef", 0.25, 1.0),
        "EWC": grid("ewc_coef", 10.0, 100.0),
        "projection": grid("projection", "update"),
    }
    if stage == "ppo":
        targets = (2,) if short else (1, 2)
        control = {"max_kl": 1000, "kl_horizon": 64, "kl_coef": 0.3, "kl_control": "adaptive"}
        found["adaptive KL"] = [control | {"kl_target": target} for target in targets]
        control = {"kl_control": "budget", "kl_coef": 0.1}
        found["KL budget"] = [control | {"kl_budget": 1.5 * target} for target in targets]
    return found


def job(stage, folder, method, options, seed, rate) -> Run:
    told = QUIET[stage] | TEXTS | {"learning_rate": rate} | options | {"seed": seed}
    if stage == "ppo":
        told["value_learning_rate"] = 3 * rate
    words = "_".join(f"{name}={value}" for name, value in {**options, "lr": rate}.items())
    return Run(
        stage, told, folder / stage / method.replace(", ", "_").replace(" ", "_") / words / f"seed_{seed}" / "alpha_1"
    )


def interpolated(run: Run) -> list[Run]:
    return [Run(run.recipe, run.options, run.folder.with_name(f"alpha_{a}"), a) for a in ALPHAS]


def taxes(values, base) -> dict[str, float]:
    """{tax: how much worse than the SFT model}; negative is a gain."""
    worse = {name: float(base[name]) - float(values[name]) for name in CORNER}
    return worse | {"perplexity": float(values["perplexity"]) / float(base["perplexity"]) - 1}


def tune(stage, grids, folder, args) -> dict[str, float]:
    """The learning rate of each method: the best mean of gold reward minus all taxes, on the tuning seeds."""
    base, rates = base_values(args.rows, folder), {}
    plans = {
        (method, rate): [job(stage, folder / "tuning", method, grid[-2], seed, rate) for seed in args.tuning_seeds]
        for method, grid in grids.items()
        for rate in RATES[stage]
    }
    make_all([run for plan in plans.values() for run in plan], args.rows, args.workers)
    for method in grids:
        marks = {}
        for rate in RATES[stage]:
            found = [values_of(run) for run in plans[method, rate]]
            marks[rate] = np.mean([float(f["gold_reward"]) - sum(taxes(f, base).values()) for f in found])
        rates[method] = max(marks, key=marks.get)
        told = ", ".join(f"{rate:g}: {mark:.3f}" for rate, mark in marks.items())
        print(f"{stage}, {method}: learning rate {rates[method]:g} (gold reward minus taxes at {told})", flush=True)
    return rates


class Fronts:
    """The points of every method, [seeds, points, 2]: gold reward and minus a tax."""

    def __init__(self, found: dict[str, list[list[dict]]], base: dict, tax: str, equal: float):
        self.equal = equal
        self.start = (float(base["gold_reward"]), 0.0)
        self.corner = (self.start[0], -CORNER[tax])
        self.points = {
            method: np.array([[(float(v["gold_reward"]), -taxes(v, base)[tax]) for v in seed] for seed in runs])
            for method, runs in found.items()
        }

    def means(self, method, seeds) -> list[tuple]:
        return [self.start, *map(tuple, self.points[method][seeds].mean(0))]

    def equal_tax(self, method, seeds) -> float:
        from lifecycle_hf.evaluation.pareto import capability_at

        return -capability_at(self.means(method, seeds), self.equal)

    def volume(self, method, seeds) -> float:
        from lifecycle_hf.evaluation.pareto import hypervolume

        return hypervolume(self.means(method, seeds), self.corner)

    def draw(self, path, stage, tax, seeds):
        from matplotlib.figure import Figure

        from lifecycle_hf.evaluation.pareto import pareto_front

        figure = Figure(figsize=(7.2, 4.6), layout="constrained")
        axes = figure.subplots()
        for method in self.points:
            points = np.array(self.means(method, list(range(seeds))))
            front = points[pareto_front(points)]
            (line,) = axes.plot(*front.T, marker="o", markersize=3.5, linewidth=1.6, label=method)
            axes.plot(*points.T, ".", markersize=3, color=line.get_color(), alpha=0.4)
        axes.axvline(self.equal, color="grey", linewidth=0.8, linestyle=":")
        axes.set(
            xlabel="gold reward →", ylabel=f"−tax on {tax.replace('_', ' ')} →",
            title=f"{stage.upper()} in the toy world: fronts of the means of {seeds} seeds",
        )  # fmt: skip
        axes.legend(fontsize=8)
        figure.savefig(path, dpi=150)


def against_plain(of, method, runs) -> float:
    return of(method, runs) - of("plain", runs)


def report(stage, found, base, folder, equal) -> tuple[str, dict]:
    """The part of results.md about one stage, and its numbers."""
    from lifecycle_hf.evaluation.bootstrap import holm, jackknife

    seeds = len(next(iter(found.values())))
    fronts, rows, everyone = {tax: Fronts(found, base, tax, equal) for tax in CORNER}, {}, list(range(seeds))
    for tax, front in fronts.items():
        front.draw(folder / f"front_{stage}_{tax}.png", stage, tax, seeds)
        for measure, of in (("equal", front.equal_tax), ("volume", front.volume)):
            for method in found:
                own = jackknife(partial(of, method), seeds)
                change = jackknife(partial(against_plain, of, method), seeds)
                rows[tax, measure, method] = own, change
    compared = [key for key in rows if key[2] != "plain"]
    corrected = dict(zip(compared, holm([rows[key][1].p for key in compared]), strict=True))
    lines = [f"## {stage.upper()}, {seeds} seeds\n"]
    for measure, title in (("equal", f"Tax at gold reward {equal:.2f} ↓"), ("volume", "Hypervolume ↑")):
        lines += [f"{title}, and the difference to plain (95 % interval; p after Holm)\n"]
        lines += [f"| method | most gold reward | {' | '.join(t.replace('_', ' ') for t in CORNER)} |"]
        lines += ["|---|---:" + "|---:" * len(CORNER) + "|"]
        for method in found:
            best = max(point[0] for point in fronts["facts"].means(method, everyone))
            cells = [_cell(*rows[tax, measure, method], corrected.get((tax, measure, method))) for tax in CORNER]
            lines.append(f"| {method} | {best:.3f} | {' | '.join(cells)} |")
        lines.append("")
    numbers = {
        " / ".join(key): {"own": own, "change": change, "holm": corrected.get(key)}
        for key, (own, change) in rows.items()
    }
    return "\n".join(lines), numbers


def _cell(own, change, p) -> str:
    if not np.isfinite(own.estimate):
        return "not reached"
    text = f"{own.estimate:.3f}"
    if p is not None and not np.isfinite(change.low):
        text += " (no interval: not reached without some seed)"
    elif p is not None and np.isfinite(change.estimate):
        told = "p < .01" if p < 0.005 else f"p {p:.2f}"
        text += f" ({change.estimate:+.3f}: {change.low:+.3f} to {change.high:+.3f}; {told})"
    return text


def main(args):
    folder = Path(args.output_dir).resolve() / ("short" if args.short else "whole")
    texts, numbers = [], {}
    for stage in args.only:
        grids = methods(stage, args.short)
        rates = tune(stage, grids, folder, args) if args.tuning_seeds else dict.fromkeys(grids, RATES[stage][1])
        if args.tuning_seeds:
            grids["plain, other rate"] = [{BETA[stage]: beta} for beta in FEW[stage]]
            rates["plain, other rate"] = next(rate for rate in RATES[stage] if rate != rates["plain"])
        plan = {
            method: [
                [job(stage, folder, method, options, seed, rates[method]) for options in grid] for seed in args.seeds
            ]
            for method, grid in grids.items()
        }
        make_all([run for runs in plan.values() for seed in runs for run in seed], args.rows, args.workers)
        plan["interpolation"] = [
            [back for run in seed[: len(FEW[stage])] for back in interpolated(run)] for seed in plan["plain"]
        ]
        make_all([run for seed in plan["interpolation"] for run in seed], args.rows, args.workers)
        found = {method: [[values_of(run) for run in seed] for seed in runs] for method, runs in plan.items()}
        text, numbers[stage] = report(stage, found, base_values(args.rows, folder), folder, args.equal)
        rates = ", ".join(f"{method} {rate:g}" for method, rate in rates.items())
        chosen = f"chosen on the seeds {args.tuning_seeds}" if args.tuning_seeds else "the default's, not tuned"
        texts.append(f"{text}\nLearning rates ({chosen}): {rates}.\n")
        print(texts[-1], flush=True)
    (folder / "results.md").write_text("\n".join(texts))
    (folder / "results.json").write_text(json.dumps(numbers, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=("ppo", "dpo"), help="stages; PPO alone with --short")
    parser.add_argument("--short", action="store_true", help="two seeds and coarse grids")
    parser.add_argument("--seeds", type=int, nargs="+", help="reported seeds; 10 to 17 by default")
    parser.add_argument(
        "--tuning_seeds", type=int, nargs="+", help="seeds of the learning rates; 0 1 by default, none with --short"
    )
    parser.add_argument("--equal", type=float, default=0.9, help="gold reward at which taxes are compared")
    parser.add_argument("--rows", type=int, default=512, help="held-out requests per model")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--output_dir", default="output/benchmark_tax")
    prepare()
    args = parser.parse_args()
    args.only = args.only or (["ppo"] if args.short else ["ppo", "dpo"])
    args.seeds = args.seeds or ([10, 11] if args.short else list(range(10, 18)))
    args.tuning_seeds = args.tuning_seeds or ([] if args.short else [0, 1])
    if len(args.seeds) < 2:
        parser.error("--seeds: intervals need two seeds or more")
    main(args)
