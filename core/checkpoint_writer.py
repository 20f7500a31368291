"""A converted checkpoint on disk: sharded safetensors, written whole or not at all."""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import (
    DTYPES,
    INDEX_SUFFIX,
    Checkpoint,
    Convert,
    plan_conversion,
    shapes,
    stream_converted,
)
from .errors import CheckpointError

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 8 * 2**20
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_converted(
    model: nn.Module,
    checkpoint: Checkpoint,
    destination: str | Path,
    convert: Convert,
    *,
    dtype: torch.dtype | None = None,
    ignored: Collection[str] = (),
    tied: Mapping[str, str] | None = None,
    shard_bytes: int = 4 * 2**30,
    overwrite: bool = False,
    finish: Callable[[Path], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Convert a checkpoint on the way from one folder to another, tensor by tensor.

    The files are written to a hidden sibling of ``destination``, synced to disk, and moved into
    place by one rename. Killed at any moment, a conversion leaves ``destination`` as it was and
    perhaps that sibling, named ``.NAME.incomplete-…``, which can be deleted. Memory holds the
    pages of one stored shard and a few megabytes more, whatever the size of the model.

    Parameters
    ----------
    model : the model on the meta device; only names and shapes are read.
    destination : folder to create. An existing one is refused, unless ``overwrite`` and it holds a
        checkpoint (a ``config.json``).
    shard_bytes : size of a written shard; a larger tensor gets a shard of its own.
    finish : called with the folder before the rename, to add configuration and processor.
    progress : called with (bytes written, bytes in all) after every tensor.
    convert, dtype, ignored, tied : as in `core.checkpoint.load_into`.

    Raises
    ------
    CheckpointError
        As `core.checkpoint.load_into`; or ``destination`` cannot be written.
    """
    destination = Path(destination).absolute()
    _check_destination(destination, checkpoint.path, overwrite)
    plan = plan_conversion(checkpoint.blank, shapes(model), convert, ignored=ignored, tied=tied)
    blank = {name: _as_stored(value, dtype) for name, value in plan.blank.items()}
    total = sum(value.nbytes for value in blank.values())
    destination.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(destination.parent).free
    if free < total:
        raise CheckpointError(
            f"{destination} needs {total / 2**30:.1f} GiB, and {destination.parent} has "
            f"{free / 2**30:.1f} GiB left. Free some space or choose another place."
        )
    draft = destination.with_name(f".{destination.name}.incomplete-{secrets.token_hex(4)}")
    draft.mkdir()
    try:
        shards = _group(blank, shard_bytes)
        written = 0
        tensors = stream_converted(plan, checkpoint)
        for file_name, shard in shards.items():
            with _shard(draft / file_name, shard) as add:
                for _ in shard:
                    name, value = next(tensors)
                    add(name, value)
                    written += shard[name].nbytes
                    del value
                    if progress is not None:
                        progress(written, total)
        if len(shards) > 1:
            weight_map = {name: file for file, shard in shards.items() for name in shard}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (draft / f"model{INDEX_SUFFIX}").write_text(json.dumps(index, indent=2) + "\n")
        if finish is not None:
            finish(draft)
        for path in [*draft.rglob("*"), draft]:
            _sync(path)
        _put_in_place(draft, destination)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return destination


@contextmanager
def _shard(path: Path, blank: Mapping[str, Tensor]) -> Iterator[Callable[[str, Tensor], None]]:
    """Open a safetensors file that takes the tensors of ``blank`` one by one, in any order.

    safetensors itself only writes a file from all of its tensors at once. The header goes in last:
    until then the file starts with zeros, which no reader takes for a checkpoint.
    """
    offsets: dict[str, int] = {}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # Widest dtype first keeps every tensor aligned, so that it can be mapped when read.
    for name, value in sorted(blank.items(), key=lambda item: -item[1].itemsize):
        offsets[name] = end
        entries[name] = {
            "dtype": _DTYPE_NAMES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [end, end + value.nbytes],
        }
        end += value.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    with path.open("wb") as file:

        def add(name: str, value: Tensor) -> None:
            dtype = blank[name].dtype
            rows = value.reshape(1) if value.ndim == 0 else value
            row_bytes = max(value.itemsize, dtype.itemsize) * rows[:1].numel()
            file.seek(len(header) + offsets[name])
            for chunk in rows.split(max(1, _CHUNK_BYTES // max(1, row_bytes))):
                flat = chunk.to(dtype).contiguous().flatten()
                file.write(memoryview(flat.view(torch.uint8).numpy()))

        yield add
        file.seek(0)
        file.write(header)


def _as_stored(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is not None and value.is_floating_point():
        value = value.to(dtype)
    if value.dtype not in _DTYPE_NAMES:
        raise CheckpointError(f"safetensors cannot store {value.dtype}; choose another dtype.")
    return value


def _group(blank: Mapping[str, Tensor], shard_bytes: int) -> dict[str, dict[str, Tensor]]:
    """Cut the parameters into shards of at most ``shard_bytes``, in order, and name the files."""
    groups: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, value in blank.items():
        if groups[-1] and size + value.nbytes > shard_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = value
        size += value.nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {
        f"model-{i:05d}-of-{len(groups):05d}.safetensors": group
        for i, group in enumerate(groups, start=1)
    }


def _check_destination(destination: Path, source: Path, overwrite: bool) -> None:
    here = destination.resolve()
    if here == source.resolve() or here in source.resolve().parents:
        raise CheckpointError(f"{destination} holds the checkpoint being read; name another place.")
    for leftover in destination.parent.glob(f".{destination.name}.incomplete-*"):
        logger.warning("%s was left by an interrupted conversion and can be deleted.", leftover)
    if not destination.exists():
        return
    if not overwrite:
        raise CheckpointError(
            f"{destination} exists. Name another folder, or overwrite it (overwrite=True, or "
            "--overwrite on the command line)."
        )
    if not (destination / "config.json").is_file():
        raise CheckpointError(
            f"{destination} holds no checkpoint (no config.json), so it is not overwritten. Name "
            "another folder, or remove it yourself."
        )


def _put_in_place(draft: Path, destination: Path) -> None:
    old = None
    if destination.exists():
        old = draft.with_name(draft.name.replace(".incomplete-", ".replaced-"))
        destination.rename(old)
    try:
        draft.rename(destination)
    except OSError:
        if old is not None:
            old.rename(destination)
        raise
    _sync(destination.parent)
    if old is not None:
        shutil.rmtree(old)


def _sync(path: Path) -> None:
    """Force a file, or the list of files of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
