"""From samples to lessons: what the tower sees, what the teacher says, and a memory for both."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..core.architecture import Architecture, Pixels
from ..core.errors import FlexSelectError
from .samples import Damaged, Sample, SampleSet
from .student import Lesson, family_of

logger = logging.getLogger(__name__)

#: Most frames in the tower at a time, as in `inference.features`.
_FRAMES = 32


class Teacher(Protocol):
    """Says how relevant every visual token of a sample is."""

    def scores(self, sample: Sample, features: Tensor) -> Tensor:
        """Return float32 ``(visual,)``; ``features`` are the model's, ``(feature tokens, …)``."""


class Tutor:
    """Makes lessons of samples, without gradients.

    Parameters
    ----------
    architecture : of the model whose tower the student shares.
    teacher : online, or one that has its scores stored.
    remember : videos whose features are kept for the next question about them.
    """

    def __init__(self, architecture: Architecture, teacher: Teacher, remember: int = 1) -> None:
        self._architecture = architecture
        self._teacher = teacher
        self._remember = remember
        self._latest: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, entries: Sequence[Any]) -> list[Lesson]:
        """Turn samples into lessons; lessons pass through."""
        return [e if isinstance(e, Lesson) else self.lesson(e) for e in entries]

    @torch.no_grad()
    def lesson(self, sample: Sample) -> Lesson:
        """Run the tower and ask the teacher."""
        features, states = self._seen(sample)
        scores = self._teacher.scores(sample, features)
        return Lesson(sample.prompt, states, scores.float().cpu(), sample.example.id)

    def _seen(self, sample: Sample) -> tuple[Tensor, Tensor]:
        """Encode a clip, unless that was done lately.

        Known by its file: pixels that come out of a worker are new objects every time.
        """
        name = str(sample.example.video)
        seen = self._latest.pop(name, None)
        if seen is None:
            while len(self._latest) >= self._remember:
                del self._latest[next(iter(self._latest))]
            seen = self._encode(sample.pixels)
        self._latest[name] = seen
        return seen

    def _encode(self, pixels: Pixels) -> tuple[Tensor, Tensor]:
        family, model = family_of(self._architecture), self._architecture.model
        count = pixels.clip.frames
        parts = [
            family.encode_states(model, pixels.frames(start, min(start + _FRAMES, count)))
            for start in range(0, count, _FRAMES)
        ]
        features, states = (torch.cat(part) for part in zip(*parts, strict=True))
        return features, states


@dataclass(frozen=True, eq=False)
class Page:
    """An entry of a `Schoolbook`, and what was damaged on the way to it, by index.

    In a worker the book is a copy: what it finds must travel with the entry to be counted.
    """

    entry: Any
    damaged: dict[int, str]


class Schoolbook(Dataset[Any]):
    """Samples in the place of damaged ones too, and in memory once they became lessons.

    The place of a damaged sample is taken by the next good one, so that every process has as much
    to do in every step; each is named once and counted.

    Parameters
    ----------
    samples : which may be damaged.
    tutor : given, lessons are made here and remembered; else entries are samples.
    """

    def __init__(self, samples: SampleSet, tutor: Tutor | None = None) -> None:
        self._samples = samples
        self._tutor = tutor
        self._lessons: dict[int, Lesson] = {}
        self.damaged: dict[int, str] = {}
        self._named: set[str] = set()

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Page:
        met: dict[int, str] = {}
        for step in range(len(self)):
            at = (index + step) % len(self)
            if at in self.damaged:
                met[at] = self.damaged[at]
                continue
            if at in self._lessons:
                return Page(self._lessons[at], met)
            sample = self._samples[at]
            if isinstance(sample, Damaged):
                self.damaged[at] = met[at] = sample.reason
                continue
            if self._tutor is None:
                return Page(sample, met)
            self._lessons[at] = self._tutor.lesson(sample)
            return Page(self._lessons[at], met)
        raise FlexSelectError(
            f"All {len(self)} samples are damaged, for example: {next(iter(self.damaged.values()))}"
        )

    def note(self, damaged: Mapping[int, str]) -> None:
        """Count what was damaged on the way to a batch, and name each once."""
        for index, reason in damaged.items():
            if reason not in self._named:
                self._named.add(reason)
                logger.warning("left out: %s", reason)
            self.damaged[index] = reason
