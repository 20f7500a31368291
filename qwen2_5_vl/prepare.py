"""Qwen2.5-VL: from a video file and a templated question to what the processor would have made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.architecture import Pixels, repeat_tokens
from ..core.errors import OptionError, VideoError
from ..core.layout import Clip

#: Neighbouring pictures that the tower merges into one frame.
_PICTURES = 2


def sample_pictures(count: int, fps: float, sampling: Mapping[str, Any]) -> Tensor:
    """Choose which pictures of a video to look at, as qwen-vl-utils does.

    Only a number asked for is treated otherwise: an odd one is rounded down, never up past what was
    asked or what the video has.

    Parameters
    ----------
    count, fps : pictures in the video, and their rate.
    sampling : ``frames`` for a fixed number, or ``fps`` with ``min_frames`` and ``max_frames``.

    Returns
    -------
    int64 ``(pictures,)``, an even number of them, ascending.
    """
    vision_process = _vision_process()
    if count < _PICTURES:
        raise VideoError(
            f"The video has {count} picture(s); Qwen2.5-VL looks at pairs of pictures, so it needs "
            f"at least {_PICTURES}."
        )
    if sampling.get("frames") is not None:
        pairs = min(sampling["frames"], count) // _PICTURES
        wanted = {"nframes": max(1, pairs) * _PICTURES}
    else:
        wanted = {name: sampling[name] for name in ("fps", "min_frames") if name in sampling}
        wanted["max_frames"] = max(_PICTURES, min(sampling.get("max_frames", count), count))
        wanted["min_frames"] = min(wanted.get("min_frames", _PICTURES), count)
    number = vision_process.smart_nframes(wanted, total_frames=count, video_fps=fps)
    return torch.linspace(0, count - 1, number).round().long()


def picture_size(
    height: int, width: int, pictures: int, factor: int, limits: Mapping[str, Any]
) -> tuple[int, int]:
    """Choose a size in multiples of ``factor`` pixels, as qwen-vl-utils does.

    A picture gets between 128 and 768 visual tokens, and fewer the more pictures share the
    sequence. ``limits`` may set ``min_pixels`` and ``max_pixels`` of a picture; a maximum below the
    usual 128 tokens does away with that minimum.

    Raises
    ------
    OptionError
        A maximum is below the minimum that is given, or below one visual token.
    VideoError
        The pictures are too long and narrow.
    """
    vision_process = _vision_process()
    area = factor * factor
    least = limits.get("min_pixels") or vision_process.VIDEO_MIN_TOKEN_NUM * area
    total = vision_process.MODEL_SEQ_LEN * area * 0.9
    most = min(vision_process.VIDEO_MAX_TOKEN_NUM * area, total / pictures * _PICTURES)
    most = max(most, int(least * 1.05))
    limit = limits.get("max_pixels")
    if limit:
        if limit < area:
            raise OptionError(
                f"max_pixels ({limit}) is less than one visual token, which takes {factor} x "
                f"{factor} = {area} pixels."
            )
        if limit < least and not limits.get("min_pixels"):
            # Not just lowered to the limit: growing to it would round up past it.
            least = area
        most = min(most, limit)
    if most < least:
        raise OptionError(f"max_pixels ({most}) is below min_pixels ({least}).")
    if max(height, width) > vision_process.MAX_RATIO * min(height, width):
        raise VideoError(
            f"The pictures are {width} x {height} pixels; Qwen2.5-VL takes pictures whose longer "
            f"side is at most {vision_process.MAX_RATIO} times the shorter. Crop or pad the video."
        )
    resized = vision_process.smart_resize(
        height, width, factor=factor, min_pixels=int(least), max_pixels=int(most)
    )
    # A shorter side that is scaled to less than one token comes back as nothing.
    rows, columns = (max(factor, side) for side in resized)
    if 0 in resized and rows * columns > most:
        raise VideoError(
            f"The pictures are {width} x {height} pixels; scaled to at most {int(most)} pixels, "
            f"their shorter side is less than the {factor} of one visual token. Raise max_pixels, "
            "or crop or pad the video."
        )
    return rows, columns


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
    """Tokenise a templated prompt with each video placeholder as its visual tokens."""
    ids = processor.tokenizer(text, return_tensors="pt")["input_ids"][0]
    counts = [clip.frames * clip.rows * clip.columns for clip in videos]
    return repeat_tokens(ids, processor.video_token_id, counts)


def _vision_process() -> Any:
    try:
        from qwen_vl_utils import vision_process
    except ImportError as error:
        raise OptionError(
            "Qwen2.5-VL's choice of frames and sizes comes from qwen-vl-utils, which is not "
            "installed. Run: pip install 'flexselect[qwen]'"
        ) from error
    return vision_process
