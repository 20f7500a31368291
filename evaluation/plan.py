"""What a run shall do, the folder it does it in, and which interrupted run it continues."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import FlexSelectError, OptionError
from .identity import (
    checkpoint_digest,
    code_digest,
    git_revision,
    machine,
    versions,
)
from .journal import digest

RECORD, SUMMARY, TABLE, SAMPLES = "run.json", "summary.json", "table.md", "samples.jsonl"

#: Every figure, of a method in its folder and of all methods in the run's.
ROWS = "rows.json"


@dataclass(frozen=True)
class Plan:
    """A comparison of methods on tasks.

    Attributes
    ----------
    family : folder of the family.
    checkpoint : folder or hub id of the model.
    methods : arguments of the plug-in by method, without the model and the folder.
    missing : methods that were wanted but cannot run, and why.
    tasks : names of lmms-eval's tasks.
    include : folders of more tasks.
    limit : questions a task; all by default.
    shared : arguments of the plug-in that hold for every method.
    processes : how many answer; with GPUs one each.
    """

    family: str
    checkpoint: str
    methods: Mapping[str, Mapping[str, Any]]
    tasks: Sequence[str]
    missing: Mapping[str, str] = field(default_factory=dict)
    include: Sequence[str] = ()
    limit: int | None = None
    shared: Mapping[str, Any] = field(default_factory=dict)
    processes: int = 1

    def arguments(self, method: str, folder: Path) -> dict[str, Any]:
        """Return all arguments of the plug-in for one method."""
        run_folder = str(folder / method)
        own = dict(self.methods[method])
        return {"pretrained": self.checkpoint, **self.shared, **own, "run_folder": run_folder}

    def decides(self) -> dict[str, Any]:
        """Return everything that decides the result; the number of processes does not."""
        selectors = {
            name: checkpoint_digest(str(given["selector"]))
            for name, given in self.methods.items()
            if "selector" in given
        }
        # Their files of rows count question by question, see `questions.Question.key`.
        tasks = [path for each in self.include for path in sorted(Path(each).rglob("*"))]
        return {
            "family": self.family,
            "checkpoint": self.checkpoint,
            "checkpoint_content": checkpoint_digest(self.checkpoint),
            "selectors": selectors,
            "methods": {name: dict(given) for name, given in self.methods.items()},
            "missing": dict(self.missing),
            "tasks": list(self.tasks),
            "include": [
                [str(path), digest(path.read_text(encoding="utf-8", errors="replace"))]
                for path in tasks
                if path.suffix in (".py", ".yaml")
            ],
            "limit": self.limit,
            "shared": dict(self.shared),
            "code": code_digest(),
            "versions": versions(),
        }


def choose_folder(base: Path, plan: Plan, fresh: bool) -> tuple[Path, bool]:
    """Return the folder of a run, made if need be, and whether it continues an interrupted one.

    The latest unfinished run with the same settings is continued, unless ``fresh``.
    """
    decides = plan.decides()
    if not fresh:
        for record in sorted(base.glob(f"*/{RECORD}"), reverse=True):
            found = read_json(record)
            unfinished = not (record.parent / SUMMARY).exists()
            same = isinstance(found, dict) and found.get("decided_by") == digest(decides)
            if unfinished and same and not _held(record.parent):
                return record.parent, True
    name = time.strftime("%Y-%m-%d-%H%M%S")
    for attempt in range(1, 100):
        folder = base / (name if attempt == 1 else f"{name}-{attempt}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise OptionError(f"{folder} cannot be made ({error}). Name another --out.") from error
        write_json(folder / RECORD, _record(plan, decides))
        return folder, False
    raise FlexSelectError(f"{base} has no name free for another run of this second.")


def hold(folder: Path) -> int:
    """Mark a run as going on, for as long as this process or one it started lives.

    Returns the open file, to be passed on to processes that are started. Raises
    `FlexSelectError` where another process is at it.
    """
    file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(file)
        raise FlexSelectError(
            f"{folder} is being worked on by another process. Wait for it, or start a run of your "
            "own with --fresh."
        ) from error
    return file


def load_plan(folder: Path) -> Plan:
    """Read the plan of a run's folder."""
    found = read_json(folder / RECORD)
    if found is None:
        raise OptionError(f"{folder} holds no run: there is no readable {RECORD} in it.")
    return Plan(**found["plan"])


def point_latest(folder: Path) -> None:
    """Let ``latest`` beside the folder point to it, at once or not at all."""
    unfinished = folder.parent / f".latest-{os.getpid()}"
    unfinished.unlink(missing_ok=True)
    unfinished.symlink_to(folder.name)
    unfinished.replace(folder.parent / "latest")


def read_json(path: Path) -> Any:
    """Read a file of JSON; None where it is not there or not whole."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def write_json(path: Path, value: Any) -> None:
    """Write a file of JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=1, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def _record(plan: Plan, decides: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "plan": {
            "family": plan.family,
            "checkpoint": plan.checkpoint,
            "methods": dict(plan.methods),
            "missing": dict(plan.missing),
            "tasks": list(plan.tasks),
            "include": list(plan.include),
            "limit": plan.limit,
            "shared": dict(plan.shared),
            "processes": plan.processes,
        },
        "decides": decides,
        "decided_by": digest(decides),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "git": git_revision(),
        "machine": machine(),
    }


def _held(folder: Path) -> bool:
    try:
        os.close(hold(folder))
    except FlexSelectError:
        return True
    return False
