"""Time and memory of a stage: the device waited for, processor time beside elapsed time."""

from __future__ import annotations

import ctypes
import ctypes.util
import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Meter:
    """Collects the times of stages over repeats.

    Attributes
    ----------
    runs : one dict a repeat: stage to (elapsed seconds, processor seconds of all threads).
    """

    def __init__(self, device: torch.device) -> None:
        self.runs: list[dict[str, tuple[float, float]]] = []
        self._device = device

    def next_run(self) -> None:
        """Begin a repeat."""
        self.runs.append({})

    def now(self) -> tuple[float, float]:
        """Wait for the device; return elapsed and processor time."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter(), time.process_time()

    def add(self, stage: str, since: tuple[float, float]) -> tuple[float, float]:
        """Add what has passed ``since`` to a stage; return now."""
        now = self.now()
        wall, cpu = self.runs[-1].get(stage, (0.0, 0.0))
        self.runs[-1][stage] = (wall + now[0] - since[0], cpu + now[1] - since[1])
        return now

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time a block."""
        since = self.now()
        yield
        self.add(stage, since)

    def medians(self) -> dict[str, dict[str, float]]:
        """Return, by stage, the medians over repeats: ``wall`` and ``cpu`` in seconds."""
        stages = list(self.runs[0]) if self.runs else []
        return {
            stage: {
                "wall": median(run[stage][0] for run in self.runs),
                "cpu": median(run[stage][1] for run in self.runs),
            }
            for stage in stages
        }


class FirstToken(BaseStreamer):
    """Splits a generation at its first token: prefill before, further tokens after."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._calls = 0
        self._since = meter.now()

    def put(self, value: Any) -> None:
        """Take the prompt's ids, then one token after the other."""
        if self._calls == 1:
            self._since = self._meter.add("prefill", self._since)
        self._calls += 1

    def end(self) -> None:
        """Note the end."""
        self._meter.add("further", self._since)


class Peak:
    """Peak memory of a block, in MiB, on host and device.

    The host's is the growth of the process's resident set; None where the system does not tell.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.host: float | None = None
        self.device: float | None = None

    def __enter__(self) -> Peak:
        gc.collect()
        _give_back()
        self._before = _reset_high_water()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        return self

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            self.device = torch.cuda.max_memory_allocated(self._device) / 2**20
        if self._before is not None:
            self.host = (_high_water() - self._before) / 1024


def _give_back() -> None:
    """Return freed memory to the system, so that using it again counts as growth."""
    name = ctypes.util.find_library("c")
    trim = getattr(ctypes.CDLL(name), "malloc_trim", None) if name else None
    if trim is not None:
        trim(0)


def _reset_high_water() -> int | None:
    """Lower the high-water mark to what is resident now; return that in KiB, None if impossible."""
    try:
        _CLEAR.write_text("5")
        return _high_water()
    except OSError:
        return None


def _high_water() -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1])
