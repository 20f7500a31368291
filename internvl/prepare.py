"""InternVL: from a video file and a templated question to what the processor would have made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..core.architecture import Pixels, repeat_tokens
from ..core.layout import Clip
from .processing import expand_videos


def prepare_pixels(
    processor: Any, pictures: Tensor, seconds_per_picture: float, config: Any
) -> Pixels:
    """Normalise pictures that already have their final size, by the processor's own code."""
    out = processor.video_processor(
        videos=[pictures], do_resize=False, do_sample_frames=False, return_tensors="pt"
    )
    side = math.isqrt(config.image_seq_length)
    clip = Clip(len(pictures), side, side, seconds_per_picture)
    return Pixels(out["pixel_values_videos"][0], clip)


def expand_prompt(processor: Any, text: str, videos: Sequence[Clip]) -> Tensor:
    """Tokenise a templated prompt with each video placeholder as its visual tokens."""
    filled = expand_videos(processor, text, [clip.frames for clip in videos])
    # One placeholder a frame is enough for the tokenizer; the rest are repeated after it.
    number = processor.image_seq_length
    ids = processor.tokenizer(
        filled.replace(processor.image_token * number, processor.image_token), return_tensors="pt"
    )["input_ids"][0]
    return repeat_tokens(ids, processor.image_token_id, [number] * sum(c.frames for c in videos))
