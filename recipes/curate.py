"""Make a clean corpus of a crawl: filter URLs and documents, replace personal data, remove duplicates.

The embedded default is a small crawl of Python's documentation with planted faults, and takes about a minute on a CPU:
    python recipes/curate.py
Your own files, with trusted text for the classifier of quality; the same command again goes on where it was stopped:
    python recipes/curate.py CRAWL --output_dir output/mine --trusted_dataset ARTICLES --workers 8
    python recipes/curate.py CRAWL --output_dir output/mine --steps url rules pii minhash substring
Then pretrain on it:
    python recipes/pretrain.py --dataset_name output/mine
"""

import sys
from pathlib import Path

from lifecycle_hf import cli
from lifecycle_hf.cli.curating import CurationArguments, curate_and_report

if __name__ == "__main__":
    default = Path(__file__).parent / "configs" / "curate_python.yaml"
    if sys.argv[1:] and not sys.argv[1].startswith("--"):
        sys.argv.insert(1, "--dataset_name")
    curate_and_report(*cli.parse((CurationArguments,), default, description=__doc__))
