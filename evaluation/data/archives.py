"""Archives as the hub holds them: zip and tar, whole or split, read safely and in place.

Nothing is joined on disk: `Parts` reads the parts of a split archive as one file. All members are
looked at before the first is written, and one that is no plain file below the target refuses the
archive. A member appears under its name only when it is whole, so a run that was killed is
continued by running again: what is there with the right size is not written twice.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from ...core.errors import DataError

#: How the file ends that is being written.
UNFINISHED = ".flexselect-part"

_BLOCK = 512
_COPY = 1 << 20
#: Read at a time where headers are looked at: of a tar these lie a video apart.
_BUFFER = 1 << 16
_WHOLE = re.compile(r"\.(zip|tar|tar\.gz|tgz)$", re.IGNORECASE)
#: ``videos.tar.part.aa``, ``archive.tar.gz.aa``, ``all.zip.001``: the archive and the part.
_PART = re.compile(
    r"^(?P<stem>.+\.(?:zip|tar|tar\.gz|tgz))\.(?:part[.-]?)?(?P<part>[a-z]{2,3}|\d{1,4})$",
    re.IGNORECASE,
)
#: What archives of some systems carry beside the data.
_LITTER = ("__MACOSX/", ".DS_Store")


@dataclass(frozen=True)
class Member:
    """One file of an archive: its path with ``/``, and its size in bytes."""

    name: str
    size: int


@dataclass(frozen=True)
class Archive:
    """One archive: its name without the ending of parts, and its files in order."""

    name: str
    parts: tuple[Path, ...]

    @property
    def size(self) -> int:
        """Bytes of all parts."""
        return sum(part.stat().st_size for part in self.parts)


def is_archive(name: str) -> bool:
    """Tell whether a file name is that of an archive or of a part of one."""
    return bool(_WHOLE.search(name) or _PART.match(name))


def find_archives(folder: Path) -> list[Archive]:
    """Return the archives below a folder, sorted by name.

    Raises
    ------
    DataError
        Of a split archive a part is missing between others.
    """
    found: dict[Path, dict[str, Path]] = {}
    for path in sorted(folder.rglob("*")):
        below = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in below.parts):
            continue
        if split := _PART.match(path.name):
            found.setdefault(below.parent / split["stem"], {})[split["part"].lower()] = path
        elif _WHOLE.search(path.name):
            found.setdefault(below, {})[""] = path
    return [Archive(str(name), _in_order(name, parts)) for name, parts in sorted(found.items())]


def _in_order(name: Path, parts: dict[str, Path]) -> tuple[Path, ...]:
    if "" in parts:
        # Somebody has joined the parts already.
        return (parts[""],)
    suffixes = sorted(parts, key=lambda part: (len(part), part))
    wanted = suffixes[0]
    if wanted.isdigit():
        wanted = wanted if int(wanted) in (0, 1) else "1".zfill(len(wanted))
    else:
        wanted = "a" * len(wanted)
    for suffix in suffixes:
        if suffix != wanted:
            raise DataError(
                f"Part {wanted} of {name} is missing: there are {', '.join(suffixes[:4])} … "
                f"{suffixes[-1]}. Download it, then run again."
            )
        wanted = _next(wanted)
    return tuple(parts[suffix] for suffix in suffixes)


def _next(part: str) -> str:
    if part.isdigit():
        return str(int(part) + 1).zfill(len(part))
    head, last = part[:-1], part[-1]
    if last != "z":
        return head + chr(ord(last) + 1)
    return (_next(head) if head else "a") + "a"


class Parts(io.RawIOBase):
    """The parts of a file as one: readable and seekable, and never in memory as a whole."""

    def __init__(self, paths: tuple[Path, ...]) -> None:
        self._paths = paths
        sizes = [path.stat().st_size for path in paths]
        self._starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self._size = sum(sizes)
        self._at = 0
        self._open: tuple[int, IO[bytes]] | None = None

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position of the whole, and return it."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer from the part that the position is in."""
        if self._at >= self._size:
            return 0
        index = max(i for i, start in enumerate(self._starts) if start <= self._at)
        if self._open is None or self._open[0] != index:
            self._shut()
            self._open = (index, self._paths[index].open("rb"))
        file = self._open[1]
        file.seek(self._at - self._starts[index])
        data = file.read(len(buffer))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        """Close the part that is open."""
        self._shut()
        super().close()

    def _shut(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None


def members(archive: Archive) -> list[Member]:
    """Return the files of an archive, all of them looked at.

    Raises
    ------
    DataError
        The archive is damaged or ends too early, or a member is a link, a device, or a path that
        leads out of the target.
    """
    with _reading(archive) as file:
        listed = _members_of_zip(file) if _is_zip(archive) else _members_of_tar(file, archive)
        return [
            Member(_safe(name, archive), size)
            for name, size in listed
            if not any(litter in name for litter in _LITTER)
        ]


def unpack(
    archive: Archive,
    wanted: dict[str, str],
    target: Path,
    advance: Callable[[int], None] = lambda size: None,
) -> None:
    """Write members of an archive below a folder.

    Parameters
    ----------
    archive : an archive.
    wanted : member's name, as `members` returns it, to its path below ``target``.
    target : an existing folder.
    advance : called with the bytes of each file written.

    Raises
    ------
    DataError
        The archive is damaged, a path leads through a link, or a file cannot be written.
    """
    with _reading(archive) as file:
        contents = _files_of_zip(file) if _is_zip(archive) else _files_of_tar(file, archive)
        for name, size, open_member in contents:
            place = wanted.get(str(PurePosixPath(name)))
            if place is None:
                continue
            path = below(target, place)
            with open_member() as source:
                write(path, source, size, f"{name} of {archive.name}")
            advance(size)


def below(target: Path, place: str) -> Path:
    """Return a path below ``target``; raise `DataError` where a link would lead out of it."""
    path = target / _safe(place, None)
    for parent in path.parents:
        if parent == target:
            break
        if parent.is_symlink():
            raise DataError(
                f"{parent} is a link, so what is written below it would land elsewhere. Remove "
                "the link, or choose another --root."
            )
    return path


def write(path: Path, source: IO[bytes], size: int, what: str) -> None:
    """Write a file that appears when it is whole; raise `DataError` if it has another size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + UNFINISHED)
    with unfinished.open("wb") as file:
        shutil.copyfileobj(source, file, _COPY)
        written = file.tell()
    if written != size:
        unfinished.unlink()
        raise DataError(
            f"{what} has {written:,} bytes where {size:,} are announced. The download is damaged: "
            "fetch it again."
        )
    os.replace(unfinished, path)


def sweep(target: Path) -> None:
    """Remove what a killed run left unfinished."""
    for path in target.rglob(f"*{UNFINISHED}"):
        if path.is_file() and not path.is_symlink():
            path.unlink()


@contextmanager
def _reading(archive: Archive) -> Iterator[IO[bytes]]:
    """Open an archive; what zipfile and tarfile raise of a damaged one becomes a `DataError`."""
    try:
        with io.BufferedReader(Parts(archive.parts), _BUFFER) as file:
            yield file
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError) as error:
        raise _damaged(archive, str(error)) from error
    except (NotImplementedError, RuntimeError) as error:
        if isinstance(error, DataError):
            raise
        # Compression that this Python cannot undo, or a password.
        raise DataError(f"{archive.name} cannot be unpacked here: {error}.") from error
    except OSError as error:
        raise DataError(f"{archive.name} was not unpacked: {error}.") from error


def _is_zip(archive: Archive) -> bool:
    return archive.name.lower().endswith(".zip")


def _members_of_zip(file: IO[bytes]) -> Iterator[tuple[str, int]]:
    with zipfile.ZipFile(file) as opened:
        for info in opened.infolist():
            if info.is_dir():
                continue
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG):
                raise _unsafe(info.filename, "is no plain file")
            yield info.filename, info.file_size


def _files_of_zip(file: IO[bytes]) -> Iterator[tuple[str, int, Callable[[], IO[bytes]]]]:
    with zipfile.ZipFile(file) as opened:
        for info in opened.infolist():
            if not info.is_dir():
                yield info.filename, info.file_size, lambda info=info: opened.open(info)  # type: ignore[misc]


def _members_of_tar(file: IO[bytes], archive: Archive) -> Iterator[tuple[str, int]]:
    with tarfile.open(fileobj=file, mode="r:*") as opened:
        for info in opened:
            if info.isdir():
                continue
            if not info.isreg():
                raise _unsafe(info.name, "is a link or a device")
            yield info.name, info.size
        # tarfile takes a missing end, or a header that is none, for the end of the archive.
        assert opened.fileobj is not None
        opened.fileobj.seek(opened.offset)
        end = opened.fileobj.read(_BLOCK)
        if len(end) < _BLOCK or any(end):
            raise _damaged(archive, f"it ends or breaks off at byte {opened.offset:,}")


def _files_of_tar(
    file: IO[bytes], archive: Archive
) -> Iterator[tuple[str, int, Callable[[], IO[bytes]]]]:
    with tarfile.open(fileobj=file, mode="r:*") as opened:
        for info in opened:
            if info.isreg():
                yield info.name, info.size, lambda info=info: opened.extractfile(info)  # type: ignore[misc]


def _safe(name: str, archive: Archive | None) -> str:
    """Return a member's path in its plainest form, or raise `DataError` for one that leads out."""
    path = PurePosixPath(name)
    if (
        not path.parts
        or path.is_absolute()
        or ".." in path.parts
        or "\\" in name
        or "\0" in name
        or re.match(r"^[A-Za-z]:", name)
        or name.endswith(UNFINISHED)
    ):
        raise _unsafe(name, "leads out of the folder", archive)
    return str(path)


def _unsafe(name: str, why: str, archive: Archive | None = None) -> DataError:
    inside = f" of {archive.name}" if archive else ""
    return DataError(
        f"{name!r}{inside} {why}. No data set needs that, so nothing of the archive was unpacked; "
        "check where it came from."
    )


def _damaged(archive: Archive, why: str) -> DataError:
    parts = f" (its last part is {archive.parts[-1].name})" if len(archive.parts) > 1 else ""
    return DataError(
        f"{archive.name}{parts} is damaged or not whole: {why}. Download it again, then run again."
    )
