"""Read the docstrings of this project for the documentation's API pages.

Where numpydoc has ``name : type``, they have ``name : what it is``, because the type stands in the
signature; and what a function returns is a sentence. Without this the pages would show sentences as
types.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Class, Extension, Function, Module, Object

_SECTION = re.compile(
    r"^(Parameters|Attributes|Returns|Yields)\n-+\n((?:(?!^\S.*\n-+\n).*\n?)*)", re.M
)
_ITEM = re.compile(r"^(\S[^:\n]*?) : (.+)$", re.MULTILINE)


class Docstrings(Extension):
    """Rewrites every docstring before it is parsed."""

    def on_class_instance(self, *, cls: Class, **_: Any) -> None:
        """Rewrite the docstring of a class."""
        _rewrite(cls)

    def on_function_instance(self, *, func: Function, **_: Any) -> None:
        """Rewrite the docstring of a function."""
        _rewrite(func)

    def on_module_instance(self, *, mod: Module, **_: Any) -> None:
        """Rewrite the docstring of a module."""
        _rewrite(mod)


def restate(text: str) -> str:
    """Put descriptions where numpydoc looks for them; returned values become a paragraph."""

    def section(found: re.Match[str]) -> str:
        name, body = found.groups()
        if name in ("Parameters", "Attributes"):
            return f"{name}\n{'-' * len(name)}\n" + _ITEM.sub(r"\1\n    \2", body)
        return f"**{name}**\n\n{body}"

    return _SECTION.sub(section, text)


def _rewrite(item: Object) -> None:
    if item.docstring is not None:
        item.docstring.value = restate(item.docstring.value)
