"""InternVL: from processor outputs to layouts, and from pixels to features."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.architecture import Pixels, Request, runs, strip_padding
from ..core.decoder import device_of
from ..core.errors import PromptError
from ..core.layout import NONE, Clip, Grid, Layout, Prompt, query_mask

#: Longest text that still counts as the label of a frame, in tokens.
_LABEL = 32

Picture = tuple[int, int]
#: What parts a picture from the one before it, if both may be frames of one video.
Link = Literal["nothing", "break", "label"]


@dataclass(frozen=True)
class Shown:
    """One video or image as it stands in a prompt.

    Attributes
    ----------
    is_video : frames of a video, which are ranked, or the tiles of an image, which are kept.
    pictures : (start, stop) of every frame's, or of the image's, placeholder tokens.
    start, end : (first, one past the last) token that belongs to it: a label before the first
        picture, and a line break after the last where line breaks part the pictures.
    """

    is_video: bool
    pictures: list[Picture]
    start: int
    end: int


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

    Both are written with the same tokens, ``<img>``, placeholders, ``</img>``, so the text between
    pictures has to tell. An image is cut into tiles that share one pair of tags, a frame never is.
    Pictures of one tile are the frames of a video where they stand side by side (the reference's
    prompt), where a single token such as a line break parts them, or where lines label them alike
    up to a number ("Frame1: ", "Frame2: ", the stock prompt; "Frame1 Time 0.5s: "). A label that
    comes again begins another video. Any other picture is an image. So images of one tile that are
    written like frames are taken for frames.
    """
    pictures, gaps = _pictures(ids, config)
    tiled = [stop - start != config.image_seq_length for start, stop in pictures]
    return _shown(ids, pictures, gaps, _chains(gaps, tiled), tiled)


def encode_pixels(model: Any, pixels: Pixels, selector: Any | None) -> tuple[Tensor, Tensor | None]:
    """Run the tower once for the model and the selector; see `Architecture.encode`."""
    core = model.model
    tower = core.vision_tower
    values = pixels.values.to(device_of(tower), tower.dtype)
    if selector is None:
        return core.get_image_features(values).pooler_output.flatten(0, 1), None

    # The selector projects what the model's projector gets to see.
    # Another thread may be in the same tower, so only this one's states count.
    thread = threading.get_ident()
    seen: list[Tensor] = []

    def keep_states(_: Any, states: tuple[Tensor]) -> None:
        if threading.get_ident() == thread:
            seen.append(states[0])

    handle = core.multi_modal_projector.register_forward_pre_hook(keep_states)
    try:
        features = core.get_image_features(values).pooler_output
    finally:
        handle.remove()
    return features.flatten(0, 1), selector.project(seen[0]).flatten(0, 1)


def frame_grid(clip: Clip) -> Grid:
    """Place the visual tokens of a frame; see `Architecture.grid`."""
    cells = torch.arange(clip.rows * clip.columns)
    return Grid(clip.rows, clip.columns, torch.nn.functional.pad(cells, (1, 1), value=NONE))


def _layout(ids: Tensor, shown: list[Shown], pixels: list[Pixels], config: Any) -> Prompt:
    feature = ids == config.image_token_id
    video, frame = torch.full_like(ids, NONE), torch.full_like(ids, NONE)
    visual, closing = torch.zeros_like(feature), torch.zeros_like(feature)
    videos: list[Clip] = []
    images: list[Clip] = []
    for clip, part in zip(shown, pixels, strict=True):
        if not clip.is_video:
            images.append(part.clip)
            continue
        begin = clip.start
        for number, (start, stop) in enumerate(clip.pictures):
            # The tags are ranked like the tokens between them (fixtures, I1); a label in front
            # goes where its frame goes.
            video[begin : stop + 1] = len(videos)
            frame[begin : stop + 1] = number
            visual[start - 1 : stop + 1] = True
            begin = stop + 1
        video[begin : clip.end] = len(videos)
        closing[begin : clip.end] = True
        videos.append(part.clip)
    query = query_mask(visual, feature) | closing
    return Prompt(Layout(ids, video, frame, visual, feature, query), tuple(videos), tuple(images))


def _clip(shown: Shown, config: Any) -> Clip:
    side = math.isqrt(config.image_seq_length)
    tiles = sum(stop - start for start, stop in shown.pictures) // config.image_seq_length
    if shown.is_video:
        return Clip(len(shown.pictures), side, side)
    return Clip(1, side * tiles, side)


def _given(ids: Tensor, videos: Sequence[Clip], config: Any) -> list[Shown]:
    """Cut the pictures of a prompt without images into videos of known length."""
    pictures, gaps = _pictures(ids, config)
    starts = [0, *accumulate(clip.frames for clip in videos)]
    ends = [*starts[1:], len(pictures)]
    # Pictures left over are a video too many, which the caller reports.
    chains = [
        list(range(start, min(end, len(pictures))))
        for start, end in zip(starts, ends, strict=True)
        if start < len(pictures)
    ]
    return _shown(ids, pictures, gaps, chains)


def _shown(
    ids: Tensor,
    pictures: list[Picture],
    gaps: list[Tensor],
    chains: list[list[int]],
    tiled: list[bool] | None = None,
) -> list[Shown]:
    """Describe groups of pictures; without ``tiled`` all of them are videos."""
    lengths = _label_lengths(chains, gaps)
    between = [gaps[chain[1]] for chain in chains if chain[1:] and len(gaps[chain[1]])]
    shown = []
    for chain, length in zip(chains, lengths, strict=True):
        own = [pictures[index] for index in chain]
        video = tiled is None or len(chain) > 1 or (length > 0 and not tiled[chain[0]])
        end = own[-1][1] + 1
        if between and end < len(ids) and ids[end] == between[0][0]:
            end += 1
        shown.append(Shown(video, own, own[0][0] - 1 - length, end))
    return shown


def _pictures(ids: Tensor, config: Any) -> tuple[list[Picture], list[Tensor]]:
    """Find the placeholders of every picture, and the text between it and the one before."""
    pictures = runs(ids == config.image_token_id)
    if pictures and (pictures[0][0] == 0 or pictures[-1][1] == len(ids)):
        raise PromptError("A picture's <img> or </img> is missing. Was the prompt truncated?")
    ends = [0, *(stop + 1 for _, stop in pictures)]
    gaps = [ids[end : start - 1] for end, (start, _) in zip(ends, pictures, strict=False)]
    return pictures, gaps


def _chains(gaps: list[Tensor], tiled: list[bool]) -> list[list[int]]:
    """Group pictures that follow each other as frames of one video do; each is in one group."""
    links = [
        None if index == 0 or any(tiled[index - 1 : index + 1]) else _link(*gaps[index - 1 :][:2])
        for index in range(len(gaps))
    ]
    chains: list[list[int]] = []
    for index, link in enumerate(links):
        if link is None:
            goes_on = False
        elif len(chains[-1]) == 1:
            # Text before frames that stand side by side parts them from an image.
            goes_on = link == "nothing" or links[index + 1 : index + 2] != ["nothing"]
        else:
            goes_on = link == links[index - 1]
            if link == "label":
                first, second = (gaps[i] for i in chains[-1][:2])
                label = first[len(first) - _label_length(first, second) :]
                goes_on = goes_on and not _ends_with(gaps[index], label)
        if goes_on:
            chains[-1].append(index)
        else:
            chains.append([index])
    return chains


def _link(previous: Tensor, gap: Tensor) -> Link | None:
    if len(gap) < 2:
        return "break" if len(gap) else "nothing"
    return "label" if _label_length(previous, gap) else None


def _label_length(previous: Tensor, gap: Tensor) -> int:
    """Count the tokens at the end of ``previous`` that label a picture as ``gap`` does the next.

    Labels are alike up to a number, and each but the first begins a line. 0 for none.
    """
    if not 1 < len(gap) <= _LABEL:
        return 0
    label = gap[1:]
    tail = previous[-_LABEL:]
    for at in (tail == label[0]).nonzero()[:, 0].flip(0).tolist():
        if _ends_with(tail, label[-1:]) and not torch.equal(tail[at:], label):
            return len(tail) - at
    return 0


def _label_lengths(chains: list[list[int]], gaps: list[Tensor]) -> list[int]:
    """Count the tokens before the first picture of every chain that label it; 0 for none.

    A lone picture is labelled if its text ends like the first label of a video.
    """
    lengths = [_label_length(*(gaps[i] for i in chain[:2])) if chain[1:] else 0 for chain in chains]
    known = [
        gaps[chain[0]][len(gaps[chain[0]]) - length :]
        for chain, length in zip(chains, lengths, strict=True)
        if length
    ]
    for index, chain in enumerate(chains):
        if not chain[1:]:
            found = [len(label) for label in known if _ends_with(gaps[chain[0]], label)]
            lengths[index] = max(found, default=0)
    return lengths


def _ends_with(text: Tensor, end: Tensor) -> bool:
    return len(end) <= len(text) and torch.equal(text[len(text) - len(end) :], end)
