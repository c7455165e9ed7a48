"""Rules about the source itself, read from the AST: import direction, sizes, and what must not stand in it."""

import ast
import inspect
import textwrap
from functools import cache
from pathlib import Path

import pytest
import trl
import yaml
from transformers import Trainer

import lifecycle_hf
from lifecycle_hf import PPOTrainer

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "lifecycle_hf"
RECIPES = REPOSITORY / "recipes"
SOURCES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted(RECIPES.glob("*.py"))
CONFIGS = sorted([*(REPOSITORY / "accelerate_configs").glob("*.yaml"), *RECIPES.rglob("*.yaml")])

# A file imports only from its own floor or from floors below.
FLOORS = (
    {"objectives", "data"},
    {"models"},
    {"completions", "scaling"},
    {"evaluation", "mitigation", "curation", "synthesis"},
    {"trainers", "alignment_tax"},
    {"cli", "toyworld"},
    {"recipes"},
)
FLOOR_OF = {name: number for number, names in enumerate(FLOORS, 1) for name in names}
MOST_LINES = {"file": 450, "function": 60, "class": 250, "recipe": 100, "package": 16_750}
OVERRIDES = {
    "trainers/base/checkpoints.py": {
        "_get_output_dir", "_load_best_model", "_load_from_checkpoint", "_load_optimizer_and_scheduler",
        "_push_from_checkpoint", "_save", "_save_checkpoint",
    },
    "trainers/policy/ppo.py": {"_get_grad_norm"},
}  # fmt: skip
"""Underscore methods of transformers' Trainer that the package overrides, by file. There were 12 in 4 files."""


def relative(path):
    return str(path.relative_to(REPOSITORY))


@cache
def tree(path):
    return ast.parse(path.read_text(), filename=str(path))


def lines(path):
    return len(path.read_text().splitlines())


def part(path):
    """The folder that a file belongs to: `models` of lifecycle_hf/models/heads.py."""
    return "recipes" if path.parent == RECIPES else path.relative_to(PACKAGE).parts[0]


def imported(path):
    """(dotted name below lifecycle_hf, line) of all that a file imports: `models.heads` for `from lifecycle_hf.models
    import heads`."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(["lifecycle_hf", *path.relative_to(PACKAGE).parts][: -node.level]) if node.level else ""
            names = [".".join(filter(None, (base, node.module, alias.name))) for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "lifecycle_hf" and rest.partition(".")[0] in FLOOR_OF:
                yield rest, node.lineno


def test_nothing_but_init_stands_at_the_root():
    assert [path.name for path in PACKAGE.glob("*.py")] == ["__init__.py"]


@pytest.mark.parametrize("path", [path for path in SOURCES if path.parent != PACKAGE] + SCRIPTS, ids=relative)
def test_imports_run_downward(path):
    assert part(path) in FLOOR_OF, f"{relative(path)} stands on no floor of DESIGN"
    for name, line in imported(path):
        floor = FLOOR_OF[name.partition(".")[0]]
        assert floor <= FLOOR_OF[part(path)], f"{relative(path)}:{line} imports {name} from a floor above"


@pytest.mark.parametrize("path", [path for path in SOURCES if part(path) == "trainers"], ids=relative)
def test_kinds_of_trainers_share_the_base_alone(path):
    for name, line in imported(path):
        if name.startswith("trainers.") and path.parent.name != "trainers":
            assert name.split(".")[1] in ("base", path.parent.name), f"{relative(path)}:{line} imports {name}"


@pytest.mark.parametrize("path", SOURCES + SCRIPTS, ids=relative)
def test_files_classes_and_functions_are_short(path):
    assert lines(path) <= MOST_LINES["recipe" if path in SCRIPTS else "file"]
    for node in ast.walk(tree(path)):
        kinds = {ast.FunctionDef: "function", ast.AsyncFunctionDef: "function", ast.ClassDef: "class"}
        if type(node) in kinds:
            length, most = node.end_lineno - node.lineno + 1, MOST_LINES[kinds[type(node)]]
            assert length <= most, f"{relative(path)}:{node.lineno} {node.name} has {length} lines"


def code_lines(path):
    """Lines that hold code: docstrings, which the conventions want long, comments and blank lines left out."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    spans = [
        node.body[0]
        for node in ast.walk(tree(path))
        if isinstance(node, documented) and node.body and ast.get_docstring(node, clean=False) is not None
    ]
    docstrings = {number for span in spans for number in range(span.lineno, span.end_lineno + 1)}
    text = enumerate(path.read_text().splitlines(), start=1)
    return sum(bool(line.strip()) and not line.strip().startswith("#") and n not in docstrings for n, line in text)


def test_package_is_small():
    assert sum(map(code_lines, SOURCES)) <= MOST_LINES["package"]


def calls(path):
    return [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", SOURCES + SCRIPTS, ids=relative)
def test_nothing_unsafe_or_unstable(path):
    assert "trl.experimental" not in path.read_text()
    for call in calls(path):
        place, keywords = f"{relative(path)}:{call.lineno}", {item.arg: item.value for item in call.keywords}
        if ast.unparse(call.func) == "torch.load":
            assert ast.unparse(keywords.get("weights_only", ast.Constant(None))) == "True", (
                f"{place}: weights_only=True"
            )
        assert ast.unparse(call.func) not in ("pickle.load", "pickle.loads"), f"{place}: no pickle"
        trusted = keywords.get("trust_remote_code", ast.Constant(False))
        assert ast.unparse(trusted) != "True", f"{place}: remote code is trusted only when the user asks"


@cache
def private_names_of(owner):
    """Private names that the source of a class defines: methods, class attributes, attributes of `self`."""
    names = set()
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(owner)))):
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            names.add(node.attr)
        elif isinstance(node, ast.ClassDef):
            assigned = [target for item in node.body for target in targets(item)]
            names |= {target.id for target in assigned if isinstance(target, ast.Name)}
    return {name for name in names if name.startswith("_") and not name.endswith("__")}


def targets(statement):
    if isinstance(statement, ast.Assign):
        return statement.targets
    return [statement.target] if isinstance(statement, ast.AnnAssign) else []


def overrides(trainer, package="lifecycle_hf"):
    """Private names of TRL, transformers' own left out, that the classes of `package` among the bases define too."""
    names_of = {package: set(), "trl": set()}
    for base in trainer.__mro__:
        root = base.__module__.partition(".")[0]
        if root in names_of:
            names_of[root] |= private_names_of(base)
    return sorted(names_of[package] & names_of["trl"] - private_names_of(Trainer))


def test_no_private_name_of_trl_is_overridden():
    public = [getattr(lifecycle_hf, name) for name in lifecycle_hf.__all__]
    for trainer in [item for item in public if inspect.isclass(item) and issubclass(item, Trainer)]:
        assert overrides(trainer) == [], f"{trainer.__name__} overrides private names of TRL"


def test_an_override_would_be_found():
    class Careless(trl.SFTTrainer):
        _tag_names = ["mine"]

        def train(self):
            self._metrics = {}

        def _prepare_dataset(self):
            pass

    assert overrides(Careless, package=__name__.partition(".")[0]) == ["_metrics", "_prepare_dataset", "_tag_names"]


def underscore_overrides(path):
    """Methods in a file's trainers and mixins whose names transformers' Trainer has with an underscore."""
    theirs = {name for name in vars(Trainer) if name.startswith("_") and not name.endswith("__")}
    classes = [node for node in ast.walk(tree(path)) if isinstance(node, ast.ClassDef)]
    classes = [node for node in classes if node.name.endswith(("Trainer", "Mixin"))]
    return {item.name for node in classes for item in node.body if isinstance(item, ast.FunctionDef)} & theirs


def test_underscore_methods_are_overridden_in_two_files_alone():
    found = {str(path.relative_to(PACKAGE)): underscore_overrides(path) for path in SOURCES}
    assert {file: names for file, names in found.items() if names} == OVERRIDES


@pytest.mark.parametrize("name", sorted(set().union(*OVERRIDES.values())))
def test_transformers_still_has_and_calls_what_is_overridden(name):
    assert name in vars(Trainer), f"transformers' Trainer has no {name} any more: see {OVERRIDES}"
    for mine in [cls for cls in PPOTrainer.__mro__ if name in vars(cls) and cls.__module__.startswith("lifecycle_hf")]:
        theirs, ours = (list(inspect.signature(vars(cls)[name]).parameters) for cls in (Trainer, mine))
        assert ours == theirs, f"transformers' {name} takes {theirs}, {mine.__name__}'s takes {ours}"
    assert f"self.{name}(" in inspect.getsource(Trainer), f"transformers' Trainer does not call {name} any more"


@pytest.mark.parametrize("path", CONFIGS, ids=relative)
def test_configurations_parse(path):
    options = yaml.safe_load(path.read_text())
    assert isinstance(options, dict) and options


def test_public_names_are_all_there():
    for name in lifecycle_hf.__all__:
        assert getattr(lifecycle_hf, name) is not None
    assert set(dir(lifecycle_hf)) == set(lifecycle_hf.__all__)
    with pytest.raises(AttributeError, match="no attribute 'PPPTrainer'"):
        _ = lifecycle_hf.PPPTrainer
