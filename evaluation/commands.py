"""Commands of this folder. What a command needs is imported when it runs."""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
