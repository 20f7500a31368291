"""How the layers of a model look at one question: relevance and states of every layer wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..core.decoder import check_layer
from ..core.errors import OptionError, VideoError
from ..core.layout import Grid
from ..core.relevance import check_aggregation
from ..core.selection import Selection
from ..inference.features import Progress
from ..inference.methods import FlexSelect
from ..inference.scoring import embed_layers, score_layers
from ..inference.session import Video
from ..testbed.videos import read_sidecar
from .asked import ask_layers
from .needles import needle_tokens

#: Most visual tokens whose states are compared; more would only lie on top of each other.
POINTS = 600

#: Most layers shown where none are named.
LAYERS = 6


@dataclass(frozen=True, eq=False)
class Look:
    """One question as several layers see it.

    Attributes
    ----------
    video, question : what was asked.
    selection : what the method keeps at its own layer.
    layer : the method's own layer.
    scores : layer to float32 ``(visual,)``.
    points : int64 ``(n,)``, the visual tokens whose states were taken, ascending.
    states : layer to float32 ``(n, hidden)``.
    needle : bool ``(visual,)``, where a sidecar beside the video says what the answer is read
        from, and sampling did not miss it; else None.
    """

    video: Video
    question: str
    selection: Selection
    layer: int
    scores: dict[int, Tensor]
    points: Tensor
    states: dict[int, Tensor]
    needle: Tensor | None

    @property
    def grid(self) -> Grid:
        """Which part of its picture each visual token of a frame shows."""
        return self.video.engine.architecture.grid(self.video.clip)

    def frame_relevance(self, layer: int) -> Tensor:
        """Relevance of the best token of every frame: float32 ``(frames,)``."""
        return self.scores[layer].view(self.video.clip.frames, -1).amax(1)

    def best_frames(self, count: int) -> list[int]:
        """Frames to look at, in order of time: those of the needle, then the most relevant.

        Neighbours are much alike, so where there is a choice frames are a while apart.
        """
        times = self.video.times.tolist()
        apart = (times[-1] - times[0]) / (3 * count)
        order = self.frame_relevance(self.layer).argsort(descending=True, stable=True).tolist()
        chosen: list[int] = []
        if self.needle is not None:
            shown = self.needle.view(self.video.clip.frames, -1).any(1).nonzero()[:, 0].tolist()
            chosen = shown[:count]
        for least in (apart, 0.0):
            for frame in order:
                far = all(abs(times[frame] - times[other]) >= least for other in chosen)
                if len(chosen) < count and frame not in chosen and far:
                    chosen.append(frame)
        return sorted(chosen)

    def needle_rank(self, layer: int) -> int | None:
        """How many visual tokens rank at or above the needle's best one, itself included."""
        if self.needle is None:
            return None
        scores = self.scores[layer]
        return int((scores >= scores[self.needle].max()).sum())


def look(
    video: Video,
    question: str,
    layers: Sequence[int] | None = None,
    *,
    states: bool = True,
    progress: Progress | None = None,
) -> Look:
    """See one question through several layers, each set walked through them once.

    Parameters
    ----------
    video : opened with `FlexSelect`.
    question : in words.
    layers : 0-based; default: at most `LAYERS`, evenly spaced, with the method's own.
    states : also take the states of some visual tokens, for `embeddings`.
    progress : called with ("rank", sets done, sets).

    Raises
    ------
    OptionError
        A layer is not there, or the video was opened with a method that does not rank.
    """
    engine = video.engine
    asked = ask_layers(video, question)
    method = engine.method
    assert isinstance(method, FlexSelect)
    assert method.layer is not None
    chosen = sorted({check_layer(i, asked.num_layers) for i in layers or ()})
    if not chosen:
        chosen = _spread(asked.num_layers, method.layer)
    if layers is not None and not layers:
        raise OptionError("No layer to look at; name some, such as --layers 0,2,4.")
    every = sorted({*chosen, method.layer})
    aggregation = check_aggregation(str(method.aggregation))
    found = score_layers(
        asked.prompt,
        asked.sets,
        asked.features,
        asked.scorer,
        layers=every,
        aggregations=(aggregation,),
        sets_per_batch=method.sets_per_batch,
        progress=progress,
    )
    selection = engine.select(asked.encoded)
    assert selection is not None
    selection.settings.update(video.record, question=question)
    needle = _needle(video, question)
    points = _points(selection, needle)
    taken: dict[int, Tensor] = {}
    if states:
        taken = embed_layers(
            asked.prompt,
            asked.sets,
            asked.features,
            asked.scorer,
            layers=every,
            members=points,
            sets_per_batch=method.sets_per_batch,
        )
    scores = {layer: found[layer, aggregation] for layer in every}
    return Look(video, question, selection, method.layer, scores, points, taken, needle)


def _spread(layers: int, own: int) -> list[int]:
    """Choose layers from the first to the last, with the method's own among them."""
    if layers <= LAYERS:
        return list(range(layers))
    even = torch.linspace(0, layers - 1, LAYERS).round().long().tolist()
    nearest = min(range(LAYERS), key=lambda i: abs(even[i] - own))
    even[nearest] = own
    return sorted(set(even))


def _points(selection: Selection, needle: Tensor | None) -> Tensor:
    """Choose visual tokens to compare: the needle's and kept ones first, others by lot."""
    count = selection.num_visual
    draw = torch.rand(count, generator=torch.Generator().manual_seed(0))
    kept = torch.zeros(count, dtype=torch.bool)
    kept[selection.kept] = True
    # No more than half are kept ones, or there would be nothing to compare them with.
    few = (kept & (draw < POINTS / 2 / max(1, len(selection.kept)))).double()
    wanted = draw.double() + 1.5 * few
    if needle is not None:
        wanted += 4 * needle.double()
    return wanted.argsort(descending=True, stable=True)[:POINTS].sort().values


def _needle(video: Video, question: str) -> Tensor | None:
    """Mark what a sidecar beside the video says about this very question."""
    try:
        told = read_sidecar(Path(str(video.record["video"])))
    except VideoError:
        return None
    for known in told.questions:
        if known.text.strip() == question.strip():
            marked = needle_tokens(video, known)
            return marked if bool(marked.any()) else None
    return None
