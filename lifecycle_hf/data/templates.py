"""Templates: they make a prompt and a completion from the columns of a row. They are read from YAML."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from inspect import signature
from pathlib import Path

import yaml
from jinja2 import TemplateError, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lifecycle_hf.data.usable import refuse

OWN = Path(__file__).with_suffix(".yaml")
"""The library's own templates, by family. They name the columns `instruction`, `input` and `output`."""
_JINJA = ImmutableSandboxedEnvironment()
_FIELD = re.compile(r"\{([^\W\d]\w*)\}")
_FAULTS = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


@dataclass(frozen=True)
class Template:
    """Make a prompt and a completion from the columns of a row.

    A text that holds ``{{``, ``{%`` or ``{#`` is Jinja and runs in a sandbox. Every other text is in Python's format
    with plain names, such as ``{instruction}``. A text has one of the two formats, not both. A template fits a row if
    no column that it needs is empty in it. It needs all columns that it names, without those that an `if` of Jinja
    tests.

    Args:
        prompt: the text of the user's message.
        completion: the text of the assistant's message.
        inverted: the prompt shows the answer and asks for the question. No chain of thought is put before it.
        name: name for errors; by default the start of the prompt.

    Raises:
        ValueError: a text is not valid or empty.
    """

    prompt: str
    completion: str = "{output}"
    inverted: bool = False
    name: str | None = None

    def __post_init__(self):
        self._both(lambda text: refuse("" if text.strip() else "the text is empty") or _compiled(text))

    @property
    def label(self) -> str:
        """The name, or the start of the prompt."""
        return self.name or str(self.prompt)[:40]

    @cached_property
    def fields(self) -> frozenset[str]:
        """The names of all columns that the template reads."""
        return frozenset().union(*self._both(lambda text: _compiled(text)[1]))

    @cached_property
    def needs(self) -> frozenset[str]:
        """The names of the columns that must not be empty."""
        return frozenset().union(*self._both(lambda text: _compiled(text)[2]))

    def render(self, row: dict) -> tuple[str, str]:
        """Return the prompt and the completion of a row.

        Raises:
            ValueError: Jinja can't render the row.
        """
        return self._both(lambda text: _compiled(text)[0](row))

    def _both(self, function: Callable) -> tuple:
        """Return what `function` makes of the prompt and of the completion; its error names the template."""
        try:
            return function(self.prompt), function(self.completion)
        except _FAULTS as error:
            raise ValueError(f"template {self.label!r}: {error}") from error


@cache
def _compiled(text: str) -> tuple[Callable[[dict], str], set[str], set[str]]:
    """Return a function that renders a text, the names in the text, and those of them that no `if` tests."""
    if not re.search(r"\{[{%#]", text):
        braces, fields = set("{}").intersection(_FIELD.sub("", text)), set(_FIELD.findall(text))
        refuse("a brace that belongs to no field; write {name}, or Jinja for other braces" if braces else "")
        return text.format_map, fields, fields
    tree = _JINJA.parse(text)
    fields = meta.find_undeclared_variables(tree) - _JINJA.globals.keys()
    tests = [nodes.Not(node.test) for node in tree.find_all((nodes.If, nodes.CondExpr))]
    tested = {name.name for test in tests for name in test.find_all(nodes.Name)}
    return _JINJA.from_string(text).render, fields, fields - tested


def build(kind: Callable, options: dict, where: str):
    """Return ``kind(**options)``, for options from a file.

    Raises:
        ValueError: an option is unknown, missing or not valid. The message starts with `where`.
    """
    try:
        return kind(**options)
    except TypeError as error:
        raise ValueError(f"{where}: {error}. The options are {', '.join(signature(kind).parameters)}.") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def find_templates(
    given: Sequence[Template | dict | str] | str | Path | None, names: Sequence[str | None], where: str
) -> list[Template]:
    """Return the templates of a task.

    Args:
        given: templates, the options of templates, or prompts; or a YAML file that maps names, such as those of
            families, to such lists. None for the library's own file.
        names: the first one that is in the file is taken.

    Raises:
        ValueError: a template is not valid, or the given file has none of the names.
    """
    if given is None or isinstance(given, str | Path):
        path = OWN if given is None else Path(given)
        lists = yaml.safe_load(path.read_text(encoding="utf-8"))
        found = [lists[name] for name in names if name in lists] if isinstance(lists, dict) else []
        if not found and given is not None:
            wanted = " or ".join(filter(None, names))
            raise ValueError(f"{where}: {path} has templates for {list(lists or ())}, not for {wanted}.")
        given, where = found[0] if found else [], f"{where}, {path.name}"
    given = [{"prompt": item} if isinstance(item, str) else item for item in given]
    return [item if isinstance(item, Template) else build(Template, item, where) for item in given]
