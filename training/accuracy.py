"""Does the selector serve its purpose? Right answers about long videos, Lite beside training-free.

The rankings a selector is trained on say little about that: most tokens are bulk. So the last step
of a training on the testbed is the whole way from video file to answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..inference.engine import Engine
from ..inference.features import Progress
from ..inference.methods import FlexSelect
from ..inference.session import Video, open_video
from ..testbed.questions import RETRIEVAL
from ..testbed.videos import NeedleVideo, make_needle_video

#: Longest answer of the testbed, in tokens.
_ANSWER = 4


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers of both methods to the same questions.

    Attributes
    ----------
    lite, training_free : shares.
    lite_recall, training_free_recall : share of the questions of which a needle's token was kept.
    questions, frames, visual_tokens, kept_tokens : how many of each.
    """

    lite: float
    training_free: float
    lite_recall: float
    training_free_recall: float
    questions: int
    frames: int
    visual_tokens: int
    kept_tokens: int


def needle_videos(
    folder: Path,
    *,
    split: str,
    frames: int,
    count: int,
    questions: int,
    progress: Progress | None = None,
    stage: str = "render",
) -> list[NeedleVideo]:
    """Render needle videos of a split with retrieval questions; those that are there stay."""
    videos = []
    for index in range(count):
        tasks = [RETRIEVAL[(index * questions + i) % len(RETRIEVAL)] for i in range(questions)]
        path = folder / f"{split}-{frames:04d}-{index:05d}.mp4"
        videos.append(make_needle_video(path, split=split, index=index, frames=frames, tasks=tasks))
        if progress is not None:
            progress(stage, index + 1, count)
    return videos


@torch.no_grad()
def compare(
    model: Any,
    processor: Any,
    selector: Any,
    videos: Sequence[NeedleVideo],
    progress: Progress | None = None,
) -> Accuracy:
    """Ask every question of ``videos`` twice: with the selector, and training-free.

    Both see the same encoded video and keep as many tokens, as the model's preset says.

    Parameters
    ----------
    model, processor : of the testbed.
    selector : for this model.
    videos : with their questions.
    progress : called with ("ask", videos done, videos).
    """
    lite, free = (Engine(model, FlexSelect(selector=s)) for s in (selector, None))
    right = {"lite": 0, "free": 0}
    found = {"lite": 0, "free": 0}
    asked = visual = kept = 0
    for number, file in enumerate(videos):
        video = open_video(model, processor, file.path, method=lite.method)
        ways = {"lite": video, "free": dataclasses.replace(video, engine=free)}
        for question in file.questions:
            asked += 1
            for name, way in ways.items():
                answer = way.ask(question.text, max_new_tokens=_ANSWER)
                words = answer.text.split()
                right[name] += bool(words) and words[0] == question.answer
                found[name] += _keeps_needle(way, answer.selection, question)
                visual, kept = answer.selection.num_visual, len(answer.selection.kept)
        if progress is not None:
            progress("ask", number + 1, len(videos))
    return Accuracy(
        lite=right["lite"] / asked,
        training_free=right["free"] / asked,
        lite_recall=found["lite"] / asked,
        training_free_recall=found["free"] / asked,
        questions=asked,
        frames=videos[0].frames,
        visual_tokens=visual,
        kept_tokens=kept,
    )


def _keeps_needle(video: Video, selection: Any, question: Any) -> bool:
    """Whether a token that shows a needle of the question was kept."""
    architecture = video.engine.architecture
    group = architecture.pictures_per_frame
    seen = question.cells_seen(video.pictures.tolist(), temporal_patch=group)
    grid = architecture.grid(video.clip)
    kept = selection.kept
    frame = selection.frame[kept]
    first = selection.frame.new_tensor(
        [int((selection.frame < f).sum()) for f in range(video.clip.frames)]
    )
    cell = grid.cells[kept - first[frame]]
    wanted = {(int(f), int(r) * grid.columns + int(c)) for f, r, c in seen}
    return not wanted.isdisjoint(zip(frame.tolist(), cell.tolist(), strict=True))
