"""Let the documentation find the package, whose folder is the repository root.

The tool that reads docstrings looks through a package's whole folder. The root also holds .venv, so
it gets a copy of the modules alone, in ``build/.docs``.
"""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def on_startup(**_: object) -> None:
    """Copy the modules before anything reads the configuration's paths."""
    copy_modules(ROOT, ROOT / "build" / ".docs" / "flexselect")


def copy_modules(root: Path, target: Path) -> None:
    """Copy the modules of every folder of the library to a package of their own."""
    shutil.rmtree(target, ignore_errors=True)
    for folder in (root, *(path.parent for path in sorted(root.glob("[!.]*/**/__init__.py")))):
        parts = folder.relative_to(root).parts
        if parts[:1] in {("tests",), ("scripts",), ("build",), ("dist",)}:
            continue
        place = target.joinpath(*parts)
        place.mkdir(parents=True, exist_ok=True)
        for module in folder.glob("*.py"):
            shutil.copyfile(module, place / module.name)
