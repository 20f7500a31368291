"""Which frames of a video to read: evenly by number, or at a rate in time."""

import numpy as np
from numpy.typing import NDArray

from ...core.errors import OptionError
from .probing import VideoInfo


def sample_uniform(info: VideoInfo, num_frames: int) -> NDArray[np.int64]:
    """Spread frames evenly by number from the first to the last, both included.

    The positions are `linspace(0, n - 1, num_frames)` cut to whole numbers, as the published
    evaluations of LLaVA-Video sample. A video with no more frames than asked is taken whole.

    Returns
    -------
    int64 array (min(num_frames, info.num_frames),)
        Presentation indices, strictly ascending.

    Raises
    ------
    OptionError
        `num_frames` is not positive.
    """
    if num_frames < 1:
        raise OptionError(f"num_frames must be at least 1, got {num_frames}.")
    if num_frames >= info.num_frames:
        return np.arange(info.num_frames, dtype=np.int64)
    return np.linspace(0, info.num_frames - 1, num_frames).astype(np.int64)


def sample_fps(
    info: VideoInfo, fps: float, *, max_frames: int | None = None, min_frames: int = 1
) -> NDArray[np.int64]:
    """Take the frame on screen at every `1 / fps` seconds, from the first frame on.

    Time decides, not frame numbers, so a variable frame rate is sampled evenly in time; a rate
    above the video's takes every frame once. More than `max_frames` or fewer than `min_frames`
    are replaced by that many frames spread evenly (`sample_uniform`).

    Parameters
    ----------
    fps : float
        Frames per second to take.
    max_frames : int, optional
        Cap on the number of frames; none by default.
    min_frames : int
        Floor, as far as the video has that many.

    Returns
    -------
    int64 array (frames,)
        Presentation indices, strictly ascending.

    Raises
    ------
    OptionError
        A rate that is not positive, or `min_frames` above `max_frames`.
    """
    if not fps > 0 or not np.isfinite(fps):
        raise OptionError(f"fps must be a positive number, got {fps}.")
    if min_frames < 1:
        raise OptionError(f"min_frames must be at least 1, got {min_frames}.")
    if max_frames is not None and max_frames < min_frames:
        raise OptionError(
            f"max_frames must be at least min_frames, got {max_frames} and {min_frames}."
        )
    # A microsecond of slack: a frame due at 0.1 s may be stamped 0.09999999.
    slack = 1e-6
    moments = np.arange(max(int(np.ceil(info.duration * fps - slack)), 1)) / fps
    shown = np.searchsorted(info.timestamps, moments + slack, side="right") - 1
    indices = np.unique(shown).astype(np.int64)
    if max_frames is not None and len(indices) > max_frames:
        return sample_uniform(info, max_frames)
    if len(indices) < min_frames:
        return sample_uniform(info, min_frames)
    return indices
