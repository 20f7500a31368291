"""What of a benchmark is there: every row looked at, every video that it names."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...core.errors import DataError, VideoError
from .benchmarks import Benchmark, RowFiles

#: Called with a stage, and how much is done and in all.
Progress = Callable[[str, int, int], None]


@dataclass
class TaskReport:
    """What of one task is there.

    Attributes
    ----------
    rows : number of rows; None where the rows themselves are missing.
    videos : number of different videos they name.
    missing : first place of each video that is not there, or is empty.
    beside : the same of other files that the rows need, such as subtitles.
    """

    rows: int | None
    videos: int = 0
    missing: list[str] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What of a benchmark is there.

    Attributes
    ----------
    benchmark, root, folder : what was checked, and lmms-eval's folder of it.
    tasks : task to what of it is there.
    damaged : what could not be unpacked, a sentence each.
    unreadable : videos that are there and are none, a sentence each; empty unless they were opened.
    """

    benchmark: Benchmark
    root: Path
    tasks: dict[str, TaskReport]
    damaged: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True if every row of every task has its video."""
        return not (self.damaged or self.unreadable) and all(
            task.rows is not None and not task.missing and not task.beside
            for task in self.tasks.values()
        )


def check(
    benchmark: Benchmark,
    root: Path,
    open_videos: bool = False,
    progress: Progress = lambda stage, done, total: None,
) -> Report:
    """Verify that every row has its video, without changing anything.

    Parameters
    ----------
    benchmark : which one.
    root : folder it was prepared in.
    open_videos : also open each video, which reads all of it.
    progress : called with the videos opened and in all.

    Raises
    ------
    DataError
        No rows of the benchmark have been prepared in ``root``.
    """
    target = root / benchmark.folder
    tasks = {}
    for task, files in benchmark.tasks.items():
        rows = kept_rows(benchmark, root, task)
        tasks[task] = TaskReport(None) if not rows else _check_rows(rows, files, target)
    if all(task.rows is None for task in tasks.values()):
        raise DataError(
            f"{root} holds no rows of {benchmark.name}. Prepare it first, without --check."
        )
    report = Report(benchmark, root, tasks)
    if open_videos:
        report.unreadable = _open_all(benchmark, root, progress)
    return report


def _open_all(benchmark: Benchmark, root: Path, progress: Progress) -> list[str]:
    # Brings torch along, and is seldom needed.
    from ...inference.video import probe

    target = root / benchmark.folder
    videos: dict[Path, None] = {}
    for task, files in benchmark.tasks.items():
        for row in read_rows(kept_rows(benchmark, root, task)):
            there = (target / place for place in files.places(row))
            videos.update(dict.fromkeys([path for path in there if path.is_file()][:1]))
    unreadable = []
    for done, path in enumerate(videos, 1):
        try:
            probe(path)
        except VideoError as error:
            unreadable.append(str(error))
        progress("open", done, len(videos))
    return unreadable


def _check_rows(paths: Iterable[Path], files: RowFiles, target: Path) -> TaskReport:
    videos: dict[tuple[str, ...], None] = {}
    others: dict[str, None] = {}
    count = 0
    for row in read_rows(paths):
        count += 1
        videos[files.places(row)] = None
        others.update(dict.fromkeys(files.beside(row)))
    missing = [
        places[0] for places in videos if not any(_is_there(target / place) for place in places)
    ]
    beside = [place for place in others if not _is_there(target / place)]
    return TaskReport(count, len(videos), missing, beside)


def _is_there(path: Path) -> bool:
    """Tell whether a video is there: a file that is not empty, or a folder of frames."""
    if path.is_dir():
        return any(path.iterdir())
    return path.is_file() and path.stat().st_size > 0


def read_rows(paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """Yield the rows of parquet or JSON files; raise `DataError` for one that cannot be read."""
    import pyarrow
    from pyarrow import parquet

    for path in paths:
        try:
            if path.suffix == ".parquet":
                yield from parquet.read_table(path).to_pylist()
            else:
                yield from json.loads(path.read_text())
        except (pyarrow.ArrowException, ValueError, OSError) as error:
            raise DataError(
                f"{path} cannot be read ({error}). Download it again, then run again."
            ) from error


def kept_rows(benchmark: Benchmark, root: Path, task: str) -> list[Path]:
    """Return the files of a task's rows below a prepared root."""
    folder = root / "rows" / benchmark.name / task
    return sorted([*folder.glob("*.parquet"), *folder.glob("*.json")])
