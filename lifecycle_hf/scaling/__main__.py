"""Fit a scaling law to runs of one's own, and print the best use of compute."""

import argparse

from lifecycle_hf.scaling.fit import fit_scaling_law
from lifecycle_hf.scaling.points import read_points, tell


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m lifecycle_hf.scaling", description=__doc__)
    parser.add_argument("points", help=".csv or .jsonl: parameters, tokens and loss (nats per token) of each run.")
    parser.add_argument("--budget", type=float, nargs="+", help="FLOPs to spend best; by default those of the runs.")
    parser.add_argument("--bootstrap", type=int, default=1000, help="Resamples behind the intervals.")
    parser.add_argument("--seed", type=int, default=0, help="Of the resamples.")
    parser.add_argument("--picture", metavar="FILE.png", help="Draw loss at equal compute, and the optimum.")
    parser.add_argument("--json", metavar="FILE.json", help="Keep the law, for ScalingLaw.from_json.")
    parser.add_argument("--markdown", action="store_true", help="Print the tables in Markdown.")
    options = parser.parse_args(arguments)
    try:
        points = read_points(options.points)
        law = fit_scaling_law(*points, bootstrap=options.bootstrap, seed=options.seed)
        tell(law, points, options.budget, options.picture, options.json, markdown=options.markdown)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
