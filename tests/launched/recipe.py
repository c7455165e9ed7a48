"""Run a recipe as its command line does. Arguments: its name and its options."""

import runpy
import sys
from pathlib import Path

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def main(name, *options):
    sys.argv = [str(RECIPES / name), *options]
    runpy.run_path(sys.argv[0], run_name="__main__")
