"""Build the checkpoints that a stage starts from, once, with the recipes, and cache them on disk.

The key of a checkpoint depends on the sources and the YAML of its stage, the key of the stage before it and the
versions of the libraries. It does not depend on the options of the run that needs the checkpoint.
"""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock

from lifecycle_hf.toyworld.model import build_model, build_tokenizer
from lifecycle_hf.toyworld.t5 import build_t5

_ROOT = Path(__file__).resolve().parents[2]
_LIBRARIES = ("torch", "transformers", "trl", "tokenizers")
_WORLD = ("world.py", "dialogue.py", "model.py")
_BACKBONE = ("configuration_lifecycle.py", "modeling_lifecycle.py")
_DATA = ("gold.py", "data.py")
_FIRST = {"init": build_model, "t5": build_t5}
"""Stages that are random models, and what builds them."""
_PREVIOUS = {"init": None, "t5": None, "sft": "init", "reward": "sft"}
_TRAINERS = ("supervised/{stage}.py", "supervised/base.py", "base/trainer.py")
_LAUNCH_VARIABLES = ("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "NODE_RANK", "GROUP_", "ROLE_", "TORCHELASTIC_",
                     "ACCELERATE_", "FSDP_", "OMPI_", "PMI_", "PMIX_", "MPI_", "SLURM_")  # fmt: skip
_MARKER = ".complete"
_TAIL = 30


def cache_root() -> Path:
    """Return the folder of cached checkpoints.

    It is $LIFECYCLE_HF_CACHE, else $XDG_CACHE_HOME/lifecycle_hf, else ~/.cache/lifecycle_hf.
    """
    if os.environ.get("LIFECYCLE_HF_CACHE"):
        return Path(os.environ["LIFECYCLE_HF_CACHE"]).expanduser().resolve()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser().resolve() / "lifecycle_hf"


def build_once(folder: Path, build: Callable[[Path], None], *, message: str) -> Path:
    """Return `folder`; if it is not complete, fill it first by `build(temporary folder)`.

    If several processes call this function, one builds and the others wait. A rename at the end creates the whole
    folder at once. A folder without the marker file of a complete one is deleted and built again.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if (folder / _MARKER).exists():
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        print(message, flush=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
            made = Path(scratch) / folder.name
            made.mkdir()
            build(made)
            (made / _MARKER).touch()
            os.replace(made, folder)
    return folder


def stage_checkpoint(stage: str) -> Path:
    """Return the path of the checkpoint of a stage of the toy world, and build it first if it is missing.

    "init" is the tokenizer and a random model, "t5" the same with an encoder-decoder, "sft" the model of
    recipes/sft.py, and "reward" the reward model of recipes/reward.py. Each recipe runs with its default YAML, on the
    CPU, in a separate process.

    Raises:
        ValueError: the stage is unknown.
        FileNotFoundError: the folder of recipes is not next to the package.
        RuntimeError: a recipe failed; the message ends with the last lines of its output.
    """
    if stage not in _PREVIOUS:
        raise ValueError(f"toy world has no checkpoint of stage {stage!r}; choose one of {', '.join(_PREVIOUS)}")
    if _PREVIOUS[stage]:
        stage_checkpoint(_PREVIOUS[stage])
    folder = cache_root() / "toyworld" / _key(stage) / stage
    first = stage in _FIRST
    build = partial(_build_init, stage=stage) if first else lambda made: _run_recipe(stage, made)
    duration = "a second" if first else "a few minutes"
    return build_once(folder, build, message=f"toyworld: building stage {stage} ({duration}, cached in {folder})")


def write_init(folder: str | Path, stage: str = "init") -> None:
    """Write the tokenizer and the random model that the stages start from, or another of the random models."""
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    _FIRST[stage](tokenizer).save_pretrained(folder)


def _build_init(folder: Path, stage: str) -> None:
    code = f"from {__name__} import write_init; write_init('.', {stage!r})"
    _run(stage, [sys.executable, "-c", code], folder)


def _sources(stage: str) -> list[Path]:
    package = _ROOT / "lifecycle_hf"
    paths = [package / "toyworld" / name for name in (_WORLD if stage in _FIRST else _DATA)]
    if stage == "init":
        paths += [package / "models" / "lifecycle" / name for name in _BACKBONE]
    elif stage == "t5":
        paths.append(package / "toyworld" / "t5.py")
    else:
        paths += [package / "trainers" / name.format(stage=stage) for name in _TRAINERS]
        paths += [_ROOT / "recipes" / f"{stage}.py", _ROOT / "recipes" / "configs" / f"{stage}_toyworld.yaml"]
    return paths


def _key(stage: str) -> str:
    """Return 16 hexadecimal digits that depend on all that defines the stage and the stages before it."""
    previous = _PREVIOUS[stage]
    digest = hashlib.sha256((_key(previous) if previous else "").encode())
    for library in _LIBRARIES:
        digest.update(f"{library} {version(library)}\n".encode())
    for path in _sources(stage):
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing: the toy world's stages are built by the recipes of a source checkout; clone the "
                "repository and install it with `pip install -e .`, or name a model of your own"
            )
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _environment() -> dict[str, str]:
    """Return the environment of a single process: without launch variables, with this package first in the path."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(_LAUNCH_VARIABLES)}
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))}


def _run_recipe(stage: str, folder: Path) -> None:
    recipe = str(_ROOT / "recipes" / f"{stage}.py")
    _run(stage, [sys.executable, recipe, "--output_dir", str(folder), "--use_cpu", "true"], folder)


def _run(stage: str, command: list[str], folder: Path) -> None:
    """Run `command` outside any process group, in which transformers would save a model on the first process only."""
    done = subprocess.run(
        command, env=_environment(), cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode != 0:
        tail = "\n".join(done.stdout.splitlines()[-_TAIL:])
        raise RuntimeError(
            f"toyworld: stage {stage} failed with exit status {done.returncode}; run `{shlex.join(command)}` "
            f"to see it all. Its last lines:\n{tail}"
        )
