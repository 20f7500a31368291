"""Interleaved frame sets: a long video as several short clips that each span all of it."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import OptionError


def frame_sets(frames: int, frames_per_set: int) -> list[Tensor]:
    """Split frames into the fewest interleaved sets of at most ``frames_per_set``.

    Set g of G holds frames g, g + G, g + 2G, … (paper section 3.2; fixtures, C6), so every set
    covers the whole video and sizes differ by at most one.

    Parameters
    ----------
    frames : number of frames of the video, 0 or more.
    frames_per_set : most frames of a set, 1 or more.

    Returns
    -------
    list of int64 ``(frames of the set,)``, ascending; empty for a video without frames.
    """
    if frames_per_set < 1:
        raise OptionError(f"frames_per_set must be at least 1, got {frames_per_set}.")
    count = -(-frames // frames_per_set)
    return [torch.arange(g, frames, count) for g in range(count)]
