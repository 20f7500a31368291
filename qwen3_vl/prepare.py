"""Qwen3-VL: from a video file and a templated question to what the processor would have made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize
from transformers.video_utils import VideoMetadata

from ..core.architecture import Pixels, repeat_tokens
from ..core.errors import OptionError, PromptError, VideoError
from ..core.layout import Clip

#: Neighbouring pictures that the tower merges into one frame.
_PICTURES = 2

#: Least and most pixels of all pictures of a video together, as released with the checkpoints.
LEAST_PIXELS, MOST_PIXELS = 4096, 25_165_824


def sample_pictures(count: int, fps: float, sampling: Mapping[str, Any]) -> Tensor:
    """Choose which pictures of a video to look at, by the code of the stock video processor.

    Parameters
    ----------
    count, fps : pictures in the video, and their rate.
    sampling : ``frames`` for a fixed number, or ``fps`` with ``min_frames`` and ``max_frames``.

    Returns
    -------
    int64 ``(pictures,)``, ascending.
    """
    if count < _PICTURES:
        raise VideoError(
            f"The video has {count} picture(s); Qwen3-VL looks at pairs of pictures, so it needs "
            f"at least {_PICTURES}."
        )
    metadata = VideoMetadata(total_num_frames=count, fps=fps)
    processor = Qwen3VLVideoProcessor()
    if sampling.get("frames") is not None:
        number = min(sampling["frames"], count)
        # Its own rate is only for those who ask for no number.
        processor.fps = None
        indices = processor.sample_frames(metadata, num_frames=number)
    else:
        processor.min_frames = min(sampling.get("min_frames", _PICTURES), count)
        processor.max_frames = sampling.get("max_frames", count)
        indices = processor.sample_frames(metadata, fps=sampling["fps"])
    return torch.from_numpy(indices).long()


def picture_size(
    height: int, width: int, pictures: int, factor: int, limits: Mapping[str, Any]
) -> tuple[int, int]:
    """Choose a size in multiples of ``factor`` pixels, by the code of the stock video processor.

    All pictures of a video share `MOST_PIXELS`, so the more there are, the smaller they get.
    ``limits`` may set ``min_pixels`` and ``max_pixels`` of a picture; a minimum may go past what
    the video has in all.

    Raises
    ------
    OptionError
        A maximum is below one visual token.
    VideoError
        The pictures are too long and narrow.
    """
    least = max(LEAST_PIXELS, (limits.get("min_pixels") or 0) * pictures)
    most = max(MOST_PIXELS, int(least * 1.05))
    limit = limits.get("max_pixels")
    if limit:
        area = factor * factor
        if limit < area:
            raise OptionError(
                f"max_pixels ({limit}) is less than one visual token, which takes {factor} x "
                f"{factor} = {area} pixels."
            )
        most = min(most, limit * pictures)
        least = min(least, most)
    try:
        return smart_resize(
            num_frames=max(pictures, _PICTURES),
            height=height,
            width=width,
            temporal_factor=_PICTURES,
            factor=factor,
            min_pixels=least,
            max_pixels=most,
        )
    except ValueError as error:
        raise VideoError(
            f"The pictures are {width} x {height} pixels; Qwen3-VL takes pictures whose longer "
            f"side is at most 200 times the shorter ({error}). Crop or pad the video."
        ) from error


def prepare_pixels(processor: Any, pictures: Tensor, seconds_per_picture: float) -> Pixels:
    """Normalise and patch pictures that already have their final size.

    The processor's own code does it; an odd last picture is paired with itself.
    """
    video_processor = processor.video_processor
    out = video_processor(
        videos=[pictures],
        do_resize=False,
        do_sample_frames=False,
        # The size is settled, by the same rule; said so that nothing warns about it.
        cap_pixels_per_frame=False,
        return_tensors="pt",
    )
    t, h, w = out["video_grid_thw"][0].tolist()
    merge = video_processor.merge_size
    clip = Clip(t, h // merge, w // merge, seconds_per_picture * _PICTURES)
    return Pixels(out["pixel_values_videos"], clip)


def expand_prompt(processor: Any, text: str, videos: Sequence[Clip]) -> Tensor:
    """Tokenise a templated prompt with each video placeholder as its stamps and visual tokens."""
    parts = text.split(processor.video_token)
    if len(parts) - 1 != len(videos):
        raise PromptError(
            f"The prompt has {len(parts) - 1} places for a video, but there are {len(videos)}."
        )
    written = [_write_out(processor, clip) for clip in videos]
    filled = parts[0] + "".join(new + rest for new, rest in zip(written, parts[1:], strict=True))
    ids = processor.tokenizer(filled, return_tensors="pt")["input_ids"][0]
    counts = [clip.rows * clip.columns for clip in videos for _ in range(clip.frames)]
    return repeat_tokens(ids, processor.video_token_id, counts)


def _write_out(processor: Any, clip: Clip) -> str:
    """Write a video as the processor does, with one placeholder a frame."""
    # Between the first and the second picture of a frame, where only the pace is known.
    pace = clip.seconds_per_frame
    stamps = clip.stamps or [(number + 0.25) * pace for number in range(clip.frames)]
    size = processor.video_processor.merge_size
    video = {
        "video_grid_thw": torch.tensor([[clip.frames, size, size]]),
        # Stamps are means over the pictures of a frame: of the same time twice, the time itself.
        "video_metadata": [
            SimpleNamespace(fps=1.0, frames_indices=[s for s in stamps for _ in range(_PICTURES)])
        ],
    }
    return processor.replace_video_token(video, 0)
