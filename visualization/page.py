"""A page in one file: style, script and pictures inside, nothing loaded from anywhere."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping
from html import escape
from importlib import resources
from typing import Any

#: The icon is said to be empty, or a browser would ask a server for one.
_NO_ICON = '<link rel="icon" href="data:,">'


def page(title: str, body: str, *, script: bool = False) -> str:
    """Return a whole HTML document.

    What the page may do is written into it: it loads nothing but a video file beside it, and runs
    no script but ours, even if something of a question or a path should slip through.

    Parameters
    ----------
    title : plain text.
    body : HTML, escaped where it holds anyone else's words.
    script : whether buttons with ``data-at`` play a ``<video>`` of the body.
    """
    style = _asset("page.css")
    code = _asset("page.js") if script else ""
    allowed = "'none'"
    if script:
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        allowed = f"'sha256-{digest}'"
    policy = (
        f"default-src 'none'; img-src data:; media-src 'self' file:; style-src 'unsafe-inline'; "
        f"script-src {allowed}; base-uri 'none'; form-action 'none'"
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n{_NO_ICON}\n<style>{style}</style>\n</head>\n"
        f"<body>\n{body}\n"
        + (f"<script>{code}</script>\n" if script else "")
        + "</body>\n</html>\n"
    )


def text(value: object) -> str:
    """Escape anything for use between tags or inside a quoted attribute."""
    return escape(str(value), quote=True)


def facts(items: Iterable[tuple[str, str, str]]) -> str:
    """Return figures side by side: (name, value, remark), plain text."""
    parts = "".join(
        f"<div><dt>{text(name)}</dt><dd>{text(value)}<small>{text(remark)}</small></dd></div>"
        for name, value, remark in items
    )
    return f'<dl class="facts">{parts}</dl>'


def section(title: str, note: str, body: str) -> str:
    """Return a section; ``title`` and ``note`` are plain text, ``body`` is HTML."""
    remark = f'<p class="note">{text(note)}</p>' if note else ""
    return f"<section><h2>{text(title)}</h2>{remark}{body}</section>"


def record_table(record: Mapping[str, Any]) -> str:
    """Return names and values as a table."""
    rows = "".join(
        f'<tr><th scope="row">{text(name)}</th><td>{text(_plain(value))}</td></tr>'
        for name, value in record.items()
        if value is not None
    )
    return f'<div class="scroll"><table>{rows}</table></div>'


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(part)}" for name, part in value.items())
    if isinstance(value, (list, tuple)):
        return " × ".join(map(str, value))
    return str(value)


def _asset(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")
