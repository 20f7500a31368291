"""Files of a score store: safetensors shards, and indices that tell when a byte has changed."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..core.errors import CheckpointError
from .packing import Packed

#: Goes up when files of this version cannot be read by an older one.
FORMAT = 1


@dataclass(frozen=True)
class Entry:
    """What an index says of one sample.

    Attributes
    ----------
    id : of the example.
    damaged : why there are no scores; None where there are.
    shard, row : file of the scores and place in it.
    tokens, frames : visual tokens, and frames over all videos.
    prompt : digest of the prompt that was scored.
    low, high : see `Packed`.
    crc : CRC-32 of the stored numbers.
    """

    id: str
    damaged: str | None = None
    shard: str = ""
    row: int = 0
    tokens: int = 0
    frames: int = 0
    prompt: str = ""
    low: float = 0.0
    high: float = 0.0
    crc: int = 0


def describe(id: str, row: int, packed: Packed, frames: int, prompt: str) -> Entry:
    """Return the entry of packed scores; the shard gets its name when it is written."""
    return Entry(
        id,
        row=row,
        tokens=len(packed.half),
        frames=frames,
        prompt=prompt,
        low=packed.low,
        high=packed.high,
        crc=_crc(packed),
    )


def tensors_of(row: int, packed: Packed) -> dict[str, Tensor]:
    """Return packed scores as the tensors of a shard."""
    tensors = {f"{row}.half": packed.half}
    if packed.fine is not None:
        tensors[f"{row}.fine"] = packed.fine
    return tensors


class ShardReader:
    """Reads samples of a folder's shards; the shard read last stays open."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: tuple[str, Any] | None = None

    def read(self, entry: Entry) -> Packed:
        """Return the packed scores of ``entry``; `CheckpointError` if they have changed."""
        path = self.folder / entry.shard
        try:
            if self._open is None or self._open[0] != entry.shard:
                self._open = (entry.shard, safe_open(path, framework="pt"))
            shard = self._open[1]
            half = shard.get_tensor(f"{entry.row}.half")
            fine = f"{entry.row}.fine"
            packed = Packed(
                half,
                shard.get_tensor(fine) if fine in shard.keys() else None,  # noqa: SIM118
                entry.low,
                entry.high,
            )
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{_changed(path)} ({error})") from error
        if len(half) != entry.tokens or _crc(packed) != entry.crc:
            raise CheckpointError(_changed(path))
        return packed


def write_shard(
    folder: Path, name: str, entries: Sequence[Entry], tensors: Mapping[str, Tensor]
) -> tuple[list[Entry], dict[str, str]]:
    """Write a shard, if there is anything to write, whole or not at all.

    Parameters
    ----------
    name : of the file without ending; ``*`` in it stands for a digest of what is written.

    Returns
    -------
    The entries, with the name of the shard, and {name: checksum}.
    """
    if not tensors:
        return list(entries), {}
    content = save(dict(tensors))
    checksum = digest(content)
    file = f"{name.replace('*', checksum[:12])}.safetensors"
    replace_file(folder / file, content)
    named = [replace(e, shard=file) if e.damaged is None else e for e in entries]
    return named, {file: checksum}


def write_index(path: Path, shards: Mapping[str, str], entries: Iterable[Entry]) -> None:
    """Write an index: checksum of the rest, shards with their checksums, one line a sample."""
    lines = [json.dumps({"format": FORMAT, "shards": dict(shards)})]
    lines += [json.dumps(_without_defaults(entry), ensure_ascii=False) for entry in entries]
    body = "".join(f"{line}\n" for line in lines).encode()
    replace_file(path, json.dumps({"checksum": digest(body)}).encode() + b"\n" + body)


def read_index(path: Path) -> tuple[dict[str, str], list[Entry]]:
    """Return the shards with their checksums, and the entries.

    Raises
    ------
    CheckpointError
        The file is not what was written, or was written by a newer version.
    FileNotFoundError
        It is not there.
    """
    head, _, body = path.read_bytes().partition(b"\n")
    try:
        if json.loads(head)["checksum"] != digest(body):
            raise CheckpointError(_changed(path))
        first, *rest = (json.loads(line) for line in body.decode().split("\n") if line)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(_changed(path)) from error
    if first["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {first['format']}, this version reads {FORMAT}. Rank again into "
            "another folder, or use the version that wrote it."
        )
    return first["shards"], [Entry(**entry) for entry in rest]


def digest(content: bytes) -> str:
    """Return the SHA-256 of ``content`` in hexadecimal, as ``sha256sum`` prints it."""
    return hashlib.sha256(content).hexdigest()


def check_file(path: Path, checksum: str) -> None:
    """Raise `CheckpointError` unless a file is what was written."""
    if not path.is_file() or digest(path.read_bytes()) != checksum:
        raise CheckpointError(_changed(path))


def replace_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, also when the machine stops."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def lock(path: Path, wait: bool = False) -> int | None:
    """Take the lock ``path``; the descriptor to close frees it, and so does the end of a process.

    None if another process holds it and ``wait`` is False.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _crc(packed: Packed) -> int:
    """CRC-32 of all numbers of a sample, including those that stand in the index."""
    parts = [packed.half] if packed.fine is None else [packed.half, packed.fine]
    value = zlib.crc32(repr((packed.low, packed.high)).encode())
    for part in parts:
        value = zlib.crc32(part.contiguous().numpy().tobytes(), value)
    return value


def _without_defaults(entry: Entry) -> dict[str, Any]:
    """Return the fields that say something: a damaged sample has neither shard nor tokens."""
    blank = asdict(Entry(""))
    return {name: value for name, value in asdict(entry).items() if value != blank[name]}


def _changed(path: Path) -> str:
    return (
        f"{path} is missing or damaged: it is not what was written. Copy the store again, or "
        "delete the files named like it and run the same flexselect rank again."
    )
