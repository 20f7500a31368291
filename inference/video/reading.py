"""Chosen frames of a video as a stream of chunks, with an account of what could not be decoded."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...core.errors import OptionError, VideoError
from . import decord, pyav, torchcodec
from .probing import VideoInfo, probe

logger = logging.getLogger(__name__)

# A backend yields (indices, upright images (n, height, width, 3) uint8), n <= chunk, ascending,
# and leaves out the frames it cannot decode.
Backend = Callable[[VideoInfo, NDArray[np.int64], int], Iterator[tuple[NDArray[np.int64], Tensor]]]

BACKENDS: dict[str, Backend] = {
    "pyav": pyav.decode,
    "decord": decord.decode,
    "torchcodec": torchcodec.decode,
}


@dataclass(frozen=True, eq=False)
class Frames:
    """A chunk of decoded frames.

    Attributes
    ----------
    frames : uint8 tensor (n, 3, height, width)
        RGB, upright, in presentation order. Channels lie last in memory.
    indices : int64 array (n,)
        Presentation index of each frame.
    timestamps : float64 array (n,)
        Seconds at which each frame appears, from the first frame of the video on.
    """

    frames: Tensor
    indices: NDArray[np.int64]
    timestamps: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class DecodeReport:
    """What came of a request.

    Attributes
    ----------
    requested, decoded : int
        Frames asked for, and frames delivered.
    lost : int64 array (requested - decoded,)
        Presentation indices that could not be decoded.
    message : str
        One sentence for the user; empty when nothing was lost.
    """

    requested: int
    decoded: int
    lost: NDArray[np.int64]
    message: str


class FrameStream(Iterator[Frames]):
    """The chunks of one request, decoded as they are taken; `read_frames` makes it.

    Attributes
    ----------
    info : VideoInfo
        The video that is read.
    """

    def __init__(
        self,
        info: VideoInfo,
        indices: NDArray[np.int64],
        parts: Iterator[tuple[NDArray[np.int64], Tensor]],
        size: tuple[int, int] | None,
    ) -> None:
        self.info = info
        self._indices = indices
        self._parts = parts
        self._size = size
        self._decoded: list[NDArray[np.int64]] = []
        self._report: DecodeReport | None = None

    @property
    def report(self) -> DecodeReport:
        """What was delivered and what was lost; known once the last chunk has been taken."""
        if self._report is None:
            raise VideoError(
                f"{self.info.path}: the report is known when every chunk has been read; "
                "finish the loop over the frames first."
            )
        return self._report

    def __next__(self) -> Frames:
        if self._report is not None:
            raise StopIteration
        part = next(self._parts, None)
        if part is None:
            self._finish()
            raise StopIteration
        indices, images = part
        self._decoded.append(indices)
        frames = images.permute(0, 3, 1, 2)
        if self._size is not None and self._size != tuple(frames.shape[-2:]):
            frames = torch.nn.functional.interpolate(
                frames, size=self._size, mode="bicubic", antialias=True
            )
        return Frames(frames, indices, self.info.timestamps[indices])

    def close(self) -> None:
        """Let go of the file; chunks that were not taken are lost."""
        close = getattr(self._parts, "close", None)
        if close is not None:
            close()

    def _finish(self) -> None:
        decoded = np.concatenate([*self._decoded, np.zeros(0, dtype=np.int64)])
        lost = np.setdiff1d(self._indices, decoded)
        message = ""
        if len(lost):
            message = (
                f"{self.info.path}: {len(lost)} of {len(self._indices)} requested frames could "
                f"not be decoded and are left out (frames {_abridged(lost)}); the file is damaged."
            )
            if not len(decoded):
                raise VideoError(f"{message} No frame is left to work with: pass another file.")
            logger.warning(message)
        self._report = DecodeReport(len(self._indices), len(decoded), lost, message)


def read_frames(
    video: str | os.PathLike[str] | VideoInfo,
    indices: Sequence[int] | NDArray[np.int64],
    *,
    backend: str = "pyav",
    chunk: int = 32,
    size: tuple[int, int] | None = None,
) -> FrameStream:
    """Decode the frames at `indices`, a chunk at a time; no more than a chunk is held.

    A frame that cannot be decoded is left out, never replaced by another: a warning says how many
    of how many, and the stream's `report` which. With PyAV a damaged place costs the frames that
    it holds; decord and torchcodec refuse a damaged file.

    Parameters
    ----------
    video : path or VideoInfo
        The file, or what `probe` told about it, which saves reading the container again.
    indices : ints
        Presentation indices, strictly ascending.
    backend : str
        `"pyav"`, `"decord"` or `"torchcodec"`; the last two are optional installs.
    chunk : int
        Frames per chunk.
    size : (height, width), optional
        Resize the upright frames (bicubic, antialiased). By default they keep the video's size,
        and the model's own processor resizes them.

    Raises
    ------
    OptionError
        Indices out of range or order, an unknown or missing backend, a chunk or size below 1.
    VideoError
        The file cannot be read (see `probe`), or no requested frame decodes; the latter is raised
        when the last chunk is asked for.
    """
    if backend not in BACKENDS:
        raise OptionError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}.")
    if chunk < 1:
        raise OptionError(f"chunk must be at least 1 frame, got {chunk}.")
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise OptionError(f"size must be (height, width) in pixels, got {size}.")
    info = video if isinstance(video, VideoInfo) else probe(video)
    wanted = _checked(indices, info)
    return FrameStream(info, wanted, BACKENDS[backend](info, wanted, chunk), size)


def _checked(indices: Sequence[int] | NDArray[np.int64], info: VideoInfo) -> NDArray[np.int64]:
    wanted = np.asarray(indices)
    if wanted.ndim != 1 or not len(wanted) or not np.issubdtype(wanted.dtype, np.integer):
        raise OptionError("indices must be a non-empty list of whole frame numbers.")
    if wanted.min() < 0 or wanted.max() >= info.num_frames:
        raise OptionError(
            f"indices must lie in 0..{info.num_frames - 1}, the frames of {info.path}; "
            f"got {wanted.min()}..{wanted.max()}."
        )
    wanted = wanted.astype(np.int64)
    if (np.diff(wanted) <= 0).any():
        raise OptionError("indices must be strictly ascending, each frame once.")
    return wanted


def _abridged(indices: NDArray[np.int64]) -> str:
    shown = ", ".join(str(index) for index in indices[:8])
    return f"{shown}, …" if len(indices) > 8 else shown
