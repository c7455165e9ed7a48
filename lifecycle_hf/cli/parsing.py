"""Read the options of recipes from a YAML file and the command line; refuse unknown ones with a hint."""

import difflib
import os
import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from dataclasses import MISSING, fields
from inspect import get_annotations
from pathlib import Path
from typing import get_args

import torch
import yaml
from trl import TrlParser

from lifecycle_hf.trainers.base.idle import RECIPE_RULES, RULES, idle_options

STRATEGIES = {f"{name}_steps": (f"{name}_strategy", "steps") for name in ("save", "eval", "logging")}
OVERRULES = STRATEGIES | {
    "num_train_epochs": ("max_steps", -1),
    "gradient_checkpointing": ("activation_checkpointing", None),
    "gradient_checkpointing_kwargs": ("activation_checkpointing_kwargs", None),
}
"""{option: (option that would take its effect away, value with which it does not)}."""
EPILOG = "A boolean that is true by default is turned off by --no_NAME or --NAME false."


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=36, width=min(int(os.environ.get("COLUMNS", 110)), 119))


class _RecipeParser(TrlParser):
    """Parse as TrlParser does, with one section of help per class of options and errors of one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists every option)\n")

    def format_help(self):
        formatter = _HelpFormatter(self.prog)
        formatter.add_usage("%(prog)s [--config FILE.yaml] [--OPTION VALUE ...]", [], [])
        formatter.add_text(self.description)
        for owner, actions in self._sections().items():
            formatter.start_section(f"{owner.__name__} ({owner.__module__.partition('.')[0]})")
            formatter.add_arguments(actions)
            formatter.end_section()
        formatter.add_text(EPILOG)
        return formatter.format_help()

    def _sections(self):
        """{class that declares them: its options}, with the long list of transformers.TrainingArguments last."""
        action_of = {}
        for action in self._actions:
            action_of.setdefault(action.dest, action)
        sections = {}
        for dataclass_type in self.dataclass_types:
            for item in (item for item in fields(dataclass_type) if item.init):
                action = action_of[item.name]
                action.option_strings, action.metavar = action.option_strings[:1], _metavar(action, item.type)
                owner = next(c for c in dataclass_type.__mro__ if item.name in get_annotations(c))
                sections.setdefault(owner, []).append(action)
        return dict(sorted(sections.items(), key=lambda pair: pair[0].__module__.startswith("transformers")))


def _metavar(action, kind):
    if action.choices:
        joined = "{" + ",".join(map(str, action.choices)) + "}"
        return joined if len(joined) < 50 else "CHOICE"
    kind = get_args(kind)[0] if get_args(kind) else kind
    return kind.__name__.upper() if kind in (bool, dict, float, int, str) else "VALUE"


def parse(dataclasses, default_config, argv=None, description=None):
    """Read options from a YAML file and the command line, the latter overriding the former.

    Args:
        dataclasses: the classes to fill, as for `trl.TrlParser`.
        default_config: YAML used when `argv` names no `--config FILE`.
        argv: the arguments; those of the process by default.
        description: first lines of `--help`.

    Returns the filled classes in the same order. An unknown option, in the file or on the command line, ends the
    process with exit status 2 and a line that names the closest known one. So does an option that has no effect under
    the others. An option of the command line is given its effect where the file alone takes it away (`save_steps` sets
    `save_strategy`), and takes away that of the file (`save_strategy` that of `save_steps`).
    """
    parser = _RecipeParser(
        dataclasses, prog=os.path.basename(sys.argv[0]), description=description, allow_abbrev=False
    )
    for action in parser._actions:
        if action.dest == "resume_from_checkpoint":
            action.nargs, action.const = "?", "true"
    config_path, rest = _take_config(parser, list(sys.argv[1:] if argv is None else argv), default_config)
    config = _read_config(parser, config_path)
    if not torch.accelerator.is_available():
        # Without it, two processes on the CPU each believe that they are alone.
        parser.set_defaults_with_config(use_cpu=True)
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns, where it is installed, that it found none
    known = [item.name for dataclass_type in dataclasses for item in fields(dataclass_type) if item.init]
    for key in config.keys() - {*known, "env"}:
        parser.error(f"unknown option {key!r} in {config_path}{_did_you_mean(key, known)}")
    parser.set_defaults_with_config(**{key: value for key, value in config.items() if key != "env"})
    for action in parser._actions:
        if action.choices and action.dest in config and config[action.dest] not in (None, *action.choices):
            options = ", ".join(map(str, action.choices))
            parser.error(f"{action.dest}: {config[action.dest]!r} in {config_path} is none of {options}")
    namespace, unknown = parser.parse_known_args(rest)
    if unknown:
        name = next((word for word in unknown if word.startswith("--")), None)
        if name is None:
            parser.error(f"unexpected argument {unknown[0]!r}; options start with --")
        parser.error(f"unknown option {name}{_did_you_mean(name, known, prefix='--')}")
    _settle(parser, namespace, config, rest)
    os.environ.update({name: str(value) for name, value in config.get("env", {}).items()})
    return parser.parse_args_into_dataclasses(args=rest)


def _settle(parser, namespace, config, argv):
    """Give each option that was set its effect, or end the process with a line that says why it has none."""
    name_of = {string: action.dest for action in parser._actions for string in action.option_strings}
    typed = {name_of[word.partition("=")[0]] for word in argv if word.partition("=")[0] in name_of}

    def rank(name):
        return 2 if name in typed else int(name in config)

    for name, (other, value) in OVERRULES.items():
        if hasattr(namespace, other) and rank(name) > rank(other):
            parser.set_defaults_with_config(**{other: value})
            setattr(namespace, other, value)
    defaults = {item.name: item for kind in parser.dataclass_types for item in fields(kind) if item.init}
    for name, rule, message in idle_options(namespace, {*config, *typed} - {"env"}, (*RULES, *RECIPE_RULES)):
        if rank(name) == 2 or rank(rule.decided_by) < 2:
            parser.error(message)
        item = defaults[name]
        parser.set_defaults_with_config(
            **{name: item.default if item.default_factory is MISSING else item.default_factory()}
        )


def _take_config(parser, argv, default_config):
    """(path of the YAML file, the other arguments); both `--config FILE` and `--config=FILE` are understood."""
    for index, word in enumerate(argv):
        if word.startswith("--config="):
            return Path(word.removeprefix("--config=")), argv[:index] + argv[index + 1 :]
        if word == "--config":
            if index + 1 == len(argv):
                parser.error("--config needs the path of a YAML file")
            return Path(argv[index + 1]), argv[:index] + argv[index + 2 :]
    return Path(default_config), argv


def _read_config(parser, path):
    try:
        config = yaml.safe_load(path.read_text())
    except OSError as error:
        parser.error(f"--config {path}: {error.strerror or error}")
    except yaml.YAMLError as error:
        parser.error(f"--config {path} is not valid YAML: {' '.join(str(error).split())}")
    if not isinstance(config, dict):
        parser.error(f"--config {path} must hold `option: value` lines")
    return config


def _did_you_mean(name, known, prefix=""):
    name = name.lstrip("-").partition("=")[0].replace("-", "_")
    longer = [option for option in known if option.startswith(name + "_")][:3]
    close = longer or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {' or '.join(prefix + option for option in close)}?" if close else ""
