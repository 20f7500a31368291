"""Task files by which lmms-eval runs a benchmark on rows of this machine, without a hub.

A file includes lmms-eval's own task by its path and replaces only where the rows come from, so
prompt, videos and scoring stay what they are. lmms-eval prefers its own tasks to local ones of the
same name, so these end in ``_local``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ...core.errors import DataError
from ..prompts import LOCAL
from .benchmarks import Benchmark


def tasks_folder(root: Path, benchmark: Benchmark) -> Path:
    """Return the folder of a benchmark's task files, for lmms-eval's ``--include_path``."""
    return root / "tasks" / benchmark.name


def write_tasks(benchmark: Benchmark, root: Path, rows: Mapping[str, Sequence[Path]]) -> list[Path]:
    """Write the task files of a benchmark, and of its group; return them.

    Parameters
    ----------
    benchmark : which one.
    root : folder it was prepared in.
    rows : task to its files of rows; a task without rows gets no file.

    Raises
    ------
    DataError
        lmms-eval is not installed, or has not the task.
    """
    folder = tasks_folder(root, benchmark)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for task, paths in rows.items():
        if paths:
            content = local_task(benchmark, task, paths)
            written.append(_write(folder / f"{task}{LOCAL}.yaml", content))
    if benchmark.group and written:
        members = [path.stem for path in written]
        content = {"group": benchmark.group + LOCAL, "task": members}
        written.append(_write(folder / f"{benchmark.group}{LOCAL}.yaml", content))
    return written


def local_task(benchmark: Benchmark, task: str, paths: Sequence[Path]) -> dict[str, Any]:
    """Return what a task file says."""
    files = benchmark.tasks[task]
    source = lmms_eval_tasks() / files.yaml
    if not source.is_file():
        raise DataError(
            f"The installed lmms-eval has no {files.yaml}. flexselect knows version 0.7; install "
            "it with: pip install 'flexselect[eval]'"
        )
    return {
        "include": str(source),
        "task": task + LOCAL,
        "dataset_path": "parquet" if paths[0].suffix == ".parquet" else "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {files.split: [str(path.resolve()) for path in paths]},
            "cache_dir": benchmark.folder,
            "video": True,
        },
    }


def lmms_eval_tasks() -> Path:
    """Return the folder of lmms-eval's own tasks, without importing it."""
    found = importlib.util.find_spec("lmms_eval")
    if found is None or found.origin is None:
        raise DataError(
            "lmms-eval is not installed, so its tasks cannot be named. Install it with: "
            "pip install 'flexselect[eval]'"
        )
    return Path(found.origin).parent / "tasks"


def _write(path: Path, content: dict[str, Any]) -> Path:
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(yaml.safe_dump(content, sort_keys=False))
    unfinished.replace(path)
    return path
