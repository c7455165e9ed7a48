"""The pages name what exists: modules and names that Python blocks import, files, and every page in the index."""

import ast
import importlib
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
ARCHITECTURE = REPOSITORY / "docs" / "architecture.md"
FOLDERS = ("recipes/", "tests/", "benchmarks/", "lifecycle_hf/", "accelerate_configs/", "notebooks/")


def imports(page):
    """(module, name or None) of every import of the package in the Python blocks of a page."""
    found = []
    for block in re.findall(r"```py(?:thon)?\n(.*?)```", page.read_text(), re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lifecycle_hf":
                found += [(node.module, alias.name) for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
                found += [(name, None) for name in names if name.split(".")[0] == "lifecycle_hf"]
    return found


def test_some_imports_are_found():
    assert len([found for page in PAGES for found in imports(page)]) > 5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_imports_of_a_page_exist(page):
    for module, name in imports(page):
        found = importlib.import_module(module)
        assert name is None or hasattr(found, name), f"{page.name}: {module} has no {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_of_a_page_exist(page):
    for name in set(re.findall(r"(?<![\w./])lifecycle_hf(?:\.[A-Za-z_]\w*)+", page.read_text())):
        parts = name.split(".")
        at = importlib.import_module(parts[0])
        for i, part in enumerate(parts[1:], 2):
            at = getattr(at, part) if hasattr(at, part) else importlib.import_module(".".join(parts[:i]))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_of_a_page_exist(page):
    for path in set(re.findall(r"(?<![\w/.-])(?:\w+/)+\w+\.(?:py|yaml|ipynb)\b", page.read_text())):
        if path.startswith(FOLDERS) and not Path(path).stem.isupper():  # NAME.yaml stands for any name
            assert (REPOSITORY / path).exists(), f"{page.name}: {path}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_exist(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_files_of_the_architecture_exist():
    paths = set(re.findall(r"(?:\w+/)+\w+\.py\b", ARCHITECTURE.read_text()))
    assert len(paths) > 20
    missing = [p for p in paths if not ((REPOSITORY / "lifecycle_hf" / p).exists() or (REPOSITORY / p).exists())]
    assert not missing


def test_index_links_every_page():
    index = REPOSITORY / "docs" / "index.md"
    linked = re.findall(r"\]\((\w+\.md)\)", index.read_text())
    assert sorted(linked) == sorted(page.name for page in index.parent.glob("*.md") if page != index)


def test_objectives_are_exported():
    from lifecycle_hf.objectives import (
        bradley_terry_loss,
        dpo_loss,
        generalized_advantage_estimate,
        ipo_loss,
        kto_loss,
        orpo_loss,
        ppo_policy_loss,
        ppo_value_loss,
    )

    losses = [bradley_terry_loss, dpo_loss, ipo_loss, kto_loss, orpo_loss, ppo_policy_loss, ppo_value_loss]
    assert all(map(callable, [*losses, generalized_advantage_estimate]))
