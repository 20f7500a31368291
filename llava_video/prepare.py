"""LLaVA-Video: from a video file and a templated question to what the processor would have made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..core.architecture import Pixels
from ..core.errors import PromptError
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
    token = processor.video_token
    pieces = text.split(token)
    if len(pieces) != len(videos) + 1:
        raise PromptError(
            f"The prompt has {len(pieces) - 1} places for a video, but there are {len(videos)}."
        )
    filled = pieces[0]
    for clip, rest in zip(videos, pieces[1:], strict=True):
        number = video_tokens(clip.frames, processor.frame_grid, processor.newline_position)
        filled += token * number + rest
    return processor.tokenizer(filled, return_tensors="pt")["input_ids"][0]
