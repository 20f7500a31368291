"""Qwen3-VL: from processor outputs to layouts, and from pixels to features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.architecture import Pixels, Request, runs, strip_padding
from ..core.decoder import device_of
from ..core.errors import PromptError
from ..core.layout import NONE, Clip, Layout, Prompt, query_mask

#: Longest text that still counts as a frame's time stamp, in tokens.
_STAMP = 32


def read_requests(inputs: Mapping[str, Any], config: Any) -> list[Request]:
    """Lay out a processor's batch; see `Architecture.read`."""
    videos = _pixels(inputs, "pixel_values_videos", "video_grid_thw", config)
    images = _pixels(inputs, "pixel_values", "image_grid_thw", config)
    requests = []
    for ids in strip_padding(inputs):
        shown_videos: list[Pixels] = []
        shown_images: list[Pixels] = []
        taken: list[Pixels] = []
        frames_to_come = 0
        for start, _ in runs(_is_feature(ids, config)):
            video = bool(ids[start] == config.video_token_id)
            if video and frames_to_come:
                frames_to_come -= 1
                continue
            waiting, shown = (videos, shown_videos) if video else (images, shown_images)
            if not waiting:
                raise PromptError(
                    "input_ids show more videos or images than there are pixel values; pass the "
                    "processor's output unchanged."
                )
            pixels = waiting.pop(0)
            shown.append(pixels)
            taken.append(pixels)
            if video:
                frames_to_come = pixels.clip.frames - 1
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
    """Lay out expanded token ids; see `Architecture.layout`.

    Every frame stands between tags of its own, behind its time stamp; the tags that the chat
    template put around the placeholder stay around the whole video.
    """
    feature = _is_feature(ids, config)
    visual = ids == config.video_token_id
    video, frame = torch.full_like(ids, NONE), torch.full_like(ids, NONE)
    closing = torch.zeros_like(visual)
    waiting_videos, waiting_images = list(enumerate(videos)), list(images)
    pictures = runs(feature)
    while pictures:
        start, stop = pictures[0]
        if not (waiting_videos if visual[start] else waiting_images):
            raise PromptError(
                "The prompt has more video or image placeholders than there are videos and images. "
                "Does its text contain one?"
            )
        if not visual[start]:
            pictures.pop(0)
            _check_tokens("image", waiting_images.pop(0), stop - start)
            continue
        index, clip = waiting_videos.pop(0)
        own, pictures = pictures[: clip.frames], pictures[clip.frames :]
        _check_frames(clip, own, visual)
        first, begin = _beginning(ids, own, config)
        end = begin
        for number, (_, stop) in enumerate(own):
            # The stamp and the tags around a frame go where the frame goes.
            end = stop + _is(ids, stop, config.vision_end_token_id)
            frame[begin:end] = number
            closing[stop:end] = True
            begin = end
        last = end + _is(ids, end, config.vision_end_token_id)
        closing[end:last] = True
        video[first:last] = index
    query = query_mask(visual, feature) | closing
    return Prompt(Layout(ids, video, frame, visual, feature, query), tuple(videos), tuple(images))


def encode_pixels(model: Any, pixels: Pixels, selector: Any | None) -> tuple[Tensor, Tensor | None]:
    """Run the tower once for the model and the selector; see `Architecture.encode`.

    The model's features are wide rows, see `deepstack`.
    """
    features, states = look(model, pixels)
    return features, None if selector is None else selector.project(states)


def look(model: Any, pixels: Pixels) -> tuple[Tensor, Tensor]:
    """Run the tower: wide rows for the model, and the last states ``(patches, tower hidden)``."""
    tower = model.model.visual
    size = tower.spatial_merge_size
    clip = pixels.clip
    grid = torch.tensor([[clip.frames, clip.rows * size, clip.columns * size]])
    values = pixels.values.to(device_of(tower), tower.dtype)
    seen = tower(values, grid_thw=grid.to(values.device))
    return torch.cat((seen.pooler_output, *seen.deepstack_features), -1), seen.last_hidden_state


def _is_feature(ids: Tensor, config: Any) -> Tensor:
    return (ids == config.video_token_id) | (ids == config.image_token_id)


def _is(ids: Tensor, index: int, token: int) -> int:
    """Return 1 if ``token`` stands at ``index``, else 0."""
    return int(0 <= index < len(ids) and int(ids[index]) == token)


def _beginning(ids: Tensor, frames: Sequence[tuple[int, int]], config: Any) -> tuple[int, int]:
    """Find where a video begins, and where its first frame does with its time stamp.

    The template's own tag, right before the stamp, tells. Where a prompt has none, the stamp is the
    text before the first frame that begins as the text before the second does; that of a video of
    one frame then counts as text.
    """
    opening = frames[0][0] - _is(ids, frames[0][0] - 1, config.vision_start_token_id)
    for index in range(opening - 1, max(-1, opening - 1 - _STAMP), -1):
        if int(ids[index]) == config.vision_start_token_id:
            return index, index + 1
        if int(ids[index]) == config.vision_end_token_id:
            break
    if len(frames) > 1:
        after = frames[0][1] + _is(ids, frames[0][1], config.vision_end_token_id)
        before = frames[1][0] - _is(ids, frames[1][0] - 1, config.vision_start_token_id)
        for index in range(opening - 1, max(-1, opening - 1 - _STAMP), -1):
            if before > after and int(ids[index]) == int(ids[after]):
                return index, index
    return opening, opening


def _check_frames(clip: Clip, frames: Sequence[tuple[int, int]], visual: Tensor) -> None:
    found = [stop - start if visual[start] else 0 for start, stop in frames]
    if found != [clip.rows * clip.columns] * clip.frames:
        raise PromptError(
            f"A video of {clip.frames} frames of {clip.rows}x{clip.columns} tokens needs as many "
            f"stretches of as many tokens in input_ids, but {len(found)} stand there, of "
            f"{min(found)} to {max(found)} tokens. Was the prompt truncated?"
        )


def _check_tokens(kind: str, clip: Clip, found: int) -> None:
    expected = clip.frames * clip.rows * clip.columns
    if found != expected:
        raise PromptError(
            f"An {kind} of grid {clip.rows}x{clip.columns} needs {expected} tokens in input_ids, "
            f"but {found} stand there. Was the prompt truncated?"
        )


def _pixels(inputs: Mapping[str, Any], values: str, grids: str, config: Any) -> list[Pixels]:
    """Split the processor's stacked patches into clips."""
    tensor, grid = inputs.get(values), inputs.get(grids)
    if tensor is None:
        return []
    if grid is None:
        raise PromptError(f"{values} came without {grids}; pass the processor's output unchanged.")
    sizes = grid.tolist()
    merge = config.vision_config.spatial_merge_size
    parts = tensor.split([t * h * w for t, h, w in sizes])
    return [
        Pixels(part, Clip(t, h // merge, w // merge))
        for part, (t, h, w) in zip(parts, sizes, strict=True)
    ]
