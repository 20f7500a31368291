"""Time by stage, and the moment the first token of an answer comes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from .features import Progress


class Clock:
    """Adds up time by stage, waiting for the device at each change of stage.

    Attributes
    ----------
    seconds : stage to seconds so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        self._stage: str | None = None
        self._since = 0.0

    def start(self, stage: str) -> None:
        """End the stage that runs, if any, and begin another."""
        self.stop()
        self._stage, self._since = stage, time.perf_counter()

    def stop(self) -> None:
        """End the stage that runs, if any."""
        if self._stage is not None:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            spent = time.perf_counter() - self._since
            self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + spent
            self._stage = None

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time a block."""
        self.start(stage)
        yield
        self.stop()


class Tee(BaseStreamer):
    """Notes when the first token comes, and passes everything on to the caller's streamer."""

    def __init__(self, clock: Clock, progress: Progress | None, streamer: Any | None) -> None:
        self._clock = clock
        self._progress = progress
        self._streamer = streamer
        self._calls = 0

    def put(self, value: Tensor) -> None:
        """Take the prompt's ids, then one token after the other."""
        if self._calls == 1:
            self._clock.start("answer")
        if self._calls and self._progress is not None:
            self._progress("answer", self._calls, 0)
        self._calls += 1
        if self._streamer is not None:
            self._streamer.put(value)

    def end(self) -> None:
        """Note the end of the answer."""
        if self._streamer is not None:
            self._streamer.end()
