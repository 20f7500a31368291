"""Qwen2.5-VL: from processor outputs to layouts, and from pixels to features."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.architecture import Pixels, Request, runs, strip_padding
from ..core.decoder import device_of
from ..core.errors import PromptError
from ..core.layout import NONE, Clip, Layout, Prompt, query_mask


def read_requests(inputs: Mapping[str, Any], config: Any) -> list[Request]:
    """Lay out a processor's batch; see `Architecture.read`."""
    videos = _pixels(inputs, "pixel_values_videos", "video_grid_thw", config)
    images = _pixels(inputs, "pixel_values", "image_grid_thw", config)
    requests = []
    for ids in strip_padding(inputs):
        shown_videos: list[Pixels] = []
        shown_images: list[Pixels] = []
        taken: list[Pixels] = []
        for start, _ in runs(_is_feature(ids, config)):
            video = ids[start] == config.video_token_id
            waiting, shown = (videos, shown_videos) if video else (images, shown_images)
            if not waiting:
                raise PromptError(
                    "input_ids show more videos or images than there are pixel values; pass the "
                    "processor's output unchanged."
                )
            pixels = waiting.pop(0)
            shown.append(pixels)
            taken.append(pixels)
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
    video, frame = torch.full_like(ids, NONE), torch.full_like(ids, NONE)
    waiting_videos, waiting_images = list(enumerate(videos)), list(images)
    closing = torch.zeros_like(visual)
    for start, stop in runs(feature):
        if not (waiting_videos if visual[start] else waiting_images):
            raise PromptError(
                "The prompt has more video or image placeholders than there are videos and images. "
                "Does its text contain one?"
            )
        if not visual[start]:
            _check_tokens("image", waiting_images.pop(0), stop - start)
            continue
        index, clip = waiting_videos.pop(0)
        _check_tokens("video", clip, stop - start)
        frame[start:stop] = torch.arange(clip.frames).repeat_interleave(clip.rows * clip.columns)
        # The tags right around a video frame nothing else: they leave with it.
        first = start - int(start > 0 and ids[start - 1] == config.vision_start_token_id)
        last = stop + int(stop < len(ids) and ids[stop] == config.vision_end_token_id)
        video[first:last] = index
        closing[stop:last] = True
    query = query_mask(visual, feature) | closing
    return Prompt(Layout(ids, video, frame, visual, feature, query), tuple(videos), tuple(images))


def encode_pixels(model: Any, pixels: Pixels, selector: Any | None) -> tuple[Tensor, Tensor | None]:
    """Run the tower once for the model and the selector; see `Architecture.encode`."""
    tower = model.model.visual
    size = tower.spatial_merge_size
    clip = pixels.clip
    grid = torch.tensor([[clip.frames, clip.rows * size, clip.columns * size]])
    values = pixels.values.to(device_of(tower), tower.dtype)
    if selector is None:
        return tower(values, grid_thw=grid.to(values.device)).pooler_output, None

    # The tower undoes its window order on whatever its merger returns. Both mergers read the same
    # states, so letting the selector's columns ride along gives them the same treatment.
    # Another thread may be in the same tower, so only this one's states get them.
    thread = threading.get_ident()

    def append_selector(_: Any, states: tuple[Tensor], merged: Tensor) -> Tensor | None:
        if threading.get_ident() != thread:
            return None
        return torch.cat((merged, selector.project(states[0]).to(merged.device)), -1)

    handle = tower.merger.register_forward_hook(append_selector)
    try:
        both = tower(values, grid_thw=grid.to(values.device)).pooler_output
    finally:
        handle.remove()
    width = both.shape[-1] - selector.hidden_size
    # The wider of the two dtypes carried both.
    return both[:, :width].to(tower.dtype), both[:, width:].to(selector.dtype)


def _is_feature(ids: Tensor, config: Any) -> Tensor:
    return (ids == config.video_token_id) | (ids == config.image_token_id)


def _check_tokens(kind: str, clip: Clip, found: int) -> None:
    expected = clip.frames * clip.rows * clip.columns
    if found != expected:
        raise PromptError(
            f"A {kind} of grid {clip.frames}x{clip.rows}x{clip.columns} needs {expected} tokens in "
            f"input_ids, but {found} stand there. Was the prompt truncated?"
        )


def _pixels(inputs: Mapping[str, Any], values: str, grids: str, config: Any) -> list[Pixels]:
    """Split the processor's stacked patches into clips."""
    tensor, grid = inputs.get(values), inputs.get(grids)
    if tensor is None:
        return []
    if grid is None:
        raise PromptError(f"{values} came without {grids}; pass the processor's output unchanged.")
    sizes = grid.tolist()
    seconds = [1.0] * len(sizes)
    if values == "pixel_values_videos" and inputs.get("second_per_grid_ts") is not None:
        seconds = [float(value) for value in inputs["second_per_grid_ts"]]
    merge = config.vision_config.spatial_merge_size
    parts = tensor.split([t * h * w for t, h, w in sizes])
    return [
        Pixels(part, Clip(t, h // merge, w // merge, second))
        for part, (t, h, w), second in zip(parts, sizes, seconds, strict=True)
    ]
