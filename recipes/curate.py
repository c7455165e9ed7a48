"""Make a corpus of a crawl: filter URLs, apply rules, replace personal data, and remove near and exact duplicates.

The embedded crawl, Python's documentation with planted faults, takes about a minute:
    python recipes/curate.py
Your own crawl (JSON lines, CSV, Parquet, WARC, WET or text, also .gz and .zst); a killed run goes on:
    python recipes/curate.py CRAWL --output_dir output/mine --workers 8 --tasks 64
With a classifier of quality, and a reference model that recipes/pretrain.py trained:
    python recipes/curate.py CRAWL --output_dir output/mine --steps url rules pii quality perplexity minhash substring
        --trusted BOOKS --reference_model output/reference
Then pretrain on it:
    python recipes/pretrain.py --dataset_name output/mine
"""

import sys
from pathlib import Path

from lifecycle_hf import cli
from lifecycle_hf.cli.curating import CurateArguments, curate_and_report

if __name__ == "__main__":
    default = Path(__file__).parent / "configs" / "curate_python.yaml"
    argv = sys.argv[1:]
    if argv and not argv[0].startswith("-"):
        argv = ["--source", *argv]
    (args,) = cli.parse((CurateArguments,), default, argv, description=__doc__)
    curate_and_report(args)
