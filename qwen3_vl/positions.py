"""Qwen3-VL: three-axis rotary positions; every frame is a picture of its own between its text.

Time is not in the positions but in the words before a frame, so they depend on no rate.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..core.architecture import runs
from ..core.layout import NONE, Prompt


def whole_positions(prompt: Prompt) -> Tensor:
    """Positions of a whole prompt: int64 ``(3, tokens)``.

    Text counts up on all three axes. A frame or image stays at one time and counts its rows and
    columns; the text after it goes on at its start plus the larger of the two.
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
        grid = torch.meshgrid(
            torch.zeros(1, dtype=torch.long),
            torch.arange(clip.rows),
            torch.arange(clip.columns),
            indexing="ij",
        )
        parts.append(torch.stack([axis.reshape(-1) for axis in grid]) + following)
        following += max(clip.rows, clip.columns)
        done = stop
    parts.append((torch.arange(len(layout) - done) + following).expand(3, -1))
    return torch.cat(parts, -1)


def compact_positions(prompt: Prompt, rows: Tensor) -> Tensor:
    """Positions of the tokens ``rows`` as if only the frames that keep a token had been sampled.

    Rows and columns stay what they were. Returns int64 ``(3, len(rows))``.
    """
    layout = prompt.layout
    keep = torch.zeros(len(layout), dtype=torch.bool)
    keep[rows] = True
    in_view = layout.frame == NONE
    for index, clip in enumerate(prompt.videos):
        mine = ((layout.video == index) & (layout.frame != NONE)).nonzero()[:, 0]
        shown = torch.zeros(clip.frames, dtype=torch.bool)
        shown[layout.frame[mine[keep[mine]]]] = True
        in_view[mine] = shown[layout.frame[mine]]
    visible = replace(prompt, layout=layout.take(in_view.nonzero()[:, 0]))
    return whole_positions(visible)[:, keep[in_view]]
