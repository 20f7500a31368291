"""Prepare a benchmark: find its files, unpack and place the videos, and verify every row.

Everything lies below one root, which lmms-eval knows as ``HF_HOME``:

- ``downloads/<benchmark>/`` what came from the hub, as it is there;
- lmms-eval's own folder of the benchmark, with the videos where its tasks open them;
- ``rows/<benchmark>/`` the rows, and ``tasks/<benchmark>/`` a task file for each, so that the
  benchmark also runs where no hub can be reached: ``--include_path``, task ``<name>_local``.

No step keeps a record of its own: what is there already is seen in the files, so that running again
continues after anything that happened, a kill included.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from ...core.errors import DataError
from .archives import (
    Archive,
    below,
    find_archives,
    is_archive,
    members,
    sweep,
    unpack,
    write,
)
from .benchmarks import Benchmark, RowFiles
from .tasks import write_tasks
from .verify import Progress, Report, check, kept_rows, read_rows

#: Bytes that stay free on the disk.
RESERVE = 256 << 20


def prepare(
    benchmark: Benchmark,
    root: Path,
    source: Path,
    progress: Progress = lambda stage, done, total: None,
) -> Report:
    """Unpack and place what is in ``source``, and verify it.

    Parameters
    ----------
    benchmark : which one.
    root : folder to prepare in; made if it is not there.
    source : folder with the benchmark's files as the hub has them, or some of them.
    progress : called with the bytes placed and in all.

    Raises
    ------
    DataError
        ``source`` holds no rows, the disk is too small, another run is at work, or the target is a
        link. An archive that is damaged or unsafe is told in the report, after the others.
    """
    rows = {task: _find_rows(source, files) for task, files in benchmark.tasks.items()}
    if not any(rows.values()):
        patterns = dict.fromkeys(p for files in benchmark.tasks.values() for p in files.patterns)
        raise DataError(
            f"{source} holds no rows of {benchmark.name}: expected {' or '.join(patterns)}, as in "
            f"the data set {benchmark.repository} of the hub."
        )
    target = root / benchmark.folder
    damaged: list[str] = []
    with _alone(root, benchmark), _speaking(root):
        if target.is_symlink():
            raise DataError(
                f"{target} is a link. Remove the link (not what it leads to), then run again."
            )
        target.mkdir(parents=True, exist_ok=True)
        sweep(target)
        kept = _keep_rows(benchmark, root, rows)
        expected = _Expected(benchmark, kept)
        work = _plan(source, benchmark, expected, target, damaged)
        check_space(target, sum(step.bytes for step in work))
        done, total = 0, sum(step.bytes for step in work)
        progress("unpack", 0, total)
        for step in work:

            def advance(size: int) -> None:
                nonlocal done
                done += size
                progress("unpack", done, total)

            try:
                step.run(advance)
            except DataError as error:
                damaged.append(str(error))
        write_tasks(benchmark, root, kept)
    report = check(benchmark, root)
    report.damaged = damaged
    return report


def _find_rows(source: Path, files: RowFiles) -> list[Path]:
    for pattern in files.patterns:
        if found := sorted(path for path in source.glob(pattern) if path.is_file()):
            return found
    return []


def _keep_rows(
    benchmark: Benchmark, root: Path, rows: Mapping[str, list[Path]]
) -> dict[str, list[Path]]:
    """Copy the rows below the root: the task files name them, whatever becomes of the source."""
    kept: dict[str, list[Path]] = {}
    for task, paths in rows.items():
        folder = root / "rows" / benchmark.name / task
        # Rows of an earlier version must not be read beside these.
        names = {path.name for path in paths}
        for old in kept_rows(benchmark, root, task) if paths else ():
            if old.name not in names:
                old.unlink()
        for path in paths:
            copy = folder / path.name
            with path.open("rb") as file:
                write(copy, file, path.stat().st_size, str(path))
        kept[task] = kept_rows(benchmark, root, task)
    return kept


class _Expected:
    """Where the rows expect their videos, and which file of an archive belongs there."""

    def __init__(self, benchmark: Benchmark, rows: Mapping[str, list[Path]]) -> None:
        self.places: set[str] = set()
        for task, paths in rows.items():
            for row in read_rows(paths):
                self.places.update(benchmark.tasks[task].places(row))
        self._by_name: dict[str, list[str]] = {}
        for place in sorted(self.places):
            self._by_name.setdefault(PurePosixPath(place).name, []).append(place)

    def assign(self, names: Iterable[str]) -> dict[str, str]:
        """Return a place for every file: where a row expects it, or as it is called.

        Archives put a folder of their own around the videos or leave one out, so a file belongs
        where a row expects one of its name; of several such places the one that ends most alike.
        Two files for one place cannot be told apart: both stay as they are called.
        """
        names = list(names)
        wanted = {name: self._nearest(name) for name in names}
        claims = Counter(wanted.values())
        taken = set(names)
        return {
            name: name if place != name and (claims[place] > 1 or place in taken) else place
            for name, place in wanted.items()
        }

    def _nearest(self, name: str) -> str:
        if name in self.places:
            return name
        parts = PurePosixPath(name).parts

        def alike(place: str) -> int:
            ends = zip(reversed(parts), reversed(PurePosixPath(place).parts), strict=False)
            return next((i for i, (ours, theirs) in enumerate(ends) if ours != theirs), len(parts))

        places = sorted(self._by_name.get(parts[-1], ()), key=alike, reverse=True)
        if not places or (len(places) > 1 and alike(places[0]) == alike(places[1])):
            return name
        return places[0]


@dataclass
class _Step:
    """Part of the work: the bytes it writes, and what does it."""

    bytes: int
    run: Callable[[Callable[[int], None]], None]


def _plan(
    source: Path,
    benchmark: Benchmark,
    expected: _Expected,
    target: Path,
    damaged: list[str],
) -> list[_Step]:
    """List what is to be written; archives that must not be unpacked go to ``damaged``."""
    sizes: dict[tuple[str, str], int] = {}
    contents: dict[str, Archive] = {}
    for archive in find_archives(source):
        try:
            sizes.update({(archive.name, m.name): m.size for m in members(archive)})
            contents[archive.name] = archive
        except DataError as error:
            damaged.append(str(error))
    loose = {str(path.relative_to(source)): path for path in _loose(source, benchmark, target)}
    places = expected.assign([*(name for _, name in sizes), *loose])

    def missing(name: str, size: int) -> bool:
        path = below(target, places[name])
        return path.is_symlink() or not path.is_file() or path.stat().st_size != size

    work = []
    for archive in contents.values():
        wanted = {
            name: size
            for (of, name), size in sizes.items()
            if of == archive.name and missing(name, size)
        }
        if wanted:
            run = partial(unpack, archive, {name: places[name] for name in wanted}, target)
            work.append(_Step(sum(wanted.values()), run))
    for name, path in loose.items():
        if missing(name, path.stat().st_size):
            work.append(_place(path, below(target, places[name])))
    return work


def _loose(source: Path, benchmark: Benchmark, target: Path) -> Iterator[Path]:
    """Yield the files that are neither rows nor archives nor there already."""
    if source.resolve() == target.resolve():
        return
    patterns = [p for files in benchmark.tasks.values() for p in files.patterns]
    rows = {path for pattern in patterns for path in source.glob(pattern)}
    ignored = {path for pattern in benchmark.ignored for path in source.glob(pattern)}
    for path in sorted(source.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(source).parts)
        if path.is_file() and not hidden and path not in rows | ignored:
            if path.suffix in (".parquet",) or is_archive(path.name):
                continue
            yield path


def _place(path: Path, place: Path) -> _Step:
    """Put a file that is unpacked already where it belongs: linked if the disk is the same."""
    origin = path.resolve()
    size = origin.stat().st_size

    def run(advance: Callable[[int], None]) -> None:
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            place.unlink(missing_ok=True)
            os.link(origin, place)
        except OSError:
            # Another disk, or one that knows no links.
            with origin.open("rb") as file:
                write(place, file, size, str(path))
        advance(size)

    parent = next(folder for folder in place.parents if folder.exists())
    same_disk = parent.stat().st_dev == origin.stat().st_dev
    return _Step(0 if same_disk else size, run)


def check_space(folder: Path, needed: int) -> None:
    """Raise `DataError` where ``needed`` bytes do not fit."""
    free = shutil.disk_usage(next(f for f in (folder, *folder.parents) if f.exists())).free
    if needed and needed + RESERVE > free:
        raise DataError(
            f"{folder} has {free / 1e9:.1f} GB free; {needed / 1e9:.1f} GB and a reserve of "
            f"{RESERVE / 1e9:.1f} GB are needed. Free some, or choose a --root on another disk."
        )


@contextmanager
def _alone(root: Path, benchmark: Benchmark) -> Iterator[None]:
    """Hold a lock, so that no two runs write the same files."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / f".{benchmark.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"Another run is preparing {benchmark.name} in {root}. Wait for it to end."
            ) from error
        yield


@contextmanager
def _speaking(root: Path) -> Iterator[None]:
    """Name the folder where the system refuses to write."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{root} could not be prepared: {error}.") from error
