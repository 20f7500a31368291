"""Pictures of an opened video, and what its visual tokens say laid over them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..core.layout import NONE, Grid
from ..inference.session import Video
from ..inference.video import read_frames

#: A picture smaller than this is enlarged without smoothing: its pixels are what the model saw.
TINY = 160


@dataclass(frozen=True, eq=False)
class Still:
    """A picture as it is shown.

    Attributes
    ----------
    pixels : uint8 ``(height, width, 3)``, RGB.
    seconds : when it appears.
    """

    pixels: NDArray[np.uint8]
    seconds: float

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.pixels.shape[1], self.pixels.shape[0]

    def data_uri(self, quality: int = 82) -> str:
        """Return the picture as the source of an ``<img>``: JPEG, or PNG for a tiny one."""
        buffer = io.BytesIO()
        picture = Image.fromarray(self.pixels)
        if max(self.size) < TINY:
            picture.save(buffer, "PNG", optimize=True)
            kind = "png"
        else:
            picture.save(buffer, "JPEG", quality=quality, optimize=True, progressive=True)
            kind = "jpeg"
        return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def read_stills(video: Video, frames: Sequence[int], longest: int = 480) -> dict[int, Still]:
    """Decode the first picture of some frames, at most ``longest`` pixels wide and high.

    Raises `VideoError` where the file is gone.
    """
    group = video.engine.architecture.pictures_per_frame
    wanted = sorted(set(frames))
    if not wanted:
        return {}
    indices = [int(video.pictures[frame * group]) for frame in wanted]
    found: dict[int, Still] = {}
    frame_of = dict(zip(indices, wanted, strict=True))
    stream = read_frames(
        str(video.record["video"]), indices, backend=str(video.record["backend"]), chunk=4
    )
    for part in stream:
        for pixels, index, seconds in zip(part.frames, part.indices, part.timestamps, strict=True):
            picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
            found[frame_of[int(index)]] = Still(np.asarray(picture), float(seconds))
    return found


def on_grid(values: Tensor, grid: Grid, frames: int) -> Tensor:
    """Lay values of visual tokens out as pictures: ``(visual,)`` to ``(frames, rows, columns)``.

    Tokens that show no part of a picture are left out.
    """
    by_frame = values.view(frames, len(grid.cells))
    shows = grid.cells != NONE
    laid = by_frame.new_zeros(frames, grid.rows * grid.columns)
    laid[:, grid.cells[shows]] = by_frame[:, shows]
    return laid.view(frames, grid.rows, grid.columns)
