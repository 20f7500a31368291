"""Decoding with torchcodec, an optional backend that uses the FFmpeg libraries of the system."""

import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ...core.errors import OptionError, VideoError
from .probing import NO_FRAME_INDEX, VideoInfo


def decode(
    info: VideoInfo, indices: NDArray[np.int64], chunk: int
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """Yield (indices (n,), upright RGB (n, height, width, 3) uint8), n <= chunk, ascending.

    Raises
    ------
    OptionError
        torchcodec is not installed, or finds no FFmpeg that it can use.
    VideoError
        torchcodec cannot decode the file, or sees other frames in it than the container lists.
    """
    decoders = _import_decoders()
    return _decode(decoders, info, indices, chunk)


def _decode(
    decoders: Any, info: VideoInfo, indices: NDArray[np.int64], chunk: int
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    if info.container in NO_FRAME_INDEX:
        raise _refusal(info, f"in {info.container} it returns other frames than those asked for")
    try:
        reader = decoders.VideoDecoder(
            str(info.path),
            stream_index=info.stream,
            dimension_order="NHWC",
            num_ffmpeg_threads=0,
            seek_mode="exact",
        )
    except (RuntimeError, ValueError) as error:
        raise _refusal(info, error) from error
    if len(reader) != info.num_frames:
        raise _refusal(info, f"it counts {len(reader)} frames instead of {info.num_frames}")
    for begin in range(0, len(indices), chunk):
        part = indices[begin : begin + chunk]
        try:
            images = reader.get_frames_at(part.tolist()).data
        except (RuntimeError, IndexError) as error:
            raise _refusal(info, error) from error
        if tuple(images.shape[1:3]) != (info.height, info.width):
            raise _refusal(info, f"its frames measure {tuple(images.shape[1:3])}")
        yield part, images


def _import_decoders() -> Any:
    try:
        return importlib.import_module("torchcodec.decoders")
    except (ImportError, OSError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OptionError(
            f"backend 'torchcodec' is not available ({reason}): pip install "
            "flexselect[torchcodec] and the FFmpeg libraries of your system, or use "
            "backend='pyav'."
        ) from error


def _refusal(info: VideoInfo, reason: object) -> VideoError:
    detail = str(reason).strip().splitlines()[0] if str(reason).strip() else "no reason given"
    return VideoError(
        f"{info.path}: torchcodec cannot decode this file ({detail}). Use backend='pyav', which "
        "reads more containers and keeps what decodes of a damaged file."
    )
