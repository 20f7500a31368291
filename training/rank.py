"""Rank: write a teacher's scores of a data set once, so that training needs no big model."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from ..core.architecture import Architecture, Pixels
from ..core.errors import FlexSelectError, OptionError, VideoError
from ..inference.features import Progress, encode
from ..inference.registry import architecture_of
from .examples import Example
from .samples import Damaged, SampleLoader, SampleSet
from .store import ScoreStore, ScoreWriter, merge
from .teacher import OnlineTeacher

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankReport:
    """What a run of `rank` did.

    Attributes
    ----------
    ranked : samples whose scores it added.
    present : samples of its shard that were there before.
    scored : samples of its shard that have scores now.
    damaged : id to reason of the samples of its shard that cannot be ranked.
    complete : whether every sample of the data is accounted for, over all shards.
    """

    ranked: int
    present: int
    scored: int
    damaged: dict[str, str]
    complete: bool

    def check(self) -> None:
        """Raise `VideoError` if there was something to rank and nothing could be."""
        if self.damaged and not self.scored:
            first = next(iter(self.damaged.values()))
            raise VideoError(
                f"None of {len(self.damaged)} samples could be ranked. The first one: {first} Do "
                "the videos lie in the folder of --videos? With --retry they are tried again."
            )


def rank(
    model: Any,
    processor: Any,
    examples: Sequence[Example],
    out: str | Path,
    *,
    sampling: Mapping[str, Any] | None = None,
    layer: int | None = None,
    aggregation: str | None = None,
    query: str | None = None,
    frames_per_set: int | None = None,
    shard: tuple[int, int] = (0, 1),
    workers: int = 0,
    retry: bool = False,
    flush_samples: int = 64,
    progress: Progress | None = None,
) -> RankReport:
    """Score the samples of ``examples`` that are not in the store ``out`` yet.

    Killed at any moment, the same call goes on where it stopped. Several processes may work on one
    store, each with its ``shard``; the last one to finish brings it into its final form.

    Parameters
    ----------
    model, processor : of a supported family.
    examples : the whole data set; a process takes the videos of its shard.
    out : folder of the store.
    sampling : as in `SampleSet`.
    layer, aggregation, query, frames_per_set : as in `OnlineTeacher`.
    shard : (place of this process, number of processes).
    workers : processes that decode.
    retry : try again what was damaged before.
    flush_samples : as in `ScoreWriter`.
    progress : called with ("rank", samples done, samples of this shard).

    Raises
    ------
    OptionError
        An option is out of range, or ``out`` holds scores of other settings.
    CheckpointError
        What ``out`` holds is damaged.
    """
    architecture = architecture_of(model)
    mine = examples_of_shard(examples, shard)
    whole = SampleSet(mine, architecture, processor, sampling)
    teacher = OnlineTeacher(
        architecture,
        layer=layer,
        aggregation=aggregation,
        query=query,
        frames_per_set=frames_per_set,
        sampling=whole.policy,
    )
    added = 0
    with ScoreWriter(
        out, teacher.settings, _made_by(architecture), shard=shard, flush_samples=flush_samples
    ) as writer:
        there = set(writer.store.entries)
        if retry:
            there -= writer.store.damaged.keys()
        todo = [example for example in mine if example.id not in there]
        present = len(mine) - len(todo)
        seen = Encoder(architecture)
        if progress is not None:
            progress("rank", present, len(mine))
        samples = SampleSet(todo, architecture, processor, sampling)
        loader = SampleLoader(samples, shuffle=False, workers=workers)
        for done, sample in enumerate(loader.epoch(0), start=1):
            if isinstance(sample, Damaged):
                logger.warning("%s is left out. %s", sample.example.id, sample.reason)
                writer.add_damaged(sample.example.id, sample.reason)
            else:
                scores = teacher.scores(sample, seen(sample.pixels))
                if not bool(scores.isfinite().all()):
                    raise FlexSelectError(
                        f"{sample.example.id}: relevance is not finite. The model overflowed below "
                        "its reference layer; load it in bfloat16 or float32 instead of float16."
                    )
                writer.add(sample.example.id, scores, sample.prompt)
                added += 1
            if progress is not None:
                progress("rank", present + done, len(mine))
    complete = merge(out, [example.id for example in examples])
    reasons = ScoreStore(out).damaged
    damaged = {example.id: reasons[example.id] for example in mine if example.id in reasons}
    return RankReport(added, present, len(mine) - len(damaged), damaged, complete)


class Encoder:
    """Features of the main model for one video after another, remembered while it is the same."""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture
        self._latest: tuple[Pixels, Tensor] | None = None

    def __call__(self, pixels: Pixels) -> Tensor:
        """Return host features ``(feature tokens, hidden)`` of one video's pixels."""
        if self._latest is None or self._latest[0] is not pixels:
            self._latest = (pixels, encode(self.architecture, [pixels]).model)
        return self._latest[1]


def examples_of_shard(examples: Sequence[Example], shard: tuple[int, int]) -> list[Example]:
    """Return the examples of every n-th video, so that no video is decoded by two processes."""
    place, processes = shard
    number: dict[Path, int] = {}
    for example in examples:
        number.setdefault(example.video, len(number))
    return [example for example in examples if number[example.video] % processes == place]


def parse_shard(text: str | None, environment: Mapping[str, str]) -> tuple[int, int]:
    """Return (place, processes) of ``--shard i/n``, else of what torchrun and accelerate set.

    The place is counted from 0 here, and from 1 in the text.

    Raises
    ------
    OptionError
        The text is no such pair, or the variables RANK and WORLD_SIZE are not.
    """
    if text is not None:
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise OptionError(
                f"--shard must be i/n, such as 1/4 to 4/4 for four processes, got {text!r}."
            )
        return int(found[1]) - 1, int(found[2])
    if "WORLD_SIZE" not in environment:
        return 0, 1
    place, processes = environment.get("RANK", ""), environment["WORLD_SIZE"]
    if not (place.isdecimal() and processes.isdecimal() and int(place) < int(processes)):
        raise OptionError(
            f"RANK={place!r} and WORLD_SIZE={processes!r} of the environment name no shard. Unset "
            "them, start with torchrun or accelerate, or give --shard."
        )
    return int(place), int(processes)


def _made_by(architecture: Architecture) -> dict[str, Any]:
    """Name what is worth knowing of a run and does not decide whose scores these are."""
    return {
        "model": architecture.model.config._name_or_path,
        "attention": architecture.decoder.config._attn_implementation,
        "flexselect": version("flexselect"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
