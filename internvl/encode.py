"""InternVL: from processor outputs to layouts, and from pixels to features."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.architecture import Pixels, Request, runs, strip_padding
from ..core.errors import PromptError
from ..core.layout import NONE, Clip, Layout, Prompt, query_mask

#: Longest text that still counts as the label of a frame, in tokens.
_LABEL = 32


@dataclass(frozen=True)
class Shown:
    """One video or image as it stands in a prompt.

    Attributes
    ----------
    is_video : frames of a video, which are ranked, or the tiles of an image, which are kept.
    pictures : (start, stop) of every frame's, or of the image's, placeholder tokens.
    label : first token of the text before the first picture that belongs to it.
    """

    is_video: bool
    pictures: list[tuple[int, int]]
    label: int


def read_requests(inputs: Mapping[str, Any], config: Any) -> list[Request]:
    """Lay out a processor's batch; see `Architecture.read`."""
    values = inputs.get("pixel_values")
    left = torch.empty(0) if values is None else values
    requests = []
    for ids in strip_padding(inputs):
        taken: list[Pixels] = []
        shown = find_clips(ids, config)
        for clip in shown:
            tiles = sum(stop - start for start, stop in clip.pictures) // config.image_seq_length
            if tiles > len(left):
                raise PromptError(
                    "input_ids show more pictures than there are pixel values; pass the "
                    "processor's output unchanged."
                )
            taken.append(Pixels(left[:tiles], _clip(clip, config)))
            left = left[tiles:]
        requests.append(Request(_layout(ids, shown, taken, config), tuple(taken)))
    if len(left):
        raise PromptError(
            f"{len(left)} pictures have no place in input_ids; pass the processor's output "
            "unchanged."
        )
    return requests


def has_video(inputs: Mapping[str, Any], config: Any) -> bool:
    """Whether a processor's batch shows frames of a video; see `find_clips`."""
    if inputs.get("pixel_values") is None:
        return False
    return any(clip.is_video for ids in strip_padding(inputs) for clip in find_clips(ids, config))


def layout_prompt(
    ids: Tensor, videos: Sequence[Clip], images: Sequence[Clip], config: Any
) -> Prompt:
    """Lay out expanded token ids; see `Architecture.layout`."""
    shown = find_clips(ids, config) if images else _given(ids, videos, config)
    found = [clip for clip in shown if clip.is_video]
    if [len(clip.pictures) for clip in found] != [clip.frames for clip in videos]:
        raise PromptError(
            f"The prompt shows videos of {[len(clip.pictures) for clip in found]} frames, expected "
            f"{[clip.frames for clip in videos]}. Was it truncated?"
        )
    waiting = {True: list(videos), False: list(images)}
    clips = [Pixels(torch.empty(0), waiting[clip.is_video].pop(0)) for clip in shown]
    return _layout(ids, shown, clips, config)


def find_clips(ids: Tensor, config: Any) -> list[Shown]:
    """Find the videos and images of a prompt.

    Both are written with the same tokens, ``<img>``, placeholders, ``</img>``. An image is cut
    into tiles that share one pair of tags, a frame never is. Pictures of one tile are frames of a
    video where they stand side by side (the reference's prompt), or where each has the same label
    up to its number ("Frame1: ", "Frame2: ", the stock prompt). A single one is an image.
    """
    pictures = runs(ids == config.image_token_id)
    if pictures and (pictures[0][0] == 0 or pictures[-1][1] == len(ids)):
        raise PromptError("A picture's <img> or </img> is missing. Was the prompt truncated?")
    ends = [0, *(stop + 1 for _, stop in pictures)]
    gaps = [ids[end : start - 1] for end, (start, _) in zip(ends, pictures, strict=False)]
    pairs = [
        index > 0
        and all(b - a == config.image_seq_length for a, b in pictures[index - 1 : index + 1])
        for index in range(len(pictures))
    ]
    beside = [pair and len(gap) == 0 for pair, gap in zip(pairs, gaps, strict=True)] + [False]
    clips: list[Shown] = []
    for index, picture in enumerate(pictures):
        # Frames that stand side by side are never also labelled, so a label next to them is not
        # theirs: it parts an image from a video.
        labelled = (
            pairs[index]
            and not any(beside[index - 1 : index + 2])
            and _same_label(gaps[index - 1], gaps[index])
        )
        if beside[index] or labelled:
            before = clips.pop()
            label = before.label
            if labelled and not before.is_video:
                label = before.label - _label_length(gaps[index - 1], gaps[index])
            clips.append(Shown(True, [*before.pictures, picture], label))
        else:
            clips.append(Shown(False, [picture], picture[0] - 1))
    return clips


def encode_pixels(model: Any, pixels: Pixels, selector: Any | None) -> tuple[Tensor, Tensor | None]:
    """Run the tower once for the model and the selector; see `Architecture.encode`."""
    core = model.model
    like = next(core.vision_tower.parameters())
    values = pixels.values.to(like.device, like.dtype, non_blocking=True)
    if selector is None:
        return core.get_image_features(values).pooler_output.flatten(0, 1), None

    # The selector projects what the model's projector gets to see.
    seen: list[Tensor] = []
    handle = core.multi_modal_projector.register_forward_pre_hook(
        lambda _, states: seen.append(states[0])
    )
    try:
        features = core.get_image_features(values).pooler_output
    finally:
        handle.remove()
    return features.flatten(0, 1), selector.project(seen[0]).flatten(0, 1)


def _layout(ids: Tensor, shown: list[Shown], pixels: list[Pixels], config: Any) -> Prompt:
    feature = ids == config.image_token_id
    video, frame = torch.full_like(ids, NONE), torch.full_like(ids, NONE)
    visual = torch.zeros_like(feature)
    videos: list[Clip] = []
    images: list[Clip] = []
    for clip, part in zip(shown, pixels, strict=True):
        if not clip.is_video:
            images.append(part.clip)
            continue
        begin = clip.label
        for number, (start, stop) in enumerate(clip.pictures):
            # The tags are ranked like the tokens between them (fixtures, I1); a label in front
            # goes where its frame goes.
            video[begin : stop + 1] = len(videos)
            frame[begin : stop + 1] = number
            visual[start - 1 : stop + 1] = True
            begin = stop + 1
        videos.append(part.clip)
    query = query_mask(visual, feature)
    return Prompt(Layout(ids, video, frame, visual, feature, query), tuple(videos), tuple(images))


def _clip(shown: Shown, config: Any) -> Clip:
    side = math.isqrt(config.image_seq_length)
    tiles = sum(stop - start for start, stop in shown.pictures) // config.image_seq_length
    if shown.is_video:
        return Clip(len(shown.pictures), side, side)
    return Clip(1, side * tiles, side)


def _given(ids: Tensor, videos: Sequence[Clip], config: Any) -> list[Shown]:
    """Cut the pictures of a prompt without images into videos of known length."""
    found = find_clips(ids, config)
    pictures = [picture for clip in found for picture in clip.pictures]
    labels = {clip.pictures[0]: clip.label for clip in found}
    shown = []
    for clip in videos:
        own, pictures = pictures[: clip.frames], pictures[clip.frames :]
        if own:
            shown.append(Shown(True, own, labels.get(own[0], own[0][0] - 1)))
    if pictures:
        shown.append(Shown(True, pictures, pictures[0][0] - 1))
    return shown


def _word(gap: Tensor) -> int:
    """Return the token that names a label: the first, or the one after the line break."""
    return int(gap[min(1, len(gap) - 1)])


def _same_label(previous: Tensor, gap: Tensor) -> bool:
    """Whether the text before a picture labels it like the one before labels its picture."""
    if not 0 < len(gap) <= _LABEL:
        return False
    return bool((previous[-_LABEL:] == _word(gap)).any())


def _label_length(previous: Tensor, gap: Tensor) -> int:
    """Count the tokens at the end of ``previous`` that label the first frame as ``gap`` the next.

    A lone line break between frames is no label of the first.
    """
    if len(gap) == 1:
        return 0
    tail = previous[-_LABEL:]
    return len(tail) - int((tail == _word(gap)).nonzero()[-1])
