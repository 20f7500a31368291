"""The terminal: what every command prints to, its progress display, and how it ends on an error."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from ..core.errors import FlexSelectError, OptionError
from .features import Progress

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn an error that was raised on purpose into one line and exit code 1."""
    try:
        yield
    except FlexSelectError as error:
        err.print(f"flexselect: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(1) from error


def check_writable(option: str, path: Path, kind: str = "file") -> None:
    """Raise `OptionError` where no file, or folder, can be made at the ``path`` of an option."""
    folder = path.absolute()
    if kind == "file":
        folder = folder.parent
    while not folder.exists():
        folder = folder.parent
    if not path.name or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise OptionError(
            f"{option} {path}: cannot write to {folder}. Name a {kind} in a folder that can be "
            "written to, such as out/talk."
        )


@contextmanager
def progress_bars(silent: bool = False) -> Iterator[Progress]:
    """Show one bar a stage on standard error; yields what to call with stage, done and total."""
    columns = (
        TextColumn("{task.description:>7}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Bars(*columns, console=err, disable=silent, transient=False) as bars:
        tasks = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total or None)
            bars.update(tasks[stage], completed=done)

        yield advance


def stamp(seconds: float) -> str:
    """Write seconds as h:mm:ss.s."""
    minutes, tenths = divmod(round(seconds * 10), 600)
    hours, minutes = divmod(minutes, 60)
    rest = f"{tenths / 10:04.1f}"
    return f"{hours}:{minutes:02d}:{rest}" if hours else f"{minutes}:{rest}"
