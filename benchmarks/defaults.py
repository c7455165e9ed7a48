"""What each embedded default does, over seeds that no tuning saw.

    python benchmarks/defaults.py                                  # all, seeds 5 to 14: 50 runs
    python benchmarks/defaults.py --only ppo dpo --seeds 5 6
    python benchmarks/defaults.py --only ppo --seeds 0 1 2 --options "--kl_coef 0.1 --ptx_coef 0" --name tuned

Every run is the recipe with its default YAML and a seed, and takes one to three CPU minutes. Its model answers 512
held-out requests of the toy world. A run that stands in --output_dir is kept. The printed tables are Markdown;
docs/ppo.md and docs/preference.md hold them. Runs part by the rounding of the CPU, whose name is printed.
"""

import argparse
import os
import shlex
from pathlib import Path

from measuring import prepare
from toyworld_runs import METRICS, Run, base_values, make_all, spread, values_of

DEFAULTS = {
    "ppo": ("ppo", {"log_completions": "false", "measure_updates": 0}),
    "rloo": ("rloo", {"log_completions": "false", "measure_updates": 0}),
    "grpo": ("grpo", {"log_completions": "false", "measure_updates": 0}),
    "online_dpo": ("online_dpo", {"measure_rows": 8, "log_completions": "false"}),
    "spin": ("spin", {"measure_rows": 8, "log_completions": "false"}),
    "dpo": ("dpo", {"measure_rows": 8}),
    "ipo": ("dpo", {"objective": "ipo", "measure_rows": 8}),
    "orpo": ("dpo", {"objective": "orpo", "measure_rows": 8}),
    "kto": ("kto", {"measure_rows": 8}),
}
"""The recipe of each default, and options that only switch off what is printed and measured on the way."""


def cpu() -> str:
    """The name of this machine's CPU, and whether it has AVX-512."""
    lines = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    lines = {name.strip(): value for name, value in lines.items()}
    wide = "with" if "avx512f" in lines.get("flags", "") else "without"
    return f"{lines.get('model name', 'unknown').strip()} {wide} AVX-512"


def main(args):
    words = shlex.split(args.options)
    extra = dict(zip((word.removeprefix("--") for word in words[::2]), words[1::2], strict=True))
    folder = Path(args.output_dir).resolve() / args.name
    runs = {
        name: [Run(recipe, options | extra | {"seed": seed}, folder / name / f"seed_{seed}") for seed in args.seeds]
        for name, (recipe, options) in DEFAULTS.items()
        if name in args.only
    }
    make_all([run for kind in runs.values() for run in kind], args.rows, args.workers)
    base = base_values(args.rows, folder.parent)
    print(f"\n{args.rows} requests per model, on {cpu()}.\n")
    print(f"| run | {' | '.join(METRICS)} |\n|---{'|---:' * len(METRICS)}|")
    print(f"| SFT model | {' | '.join(f'{float(base[name]):.3f}' for name in METRICS)} |")
    for name, kind in runs.items():
        found = [values_of(run) for run in kind]
        print(f"| {name}, {len(found)} seeds | {' | '.join(spread([f[m] for f in found]) for m in METRICS)} |")
        for run, values in zip(kind, found, strict=True):
            print(f"| {name}, {run.folder.name} | {' | '.join(f'{float(values[m]):.3f}' for m in METRICS)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=DEFAULTS, default=list(DEFAULTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5, 15)))
    parser.add_argument("--rows", type=int, default=512, help="held-out requests per model")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--options", default="", help="further options of every run, to try other defaults")
    parser.add_argument("--name", default="default", help="name of these options: a folder in --output_dir")
    parser.add_argument("--output_dir", default="output/benchmark_defaults")
    prepare()
    main(parser.parse_args())
