"""LLaVA-Video: from processor outputs to layouts, and from pixels to features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

from ..core.architecture import Pixels, Request, runs, strip_padding
from ..core.errors import PromptError
from ..core.layout import NONE, Clip, Layout, Prompt, query_mask
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
            left = stop - start
            while left > 0:
                video = ids[stop - left] == config.video_token_id
                waiting, shown = (videos, shown_videos) if video else (images, shown_images)
                if not waiting:
                    raise PromptError(
                        "input_ids show more videos or images than there are pixel values; pass "
                        "the processor's output unchanged."
                    )
                pixels = waiting.pop(0)
                if not video:
                    # Only the prompt says how many tokens are left of an image's tiles.
                    pixels = Pixels(pixels.values, Clip(1, 1, left), pixels.picture_size)
                shown.append(pixels)
                taken.append(pixels)
                left -= _tokens(pixels.clip, config) if video else left
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
    waiting = list(enumerate(videos))
    for start, stop in runs(visual):
        while start < stop:
            if not waiting:
                raise PromptError("input_ids hold more video tokens than the videos have.")
            index, clip = waiting.pop(0)
            end = start + _tokens(clip, config)
            if end > stop:
                raise PromptError(
                    f"A video of grid {clip.frames}x{clip.rows}x{clip.columns} needs "
                    f"{end - start} tokens in input_ids, but {stop - start} stand there. Was the "
                    "prompt truncated?"
                )
            video[start:end] = index
            tokens = clip.frames * clip.rows * clip.columns
            frame[start : start + tokens] = torch.arange(clip.frames).repeat_interleave(
                clip.rows * clip.columns
            )
            # A newline after the whole video is no frame's: it is read like text, see `embed`.
            visual[start + tokens : end] = False
            feature[start + tokens : end] = False
            start = end
    query = query_mask(visual, placeholder)
    return Prompt(Layout(ids, video, frame, visual, feature, query), tuple(videos), tuple(images))


def encode_pixels(model: Any, pixels: Pixels, selector: Any | None) -> tuple[Tensor, Tensor | None]:
    """Run the tower once for the model and the selector; see `Architecture.encode`."""
    core = model.model
    patches = core.encode_pictures(pixels.values)
    if pixels.picture_size is None:
        features = core.frame_features(patches).flatten(0, 1)
        if selector is None:
            return features, None
        theirs = frame_features(patches, selector.projector, selector.image_newline, core.config)
        return features, theirs.flatten(0, 1)
    features = _pack(core, core.multi_modal_projector, core.image_newline, patches, pixels)
    if selector is None:
        return features, None
    return features, _pack(core, selector.projector, selector.image_newline, patches, pixels)


def _pack(core: Any, projector: Any, newline: Tensor, patches: Tensor, pixels: Pixels) -> Tensor:
    """Join the tiles of one image as the stock class does: ``(tokens, hidden)``."""
    like = next(projector.parameters())
    projected = projector(patches.to(like.device, like.dtype))
    packed, _ = core.pack_image_features(
        [projected],
        [torch.tensor(pixels.picture_size)],
        image_newline=newline,
        vision_aspect_ratio=core.config.vision_aspect_ratio,
    )
    return packed[0]


def _is_feature(ids: Tensor, config: Any) -> Tensor:
    return (ids == config.video_token_id) | (ids == config.image_token_id)


def _tokens(clip: Clip, config: Any) -> int:
    """Tokens of a video in the prompt, with the newline that may end it."""
    return clip.frames * clip.rows * clip.columns + (config.newline_position == "one_token")


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
        number = 1
        if cut:
            number = image_size_to_num_patches(
                size, config.image_grid_pinpoints, config.vision_config.image_size
            )
        images.append(Pixels(tiles[:number], Clip(1, 1, 1), (size[0], size[1])))
    return images
