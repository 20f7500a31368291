"""The journal of a run: every answered question, on disk before the next one is asked.

One line a question, in JSON. A process that is killed loses at most the line it was writing, which
is recognised and answered again. Several processes write a file each and read all of them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..core.errors import FlexSelectError

logger = logging.getLogger(__name__)


class Journal:
    """Answers of a folder by key.

    Parameters
    ----------
    folder : made if missing.
    rank : of this process; it appends to a file of its own.

    Raises
    ------
    FlexSelectError
        The folder cannot be written to.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder = folder
        self._path = folder / f"answers-{rank}.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise FlexSelectError(
                f"{self._path}: answers cannot be kept there ({error.strerror}). Name another "
                "run_folder."
            ) from error
        # A line cut by a kill must not swallow the next one.
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            os.write(self._file, b"\n")

    def read(self) -> dict[str, dict[str, Any]]:
        """Return every whole line of every process, by key."""
        return read_journal(self.folder)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write rows, each with a ``key``; when this returns they survive a kill and a crash."""
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        while text:
            text = text[os.write(self._file, text) :]
        os.fsync(self._file)

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._file)


def read_journal(folder: Path) -> dict[str, dict[str, Any]]:
    """Return every whole line of the journal in ``folder``, by key; empty if there is none."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("answers-*.jsonl")):
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
            if not line:
                continue
            try:
                row = json.loads(line)
                found[row["key"]] = row
            except (ValueError, KeyError, TypeError):
                logger.warning("%s:%d: half a line, left by an interruption.", path, number)
    return found


def digest(value: Any) -> str:
    """Name a value of JSON's kinds by its content: 16 hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
