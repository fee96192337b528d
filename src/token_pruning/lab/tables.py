"""Tables in Markdown."""

import html
import re
from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, without a line break at its end.

    Args:
        header: one cell for each column.
        rows: cells as Markdown; what is not ours to format goes through :func:`escape` first.
    """
    return "\n".join([_line(header), _line(["---"] * len(header)), *map(_line, rows)])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def escape(text: str) -> str:
    """Text that Markdown shows as it is, in a table's cell too."""
    text = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*|~$]|_(?![A-Za-z0-9])|(?<![A-Za-z0-9])_)", r"\\\1", text)
