"""Which visual tokens of a family's prompt show a needle."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .models import FEATURE, Family
from .scenes import GRID
from .videos import VideoQuestion


def needle_mask(family: Family, question: VideoQuestion, frames: Sequence[int]) -> Tensor:
    """Mark the visual tokens that show a question's needles.

    Parameters
    ----------
    family : Family
        Whose tokens.
    question : VideoQuestion
        Of a video of the testbed's own cells.
    frames : sequence of int
        Index in the file of each picture that was looked at, in order.

    Returns
    -------
    Tensor of shape (visual tokens,), bool
        In the order of the layout, tags and newlines included; all false where sampling missed
        the needles.
    """
    slots, ranked = family.frame_slots()
    visual = [slot for slot, counts in zip(slots, ranked, strict=True) if counts]
    cells = [at for at, slot in enumerate(visual) if slot == FEATURE]
    group = family.pictures_per_frame
    mask = torch.zeros(-(-len(frames) // group), len(visual), dtype=torch.bool)
    for frame, row, column in question.cells_seen(frames, temporal_patch=group).tolist():
        mask[frame, cells[row * GRID + column]] = True
    return mask.flatten()
