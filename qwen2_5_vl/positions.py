"""Qwen2.5-VL: three-axis rotary positions (time, row, column) as the released weights learned them.

transformers 5.3 changed where the text after a video continues: at the start plus the larger of
its rows and columns, so that most of the video comes "after" the question. The weights were
trained with the text at the highest position so far plus one, and so were all published numbers.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..core.architecture import runs
from ..core.layout import NONE, Prompt


def whole_positions(prompt: Prompt, tokens_per_second: float) -> Tensor:
    """Positions of a whole prompt: int64 ``(3, tokens)``.

    Text counts up on all three axes. A clip starts one past the highest position so far; its
    frames are ``int(frame * seconds_per_frame * tokens_per_second)`` apart in time.
    """
    layout = prompt.layout
    images = iter(prompt.images)
    parts: list[Tensor] = []
    following = done = 0
    for start, stop in runs(layout.feature):
        parts.append((torch.arange(start - done) + following).expand(3, -1))
        following += start - done
        video = int(layout.video[start])
        clip = prompt.videos[video] if video != NONE else next(images)
        step = clip.seconds_per_frame * tokens_per_second
        grid = torch.meshgrid(
            (torch.arange(clip.frames) * step).long(),
            torch.arange(clip.rows),
            torch.arange(clip.columns),
            indexing="ij",
        )
        part = torch.stack([axis.reshape(-1) for axis in grid]) + following
        parts.append(part)
        following = int(part.max()) + 1
        done = stop
    parts.append((torch.arange(len(layout) - done) + following).expand(3, -1))
    return torch.cat(parts, -1)


def compact_positions(prompt: Prompt, rows: Tensor, tokens_per_second: float) -> Tensor:
    """Positions of the tokens ``rows`` as if only the frames that keep a token had been sampled.

    Kept frames follow each other at the clip's own pace; rows and columns stay what they were.
    Returns int64 ``(3, len(rows))``.
    """
    layout = prompt.layout
    keep = torch.zeros(len(layout), dtype=torch.bool)
    keep[rows] = True
    in_view = layout.frame == NONE
    frame = layout.frame.clone()
    videos = []
    for index, clip in enumerate(prompt.videos):
        mine = ((layout.video == index) & (layout.frame != NONE)).nonzero()[:, 0]
        shown = torch.zeros(clip.frames, dtype=torch.bool)
        shown[layout.frame[mine[keep[mine]]]] = True
        in_view[mine] = shown[layout.frame[mine]]
        frame[mine] = (shown.cumsum(0) - 1)[layout.frame[mine]]
        videos.append(replace(clip, frames=int(shown.sum())))
    view = in_view.nonzero()[:, 0]
    visible = replace(layout.take(view), frame=frame[view])
    alone = replace(prompt, layout=visible, videos=tuple(videos))
    return whole_positions(alone, tokens_per_second)[:, keep[view]]
