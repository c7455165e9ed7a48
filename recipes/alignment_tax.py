"""Measure what alignment cost: compare checkpoints with the one that they came from.

The embedded default compares the toy world's SFT model with the one that `python recipes/ppo.py` trained from it:
    python recipes/alignment_tax.py
    python recipes/alignment_tax.py toyworld output/ppo output/dpo
Your own models, by local or Hub names, full checkpoints or PEFT adapters:
    python recipes/alignment_tax.py BASE ALIGNED ALIGNED2 --output_dir output/tax
        --capability perplexity:TEXTS.jsonl:text multiple_choice:QUESTIONS.jsonl lm_eval:arc_easy
        --alignment REWARD_MODEL MODULE:FUNCTION diversity drift --prompts PROMPTS
Measure models between BASE and ALIGNED as well:
    python recipes/alignment_tax.py BASE ALIGNED --interpolate 0.2 0.4 0.6 0.8 ...
"""

import argparse
import sys
from pathlib import Path

from lifecycle_hf import cli
from lifecycle_hf.evaluation import Evaluation, measure_tax
from lifecycle_hf.mitigation.interpolation import interpolate

DEFAULT_ALIGNED = "output/ppo"
CAPABILITY = (
    "perplexity:DATA[:COLUMN], multiple_choice:DATA, exact_match:DATA[:COLUMN], with DATA a local file, folder or "
    "dataset of the Hub; lm_eval:TASK or lm_eval:FILE.yaml; `toyworld`"
)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", default="toyworld", help="model before; `toyworld`: its SFT model")
    parser.add_argument("aligned", nargs="*", help=f"models after; for the toy world {DEFAULT_ALIGNED} by default")
    parser.add_argument(
        "--interpolate", nargs="+", type=float, default=[], metavar="ALPHA",
        help="also write BASE + ALPHA·(ALIGNED − BASE) to --output_dir, and measure it"
    )  # fmt: skip
    parser.add_argument("--capability", nargs="+", metavar="KIND:DATA", help=CAPABILITY)
    parser.add_argument(
        "--alignment", nargs="+", metavar="REWARD", help="reward models, MODULE:FUNCTION, `diversity`, `drift`"
    )
    parser.add_argument("--prompts", help="data whose prompts the models answer for --alignment")
    parser.add_argument("--rows", type=int, default=128, help="first rows of the data of each metric (128)")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="most tokens of an answer (64)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of sampling, for --alignment (1)")
    parser.add_argument("--batch_size", type=int, default=8, help="rows per forward pass (8)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (0)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), help="float32 by default")
    parser.add_argument("--output_dir", default="output/alignment_tax", help="folder of reports and pictures")
    args = parser.parse_args(argv)
    if args.base == "toyworld":
        args.capability = args.capability or ["toyworld"]
        args.alignment = args.alignment or ["toyworld", "diversity", "drift"]
        args.prompts = args.prompts or "toyworld"
        if not args.aligned and Path(DEFAULT_ALIGNED, "config.json").exists():
            args.aligned = [DEFAULT_ALIGNED]
    if not args.aligned:
        first = f"run `python recipes/ppo.py`, which writes the default {DEFAULT_ALIGNED}, or name a model."
        parser.error(f"no ALIGNED model given: {first if args.base == 'toyworld' else 'name one made from BASE.'}")
    if not (args.capability or args.alignment):
        parser.error("nothing to measure: give --capability or --alignment.")
    return args


def main(args):
    own = ("base", "aligned", "interpolate", "output_dir")
    asked = {name: value for name, value in vars(args).items() if name not in own}
    alignment = [cli.resolve_model(name, "reward") for name in args.alignment or []]
    evaluation = Evaluation(**asked | {"capability": args.capability or [], "alignment": alignment})
    base, aligned = cli.resolve_model(args.base, "sft"), list(args.aligned)
    for name in args.aligned:
        for alpha in args.interpolate:
            made = Path(args.output_dir, f"{Path(name).name}_alpha_{alpha:g}")
            aligned.append(str(interpolate(base, name, alpha, made)))
    reports = measure_tax(evaluation, base, aligned, args.output_dir)
    for label, report in reports.items():
        print(report.to_terminal(title=f"Alignment tax of {label}"))
    print(f"report.md, report.json and pictures are in {args.output_dir}")


if __name__ == "__main__":
    try:
        main(parse())
    except (ValueError, OSError) as error:
        sys.exit(f"alignment_tax.py: {error}")
