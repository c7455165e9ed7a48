"""The notebook's code runs, with a few steps and items. `make test-all` runs all of it as it stands."""

import json

import pytest
from launching import REPOSITORY

SHORTER = {"max_steps=80": "max_steps=2", "n=128": "n=16", "range(64)": "range(16)"}


def test_the_code_of_the_notebook_runs(quick_stages, capsys):
    cells = json.loads((REPOSITORY / "notebooks" / "alignment_tax.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    for long, short in SHORTER.items():
        assert long in code
        code = code.replace(long, short)
    names = {}
    exec(code, names)
    assert "On the front: " in capsys.readouterr().out
    assert names["runs"].keys() == {"SFT", "plain PPO", "PTX", "projection"} | {
        f"interpolation, α = {alpha}" for alpha in (0.4, 0.7)
    }
    for picture in ("overoptimization", "pareto", "before", "after plain PPO"):
        assert (names["folder"] / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    assert names["plain"].before["perplexity"] == pytest.approx(names["runs"]["SFT"]["perplexity"])
