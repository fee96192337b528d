"""Docstrings name things as ``:func:`x```, which Markdown does not know: they become links, or code."""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|meth|attr|mod):`~?([\w.]+)`")


class Roles(griffe.Extension):
    """Rewrites the docstring of every object that is loaded."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """See griffe."""
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(_written, obj.docstring.value)


def _written(role: re.Match[str]) -> str:
    name = role[1]
    public = re.fullmatch(r"token_pruning\.\w+", name)
    return f"[`{name.removeprefix('token_pruning.')}`][{name}]" if public else f"`{name}`"
