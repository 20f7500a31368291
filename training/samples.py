"""Samples: a video's pixels and the prompt of one question about it, ready for tower and teacher.

Decoding is the slow part, so it happens in worker processes, and questions of one video that
follow each other share it. What a sample holds and where it stands depend on seed and epoch alone,
never on the number of workers or processes or on where a run was resumed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest
from types import SimpleNamespace
from typing import Any

from torch.utils.data import DataLoader, Dataset

from ..core.architecture import Architecture, Pixels
from ..core.errors import OptionError, PromptError, VideoError
from ..core.layout import Prompt
from ..inference.pictures import ask_about, read_pixels
from ..inference.policy import resolve_sampling
from ..inference.presets import preset_of
from .examples import Example

#: Pictures of a training video, as the reference samples them.
FRAMES = 64

#: Most questions of one video that go to a worker as one piece of work.
_MOST_TOGETHER = 16


@dataclass(frozen=True, eq=False)
class Sample:
    """One question about one video; every tensor lies on the host.

    Attributes
    ----------
    example : what it is made of.
    pixels : for the tower. Samples of one video that follow each other share one object.
    prompt : in the main model's tokens; the rows that ask are the text after the video.
    """

    example: Example
    pixels: Pixels
    prompt: Prompt


@dataclass(frozen=True)
class Damaged:
    """An example that gives no sample, and why, as a sentence that names the file."""

    example: Example
    reason: str


class SampleSet(Dataset[Sample | Damaged]):
    """Makes the samples of examples; the same index gives the same sample in any process.

    Parameters
    ----------
    examples : of which data set.
    architecture : of the main model; its weights are not kept.
    processor : of the main model.
    sampling : options of `open_video` that choose and size pictures; what is not given comes from
        the model's preset. Default: `FRAMES` pictures.
    backend : decoder.
    remember : videos whose pixels are kept for the next question about them.

    Attributes
    ----------
    policy : how every video is sampled, in full.

    Raises
    ------
    OptionError
        An option of ``sampling`` is unknown or out of range.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        architecture: Architecture,
        processor: Any,
        sampling: Mapping[str, Any] | None = None,
        backend: str = "pyav",
        remember: int = 1,
    ) -> None:
        if remember < 1:
            raise OptionError(f"remember must be at least 1, got {remember}.")
        self.examples = list(examples)
        preset = preset_of(architecture)
        asked = {"frames": FRAMES} if sampling is None else sampling
        self.policy: dict[str, Any] = resolve_sampling(architecture, preset, asked)
        # Workers need the family and the config: without the weights they start under any method
        # of starting processes, and fork no tensor of an accelerator.
        self.architecture = type(architecture)(SimpleNamespace(config=architecture.model.config))
        self.processor = processor
        self.backend = backend
        self.remember = remember
        self._latest: dict[str, Pixels | str] = {}

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Sample | Damaged:
        example = self.examples[index]
        pixels = self._pixels(example)
        if isinstance(pixels, str):
            return Damaged(example, pixels)
        try:
            prompt = ask_about(self.architecture, self.processor, pixels.clip, example.question)
        except PromptError as error:
            return Damaged(example, f"{example.id}: the question cannot be asked: {error}")
        return Sample(example, pixels, prompt)

    def _pixels(self, example: Example) -> Pixels | str:
        """Decode a video unless that was done lately; a text says why there is nothing."""
        name = str(example.video)
        pixels = self._latest.pop(name, None)
        if pixels is None:
            while len(self._latest) >= self.remember:
                del self._latest[next(iter(self._latest))]
            pixels = self._decode(example)
        self._latest[name] = pixels
        return pixels

    def _decode(self, example: Example) -> Pixels | str:
        try:
            pixels, report = read_pixels(
                self.architecture, self.processor, example.video, self.policy, self.backend
            )
        except VideoError as error:
            return str(error)
        # With holes, the frames that are left would be taught at the wrong times.
        return report.message or pixels


class SampleLoader:
    """Iterates over samples in a seeded order, decoded ahead by workers.

    Parameters
    ----------
    samples : of which set.
    seed : decides the order of every epoch.
    shuffle : False keeps the order of the examples.
    together : questions of one video follow each other, so that it is decoded once. The videos are
        shuffled, and the questions of each. False shuffles questions without regard to videos.
    lanes : videos that are asked about in turn. With 1 all questions of a video stand in a row, so
        a step of several samples sees few videos. With a multiple of the samples of a step, each of
        its samples is of another video, and the questions of a video come to the same place of
        every so many-th step: one process and one of its workers see them, one after another.
    workers : processes that decode; 0 decodes in this one.
    prefetch : pieces of work that each worker is ahead.
    """

    def __init__(
        self,
        samples: SampleSet,
        *,
        seed: int = 0,
        shuffle: bool = True,
        together: bool = True,
        lanes: int = 1,
        workers: int = 0,
        prefetch: int = 2,
    ) -> None:
        if workers < 0 or prefetch < 1 or lanes < 1:
            raise OptionError("workers must be at least 0, and prefetch and lanes at least 1.")
        self.samples = samples
        self.seed = seed
        self.shuffle = shuffle
        self.together = together
        self.lanes = lanes
        self.workers = workers
        self.prefetch = prefetch

    def __len__(self) -> int:
        """Count the samples of an epoch."""
        return len(self.samples)

    def order(self, epoch: int) -> list[int]:
        """Return the examples of an epoch, in order."""
        indices = list(range(len(self.samples)))
        if not self.shuffle:
            return indices
        draw = random.Random(f"epoch {epoch} of seed {self.seed}")
        draw.shuffle(indices)
        if not self.together:
            return indices
        films: dict[str, list[int]] = {}
        for index in indices:
            films.setdefault(str(self.samples.examples[index].video), []).append(index)
        lanes: list[list[int]] = [[] for _ in range(self.lanes)]
        for film in films.values():
            min(lanes, key=len).extend(film)
        turns = zip_longest(*lanes)
        return [index for turn in turns for index in turn if index is not None]

    def epoch(self, number: int, start: int = 0) -> Iterator[Sample | Damaged]:
        """Yield the samples of epoch ``number``, from sample ``start`` on.

        What lies before ``start`` is not decoded.
        """
        batches = list(self._batches(self.order(number)[start:]))
        loader: DataLoader[list[Sample | Damaged]] = DataLoader(
            self.samples,  # type: ignore[arg-type]
            batch_sampler=batches,
            collate_fn=_as_list,
            num_workers=min(self.workers, len(batches)),
            prefetch_factor=self.prefetch if self.workers and batches else None,
        )
        for batch in loader:
            yield from batch

    def _batches(self, indices: list[int]) -> Iterator[list[int]]:
        """Cut a list into neighbours of the same video: one piece of work each."""
        for _, run in groupby(indices, key=lambda i: self.samples.examples[i].video):
            film = list(run)
            for start in range(0, len(film), _MOST_TOGETHER):
                yield film[start : start + _MOST_TOGETHER]


def _as_list(batch: list[Sample | Damaged]) -> list[Sample | Damaged]:
    """Keep samples as they are: of different sizes, and those of one video with one tensor."""
    return batch
