"""What a result depends on besides options: files of a checkpoint, this code, versions, machine."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..core.hub import local_folder
from ..inference.registry import FAMILIES

ROOT = Path(__file__).resolve().parent.parent

#: Folders of the house whose code and settings an answer comes from.
ANSWERING = (
    *("core", "evaluation", "inference", "shared_configs/models"),
    *sorted({family for family, _ in FAMILIES.values()}),
)
_VERSIONS = ("flexselect", "torch", "transformers", "tokenizers", "av", "lmms-eval", "accelerate")

#: Bytes read at the start, the middle and the end of a large file.
_SAMPLE = 1 << 20


@cache
def checkpoint_digest(path_or_id: str) -> str:
    """Name a checkpoint by its content: the same wherever the folder lies.

    Of files beyond a few MiB only size, beginning, middle and end count: reading 16 GB at every
    start would cost a minute, and no training leaves all three as they were.
    """
    state = hashlib.sha256()
    for path in sorted(local_folder(path_or_id).iterdir()):
        if path.suffix not in (".safetensors", ".json", ".jinja", ".txt", ".model"):
            continue
        size = path.stat().st_size
        state.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            if size <= 4 * _SAMPLE:
                state.update(file.read())
                continue
            for start in (0, size // 2, size - _SAMPLE):
                file.seek(start)
                state.update(file.read(_SAMPLE))
    return state.hexdigest()[:16]


@cache
def code_digest() -> str:
    """Name the code and the presets that answers come from by their content."""
    state = hashlib.sha256()
    for folder in ANSWERING:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".yaml"):
                state.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return state.hexdigest()[:16]


def file_identity(path: str) -> tuple[Any, ...]:
    """Tell a file from what may lie at its place later: path, bytes, time of change; or no file."""
    try:
        stat = Path(path).stat()
    except OSError:
        return (path, None)
    return (path, stat.st_size, stat.st_mtime_ns)


def versions() -> dict[str, str]:
    """Versions of what takes part in a result."""
    found = {"python": platform.python_version()}
    for package in _VERSIONS:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def machine() -> dict[str, Any]:
    """Name the hardware: times mean nothing without it."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "gpus": gpus,
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }


def git_revision() -> str | None:
    """Commit of the code, marked where files differ from it; None outside a repository."""

    def git(*command: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(ROOT), *command], capture_output=True, text=True, check=False
            )
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # Installed into another project's folder, git would answer for that one.
    if git("rev-parse", "--show-prefix") != "":
        return None
    commit = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no")
    return f"{commit} with changes" if commit and changed else commit
