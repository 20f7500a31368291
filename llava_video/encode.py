"""LLaVA-Video: from processor outputs to layouts, and from pixels to features."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_onevision.modeling_llava_onevision import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
    unpad_image,
)

from ..core.architecture import Pixels, Request, runs, strip_padding
from ..core.decoder import device_of, weight_of
from ..core.errors import PromptError
from ..core.layout import NONE, Clip, Grid, Layout, Prompt, query_mask
from .modeling import frame_features


def read_requests(inputs: Mapping[str, Any], config: Any) -> list[Request]:
    """Lay out a processor's batch; see `Architecture.read`."""
    videos = _video_pixels(inputs, config)
    images = _image_pixels(inputs, config)
    requests = []
    for ids in strip_padding(inputs):
        shown_videos: list[Pixels] = []
        shown_images: list[Pixels] = []
        taken: list[Pixels] = []
        for start, stop in runs(_is_feature(ids, config)):
            # Neighbours stand side by side, with nothing to part them.
            while start < stop:
                video = ids[start] == config.video_token_id
                waiting, shown = (videos, shown_videos) if video else (images, shown_images)
                if not waiting:
                    raise PromptError(
                        "input_ids show more videos or images than there are pixel values; pass "
                        "the processor's output unchanged."
                    )
                pixels = waiting.pop(0)
                shown.append(pixels)
                taken.append(pixels)
                start += _tokens("video" if video else "image", pixels.clip, config)
        prompt = layout_prompt(
            ids, [p.clip for p in shown_videos], [p.clip for p in shown_images], config
        )
        requests.append(Request(prompt, tuple(taken)))
    if videos or images:
        raise PromptError(
            f"{len(videos)} videos and {len(images)} images have no place in input_ids; pass the "
            "processor's output unchanged."
        )
    return requests


def layout_prompt(
    ids: Tensor, videos: Sequence[Clip], images: Sequence[Clip], config: Any
) -> Prompt:
    """Lay out expanded token ids; see `Architecture.layout`."""
    feature = _is_feature(ids, config)
    visual = ids == config.video_token_id
    placeholder = feature.clone()
    video, frame = torch.full_like(ids, NONE), torch.full_like(ids, NONE)
    waiting_videos, waiting_images = list(enumerate(videos)), list(images)
    for start, stop in runs(placeholder):
        while start < stop:
            if not (waiting_videos if ids[start] == config.video_token_id else waiting_images):
                raise PromptError(
                    "The prompt has more video or image placeholders than there are videos and "
                    "images. Does its text contain one?"
                )
            if ids[start] == config.image_token_id:
                clip = waiting_images.pop(0)
                _check_tokens("image", clip, ids[start:stop], config)
                start += _tokens("image", clip, config)
                continue
            index, clip = waiting_videos.pop(0)
            _check_tokens("video", clip, ids[start:stop], config)
            end = start + clip.frames * clip.rows * clip.columns
            last = start + _tokens("video", clip, config)
            frame[start:end] = torch.arange(clip.frames).repeat_interleave(clip.rows * clip.columns)
            video[start:last] = index
            # A newline after the whole video is no frame's: it is read like text, see `embed`.
            visual[end:last] = False
            feature[end:last] = False
            start = last
    query = query_mask(visual, placeholder)
    return Prompt(Layout(ids, video, frame, visual, feature, query), tuple(videos), tuple(images))


def encode_pixels(model: Any, pixels: Pixels, selector: Any | None) -> tuple[Tensor, Tensor | None]:
    """Run the tower once for the model and the selector; see `Architecture.encode`."""
    core = model.model
    patches = core.encode_pictures(pixels.values)
    newline = weight_of(core, "image_newline")
    features = _project(core, core.multi_modal_projector, newline, patches, pixels)
    if selector is None:
        return features, None
    return features, _project(core, selector.projector, selector.image_newline, patches, pixels)


def frame_grid(clip: Clip, config: Any) -> Grid:
    """Place the visual tokens of a frame; see `Architecture.grid`."""
    if config.newline_position == "frame":
        side = math.isqrt(clip.columns - 1)
        cells = torch.arange(side * side)
        return Grid(side, side, torch.nn.functional.pad(cells, (0, 1), value=NONE))
    columns = clip.columns - (config.newline_position == "grid")
    cells = torch.arange(clip.rows * columns).view(clip.rows, columns)
    newlines = (0, clip.columns - columns)
    cells = torch.nn.functional.pad(cells, newlines, value=NONE).flatten()
    return Grid(clip.rows, columns, cells)


def _project(core: Any, projector: Any, newline: Tensor, patches: Tensor, pixels: Pixels) -> Tensor:
    """Turn patches into the features of frames, or of an image's tiles: ``(tokens, hidden)``."""
    if pixels.picture_size is None:
        return frame_features(patches, projector, newline, core.config).flatten(0, 1)
    like = next(projector.parameters())
    # The stock class joins the tiles.
    packed, _ = core.pack_image_features(
        [projector(patches.to(device_of(projector), like.dtype))],
        [torch.tensor(pixels.picture_size)],
        image_newline=newline,
        vision_aspect_ratio=core.config.vision_aspect_ratio,
    )
    return packed[0]


def _is_feature(ids: Tensor, config: Any) -> Tensor:
    return (ids == config.video_token_id) | (ids == config.image_token_id)


def _check_tokens(kind: str, clip: Clip, ids: Tensor, config: Any) -> None:
    """Check that ``ids``, from the clip's first token on, begin with all of its tokens."""
    expected = _tokens(kind, clip, config)
    found = int((ids == ids[0]).long().cumprod(0).sum())
    if found < expected:
        raise PromptError(
            f"A {kind} of grid {clip.frames}x{clip.rows}x{clip.columns} needs {expected} tokens in "
            f"input_ids, but {found} stand there. Was the prompt truncated?"
        )


def _tokens(kind: str, clip: Clip, config: Any) -> int:
    """Count the tokens of a clip in a prompt, with the newline that may end a video."""
    ended = kind == "video" and config.newline_position == "one_token"
    return clip.frames * clip.rows * clip.columns + ended


def _video_pixels(inputs: Mapping[str, Any], config: Any) -> list[Pixels]:
    """Split the processor's videos: ``(videos, frames, 3, height, width)`` or a list."""
    values = inputs.get("pixel_values_videos")
    if values is None:
        return []
    rows, columns = config.frame_grid
    return [Pixels(video, Clip(len(video), rows, columns)) for video in values]


def _image_pixels(inputs: Mapping[str, Any], config: Any) -> list[Pixels]:
    """Split the processor's images into their tiles; a single image of a row is cut into many."""
    values, sizes = inputs.get("pixel_values"), inputs.get("image_sizes")
    if values is None:
        return []
    if sizes is None:
        raise PromptError(
            "pixel_values came without image_sizes; pass the processor's output unchanged."
        )
    counts = inputs.get("batch_num_images")
    alone = [True] * len(sizes)
    if counts is not None:
        alone = [int(n) == 1 for n in counts for _ in range(int(n))]
    images = []
    for tiles, size, cut in zip(values, sizes.tolist(), alone, strict=True):
        height, width = size
        number = 1
        if cut:
            number = image_size_to_num_patches(
                [height, width], config.image_grid_pinpoints, config.vision_config.image_size
            )
        clip = Clip(1, 1, _image_tokens((height, width), number, config))
        images.append(Pixels(tiles[:number], clip, (height, width)))
    return images


def _image_tokens(size: tuple[int, int], tiles: int, config: Any) -> int:
    """Count the visual tokens of an image ``(height, width)``: the whole of it, then its tiles.

    The stock class joins the tiles, cuts the padding off, shrinks what exceeds its limit and ends
    every row with a newline.
    """
    side = config.vision_config.image_size // config.vision_config.patch_size
    if tiles == 1:
        return side * side + 1
    rows, columns = get_anyres_image_grid_shape(
        size, config.image_grid_pinpoints, config.vision_config.image_size
    )
    joined = torch.empty(1, rows * side, columns * side, device="meta")
    _, height, width = unpad_image(joined, size).shape
    most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
    ratio = math.sqrt(height * width / (most * side * side))
    if ratio > 1.1:
        height, width = int(height // ratio), int(width // ratio)
    return side * side + height * (width + 1)
