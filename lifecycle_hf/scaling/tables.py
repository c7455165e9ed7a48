"""Tables in Markdown, or drawn for a terminal."""

import sys
from io import StringIO


def markdown_table(headings: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown, its first column to the left and the others to the right."""
    lines = [f"| {' | '.join(cells)} |" for cells in [headings, *rows]]
    return "\n".join([lines[0], "|---" + "|---:" * (len(headings) - 1) + "|", *lines[1:]])


def terminal_table(headings: list[str], rows: list[list[str]], *, left=(), width: int = 118, **options) -> str:
    """Return a table drawn by rich, coloured when standard output is a terminal.

    Args:
        left: headings, beside the first, whose columns stand to the left.
        options: of `rich.table.Table`, such as `title` and `caption`.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title_style="bold", **options)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in (headings[0], *left) else "right")
    for row in rows:
        table.add_row(*row)
    text = StringIO()
    Console(file=text, force_terminal=sys.stdout.isatty(), width=width, highlight=False).print(table)
    return text.getvalue().rstrip()
