"""Decoding with decord, an optional backend: the reader that published evaluations used."""

import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ...core.errors import OptionError, VideoError
from .probing import NO_FRAME_INDEX, VideoInfo

# Without a tolerance decord repeats a neighbour for each frame it cannot decode, silently.
_NO_TOLERANCE = 1e-6


def decode(
    info: VideoInfo, indices: NDArray[np.int64], chunk: int
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """Yield (indices (n,), upright RGB (n, height, width, 3) uint8), n <= chunk, ascending.

    Raises
    ------
    OptionError
        decord is not installed.
    VideoError
        decord cannot decode the file, or sees other frames in it than the container lists.
    """
    decord = _import_decord()
    return _decode(decord, info, indices, chunk)


def _decode(
    decord: Any, info: VideoInfo, indices: NDArray[np.int64], chunk: int
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    if info.container in NO_FRAME_INDEX:
        raise _refusal(info, f"in {info.container} it returns other frames than those asked for")
    if info.index.has_leading_pictures():
        raise _refusal(info, "in open groups of pictures it returns other frames than asked for")
    errors = (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError)
    try:
        reader = decord.VideoReader(str(info.path), fault_tol=_NO_TOLERANCE)
        found = len(reader)
    except errors as error:
        raise _refusal(info, error) from error
    if found != info.num_frames:
        raise _refusal(info, f"it counts {found} frames instead of {info.num_frames}")
    for begin in range(0, len(indices), chunk):
        part = indices[begin : begin + chunk]
        try:
            with decord.bridge.use_torch():
                images = reader.get_batch(part.tolist())
        except errors as error:
            raise _refusal(info, error) from error
        if tuple(images.shape[1:3]) != (info.height, info.width):
            raise _refusal(info, f"its frames measure {tuple(images.shape[1:3])}")
        yield part, images


def _import_decord() -> Any:
    try:
        return importlib.import_module("decord")
    except (ImportError, OSError, RuntimeError) as error:
        raise OptionError(
            f"backend 'decord' is not available ({error}): pip install flexselect[decord], "
            "or use backend='pyav'."
        ) from error


def _refusal(info: VideoInfo, reason: object) -> VideoError:
    detail = str(reason).strip().splitlines()[-1] if str(reason).strip() else "no reason given"
    return VideoError(
        f"{info.path}: decord cannot decode this file ({detail}). Use backend='pyav', which "
        "reads more containers and keeps what decodes of a damaged file."
    )
