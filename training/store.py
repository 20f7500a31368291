"""Teacher scores on disk: float16 in safetensors shards, with an index that has checksums.

::

    settings.json            what decides a score: model, layer, aggregation, query, sampling …
    part-1-of-2-0.*          scores of one process that is at work, or was killed
    index.jsonl, scores-*    once all is there: scores in the order of the examples

Every file is written aside and moved into place, and an index after its shards: what no index
names does not exist. So a killed process loses what it had not written yet, and nothing is ever
half there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ..core.errors import CheckpointError, OptionError
from ..core.layout import Prompt
from .packing import pack, unpack
from .shards import (
    FORMAT,
    Entry,
    ShardReader,
    check_file,
    describe,
    lock,
    read_index,
    replace_file,
    tensors_of,
    write_index,
    write_shard,
)

logger = logging.getLogger(__name__)

SETTINGS = "settings.json"
INDEX = "index.jsonl"

#: Samples of a shard of a finished store.
SHARD_SAMPLES = 512


class ScoreStore:
    """The scores of a folder, as far as they are there.

    Parameters
    ----------
    folder : the ``--out`` of ``flexselect rank``.

    Attributes
    ----------
    settings : what decided the scores.
    made_by : versions and names that did not decide.
    entries : by id of the example, in the order of the index.
    checksums : SHA-256 of every shard.

    Raises
    ------
    CheckpointError
        There is no store, or its index is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        record = _read_settings(self.folder)
        self.settings: dict[str, Any] = record["settings"]
        self.made_by: dict[str, Any] = record["made_by"]
        self.entries: dict[str, Entry] = {}
        self.checksums: dict[str, str] = {}
        for shards, entries in _read_indices(self.folder):
            self.checksums.update(shards)
            for entry in entries:
                known = self.entries.get(entry.id)
                # Ranked twice, as by processes whose shards overlap, a sample counts once.
                if known is None or known.damaged is not None:
                    self.entries[entry.id] = entry
        self._reader = ShardReader(self.folder)

    @property
    def ranked(self) -> int:
        """Samples with scores."""
        return sum(entry.damaged is None for entry in self.entries.values())

    @property
    def damaged(self) -> dict[str, str]:
        """Id to reason of the samples that could not be ranked."""
        return {e.id: e.damaged for e in self.entries.values() if e.damaged is not None}

    def scores(self, id: str) -> Tensor:
        """Return the scores of a sample: float32 ``(visual,)``, ordered exactly as they were.

        Raises
        ------
        CheckpointError
            The sample is not there, was damaged, or its stored numbers have changed.
        """
        entry = self.entry(id)
        if entry.damaged is not None:
            raise CheckpointError(
                f"{self.folder} holds no scores of the sample {id}, which was damaged when it was "
                f"ranked: {entry.damaged} Is it whole now? flexselect rank --retry ranks it."
            )
        return unpack(self._reader.read(entry))

    def entry(self, id: str) -> Entry:
        """Return what the index says of a sample; `CheckpointError` if nothing."""
        if id not in self.entries:
            raise CheckpointError(
                f"{self.folder} holds no scores of the sample {id}. Run flexselect rank with this "
                "data and the same --out again: it adds what is missing."
            )
        return self.entries[id]

    def verify(self) -> None:
        """Read everything; `CheckpointError` names the first file that is not what was written."""
        for shard, checksum in sorted(self.checksums.items()):
            check_file(self.folder / shard, checksum)
        for entry in self.entries.values():
            if entry.damaged is None:
                self._reader.read(entry)

    def take(self, ids: Sequence[str]) -> tuple[list[Entry], dict[str, Tensor]]:
        """Return samples as the entries and tensors of a shard of their own, in that order."""
        entries = [replace(self.entries[id], row=row) for row, id in enumerate(ids)]
        tensors: dict[str, Tensor] = {}
        for row, id in enumerate(ids):
            if self.entries[id].damaged is None:
                tensors |= tensors_of(row, self._reader.read(self.entries[id]))
        return entries, tensors


class ScoreWriter:
    """Adds the scores of one process to a store.

    A context: left without an error, or by Ctrl-C, it writes what is still in memory.

    Parameters
    ----------
    folder : of the store; made if missing.
    settings : what decides a score, as JSON has it. A store of other settings is refused.
    made_by : versions and names worth knowing that do not decide.
    shard : (place of this process, number of processes): only for the names of files.
    flush_samples, flush_seconds : samples and seconds after which a part is written, whichever
        comes first.

    Attributes
    ----------
    store : what was there at the start.

    Raises
    ------
    OptionError
        The folder holds scores of other settings, or another process writes this shard.
    CheckpointError
        What is there is damaged.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: Mapping[str, Any],
        made_by: Mapping[str, Any] | None = None,
        *,
        shard: tuple[int, int] = (0, 1),
        flush_samples: int = 64,
        flush_seconds: float = 60.0,
    ) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._prefix = f"part-{shard[0] + 1}-of-{shard[1]}"
        self._lock = lock(self.folder / f".{self._prefix}.lock")
        if self._lock is None:
            raise OptionError(
                f"Another process is ranking shard {shard[0] + 1}/{shard[1]} into {self.folder}. "
                "Wait for it, or give every process a --shard of its own."
            )
        try:
            _settle(self.folder, settings, made_by or {})
            self.store = ScoreStore(self.folder)
        except BaseException:
            self.close()
            raise
        for left_over in self.folder.glob(f".{self._prefix}-*.partial"):
            left_over.unlink()
        self._flush_samples = flush_samples
        self._flush_seconds = flush_seconds
        self._flushed = time.monotonic()
        self._entries: list[Entry] = []
        self._tensors: dict[str, Tensor] = {}

    def __enter__(self) -> ScoreWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None or issubclass(kind, KeyboardInterrupt):
                self.flush()
        finally:
            self.close()

    def add(self, id: str, scores: Tensor, prompt: Prompt) -> None:
        """Add the scores of a sample, ``(visual,)``, and whose they are."""
        packed = pack(scores)
        row = len(self._entries)
        digest = prompt_digest(prompt)
        # Interrupted in between, a tensor without an entry does no harm.
        self._tensors |= tensors_of(row, packed)
        self._entries.append(describe(id, row, packed, prompt.num_frames, digest))
        self._flush_if_full()

    def add_damaged(self, id: str, reason: str) -> None:
        """Note that a sample cannot be ranked, and why."""
        self._entries.append(Entry(id, damaged=reason))
        self._flush_if_full()

    def flush(self) -> None:
        """Write what is in memory as a part of its own."""
        self._flushed = time.monotonic()
        if not self._entries:
            return
        number = 0
        while (self.folder / f"{self._prefix}-{number}.jsonl").exists():
            number += 1
        name = f"{self._prefix}-{number}"
        entries, shards = write_shard(self.folder, name, self._entries, self._tensors)
        write_index(self.folder / f"{name}.jsonl", shards, entries)
        self._entries, self._tensors = [], {}

    def close(self) -> None:
        """Let another process write this shard."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _flush_if_full(self) -> None:
        waited = time.monotonic() - self._flushed
        if len(self._entries) >= self._flush_samples or waited >= self._flush_seconds:
            self.flush()


def merge(folder: str | Path, order: Sequence[str], shard_samples: int = SHARD_SAMPLES) -> bool:
    """Bring a store into its final form, once every sample of ``order`` is there.

    Shards and index then depend on the samples alone, byte for byte, however many processes ranked
    them and however often they were killed. What is there beyond ``order`` comes after it, by id.

    Returns
    -------
    Whether all of ``order`` is there; if not, nothing is done.

    Raises
    ------
    CheckpointError
        A part is damaged.
    """
    folder = Path(folder)
    # To wait matters: of two processes that finish at once, the second one sees everything.
    held = lock(folder / ".merge.lock", wait=True)
    assert held is not None
    try:
        # Listed before they are read: a part that another process adds now stays.
        parts = sorted(folder.glob("part-*.jsonl"))
        store = ScoreStore(folder)
        wanted = dict.fromkeys(order)
        if not wanted.keys() <= store.entries.keys():
            return False
        if parts:
            _write_merged(store, [*wanted, *sorted(store.entries.keys() - wanted)], shard_samples)
            # The parts are now only copies, and what no index names does not exist.
            for path in parts:
                path.unlink()
        _sweep(folder)
        return True
    finally:
        os.close(held)


def _write_merged(store: ScoreStore, ids: list[str], shard_samples: int) -> None:
    """Write shards of ``ids`` in that order, and then the index that names them."""
    store.verify()
    entries: list[Entry] = []
    shards: dict[str, str] = {}
    for start in range(0, len(ids), shard_samples):
        # Named by what they hold, they replace nothing that an older index names.
        name = f"scores-{start // shard_samples:05d}-*"
        taken = store.take(ids[start : start + shard_samples])
        named, written = write_shard(store.folder, name, *taken)
        entries += named
        shards |= written
    write_index(store.folder / INDEX, shards, entries)


def _sweep(folder: Path) -> None:
    """Delete what no index names, unless the process that writes it may be alive."""
    named = ScoreStore(folder).checksums.keys()
    left_over = [p for p in folder.glob("*.safetensors") if p.name not in named]
    for path in [*left_over, *folder.glob(".*.partial")]:
        part = re.match(r"\.?(part-\d+-of-\d+)-", path.name)
        held = lock(folder / f".{part[1]}.lock") if part else None
        if part is not None and held is None:
            continue
        try:
            path.unlink(missing_ok=True)
        finally:
            if held is not None:
                os.close(held)


def prompt_digest(prompt: Prompt) -> str:
    """Digest of a prompt's token ids and of which of them are ranked: what scores belong to."""
    ids = prompt.layout.ids.to(torch.int64).numpy().tobytes()
    visual = prompt.layout.visual.to(torch.uint8).numpy().tobytes()
    return hashlib.sha256(ids + visual).hexdigest()[:16]


def different(settings: Mapping[str, Any], others: Mapping[str, Any]) -> list[str]:
    """Name the settings in which two stores differ, with both values."""
    return [
        f"{name} ({settings.get(name)!r} there, {others.get(name)!r} here)"
        for name in dict.fromkeys([*settings, *others])
        if settings.get(name) != others.get(name)
    ]


def _settle(folder: Path, settings: Mapping[str, Any], made_by: Mapping[str, Any]) -> None:
    """Write the settings of a new store, or compare them with those of an old one."""
    held = lock(folder / ".settings.lock", wait=True)
    assert held is not None
    try:
        if not (folder / SETTINGS).exists():
            record = {"format": FORMAT, "settings": dict(settings), "made_by": dict(made_by)}
            content = json.dumps(record, indent=1, ensure_ascii=False)
            replace_file(folder / SETTINGS, f"{content}\n".encode())
            return
        # As JSON has them: a tuple comes back as a list.
        mine = json.loads(json.dumps(settings))
        there = _read_settings(folder)
        differ = different(there["settings"], mine)
        if differ:
            raise OptionError(
                f"{folder} holds scores of {there['made_by'].get('model', 'a model')} with other "
                f"settings: {', '.join(differ)}. Choose another --out, or rank with the same "
                "settings."
            )
    finally:
        os.close(held)


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise CheckpointError(
                f"{path} has format {record['format']}, this version reads {FORMAT}. Rank again "
                "into another folder, or use the version that wrote it."
            )
        return {"settings": dict(record["settings"]), "made_by": dict(record["made_by"])}
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} holds no scores of a teacher: there is no {SETTINGS}. Name a folder that "
            "flexselect rank has written."
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}. Copy the store again.") from error


def _read_indices(folder: Path) -> Iterator[tuple[dict[str, str], list[Entry]]]:
    """Yield what the indices of a folder say, the final one first."""
    while True:
        paths = [path for path in [folder / INDEX] if path.exists()]
        paths += sorted(folder.glob("part-*.jsonl"))
        try:
            read = [read_index(path) for path in paths]
        except FileNotFoundError:
            continue  # another process has just merged the parts
        yield from read
        return
