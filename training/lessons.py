"""From samples to lessons: what the tower sees, what the teacher says, and a memory for both."""

from __future__ import annotations

import logging
from collections.abc import Sequence
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
    """

    def __init__(self, architecture: Architecture, teacher: Teacher) -> None:
        self._architecture = architecture
        self._teacher = teacher
        self._latest: tuple[Pixels, Tensor, Tensor] | None = None

    def __call__(self, entries: Sequence[Any]) -> list[Lesson]:
        """Turn samples into lessons; lessons pass through."""
        return [e if isinstance(e, Lesson) else self.lesson(e) for e in entries]

    @torch.no_grad()
    def lesson(self, sample: Sample) -> Lesson:
        """Run the tower and ask the teacher."""
        features, states = self._seen(sample.pixels)
        scores = self._teacher.scores(sample, features)
        return Lesson(sample.prompt, states, scores.float().cpu(), sample.example.id)

    def _seen(self, pixels: Pixels) -> tuple[Tensor, Tensor]:
        """Encode a clip, unless it is the one of the sample before."""
        if self._latest is None or self._latest[0] is not pixels:
            family, model = family_of(self._architecture), self._architecture.model
            count = pixels.clip.frames
            parts = [
                family.encode_states(model, pixels.frames(start, min(start + _FRAMES, count)))
                for start in range(0, count, _FRAMES)
            ]
            features, states = (torch.cat(part) for part in zip(*parts, strict=True))
            self._latest = pixels, features, states
        return self._latest[1], self._latest[2]


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

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample | Lesson:
        for step in range(len(self)):
            at = (index + step) % len(self)
            if at in self.damaged:
                continue
            if at in self._lessons:
                return self._lessons[at]
            sample = self._samples[at]
            if isinstance(sample, Damaged):
                self.damaged[at] = sample.reason
                logger.warning("left out: %s", sample.reason)
                continue
            if self._tutor is None:
                return sample
            self._lessons[at] = self._tutor.lesson(sample)
            return self._lessons[at]
        raise FlexSelectError(
            f"All {len(self)} samples are damaged, for example: {next(iter(self.damaged.values()))}"
        )
