"""LLaVA-Video: from a video file and a templated question to what the processor would have made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..core.architecture import Pixels, repeat_tokens
from ..core.layout import Clip
from .modeling import video_tokens


def prepare_pixels(
    processor: Any, pictures: Tensor, seconds_per_picture: float, config: Any
) -> Pixels:
    """Normalise pictures that already have their final size, by the processor's own code."""
    out = processor.video_processor(
        videos=[pictures], do_resize=False, do_sample_frames=False, return_tensors="pt"
    )
    rows, columns = config.frame_grid
    clip = Clip(len(pictures), rows, columns, seconds_per_picture)
    return Pixels(out["pixel_values_videos"][0], clip)


def expand_prompt(processor: Any, text: str, videos: Sequence[Clip]) -> Tensor:
    """Tokenise a templated prompt with each video placeholder as its visual tokens."""
    ids = processor.tokenizer(text, return_tensors="pt")["input_ids"][0]
    grid, newline = processor.frame_grid, processor.newline_position
    counts = [video_tokens(clip.frames, grid, newline) for clip in videos]
    return repeat_tokens(ids, processor.video_token_id, counts)
