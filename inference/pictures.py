"""From a video file to what a model reads: which pictures, their pixels, the prompt around them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.architecture import Architecture, Pixels
from ..core.errors import VideoError
from ..core.layout import Clip, Prompt
from .video import DecodeReport, FrameStream, VideoInfo, probe, read_frames
from .video.sampling import sample_fps, sample_uniform


def choose_pictures(
    architecture: Architecture, info: VideoInfo, policy: Mapping[str, Any]
) -> NDArray[np.int64]:
    """Choose pictures by the family's own policy, else evenly by number or by time.

    ``policy`` is what `resolve_sampling` returns. Returns int64 indices, ascending.
    """
    indices = architecture.sample(info.num_frames, info.fps, policy)
    if indices is not None:
        return indices.numpy()
    if policy.get("frames") is not None:
        return sample_uniform(info, policy["frames"])
    bounds = {name: policy[name] for name in ("min_frames", "max_frames") if name in policy}
    return sample_fps(info, policy["fps"], **bounds)


def whole_groups(stream: FrameStream, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (pictures, seconds) in whole groups of ``size``, though damage may leave odd chunks."""
    pictures: Tensor | None = None
    times = torch.empty(0, dtype=torch.float64)
    for part in stream:
        stamps = torch.from_numpy(part.timestamps)
        pictures = part.frames if pictures is None else torch.cat((pictures, part.frames))
        times = torch.cat((times, stamps))
        whole = len(times) // size * size
        if whole:
            yield pictures[:whole], times[:whole]
            pictures, times = pictures[whole:], times[whole:]
    if len(times):
        assert pictures is not None
        yield pictures, times


def read_pixels(
    architecture: Architecture,
    processor: Any,
    path: Path,
    policy: Mapping[str, Any],
    backend: str = "pyav",
) -> tuple[Pixels, DecodeReport]:
    """Decode the chosen pictures of a short video and prepare all of them at once.

    `open_video` does the same a chunk at a time, for videos of any length.

    Raises
    ------
    VideoError
        The file is missing, is no video, is too short, or none of the pictures decodes.
    """
    info = probe(path)
    try:
        chosen = choose_pictures(architecture, info, policy)
        size = architecture.picture_size(info.height, info.width, len(chosen), policy)
    except VideoError as error:
        raise VideoError(f"{path}: {error}") from None
    stream = read_frames(info, chosen, backend=backend, size=size)
    parts = list(stream)
    pictures = torch.cat([part.frames for part in parts])
    times = torch.cat([torch.from_numpy(part.timestamps) for part in parts])
    pixels = architecture.pixels(processor, pictures, info.duration / len(chosen))
    return replace(pixels, clip=with_stamps(architecture, pixels.clip, times)), stream.report


def with_stamps(architecture: Architecture, clip: Clip, times: Tensor) -> Clip:
    """Note in ``clip`` when its frames are shown, for a family that writes it into the prompt.

    ``times`` is float64 ``(pictures,)``, in seconds.
    """
    if not architecture.stamps_frames:
        return clip
    frames = times.split(architecture.pictures_per_frame)
    return replace(clip, stamps=tuple(float(pictures.mean()) for pictures in frames))


def ask_about(architecture: Architecture, processor: Any, clip: Clip, question: str) -> Prompt:
    """Lay out the prompt in which ``question`` is asked about one video.

    The text is the processor's chat template's, with the video first.
    """
    content = [{"type": "video"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    return architecture.layout(architecture.expand(processor, text, [clip]), [clip], [])
