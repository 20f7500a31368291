"""Where everything stands in a prompt: text, the frames of its videos, the query.

A prompt is laid out as prefix, frames, query. A *frame* is what moves as one when frame sets are
formed: its visual tokens and any text that belongs to it, such as a time stamp. Everything here is
bookkeeping on the host; no tensor of a layout ever lives on an accelerator.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import PromptError

#: Marks a token that belongs to no frame, or to no video.
NONE = -1


@dataclass(frozen=True)
class Clip:
    """The visual tokens of one video, or of one image (a clip of one frame).

    Attributes
    ----------
    frames : number of frames; for families that merge neighbouring pictures (Qwen2.5-VL merges
        two) a frame is one such temporal cell.
    rows, columns : visual tokens of one frame, as a grid.
    seconds_per_frame : time from one frame to the next, in seconds.
    stamps : for a family that writes it into the prompt, the time of every frame in seconds: the
        mean of its pictures'. Empty where only the pace is known.
    """

    frames: int
    rows: int
    columns: int
    seconds_per_frame: float = 1.0
    stamps: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class Grid:
    """Which part of its picture every visual token of a frame shows.

    Attributes
    ----------
    rows, columns : equal cells that the picture is cut into.
    cells : int64 ``(visual tokens of a frame,)``, the cell of each token, counted row by row, or
        -1 for a token that shows none, such as a newline or a tag.
    """

    rows: int
    columns: int
    cells: Tensor


@dataclass(frozen=True, eq=False)
class Layout:
    """One prompt, token by token. Every field is a host tensor of shape ``(tokens,)``.

    Attributes
    ----------
    ids : int64, token ids with every visual token expanded.
    video : int64, the video a token belongs to (its frames, and the text around them that only
        frames it, like ``<|vision_start|>``), or -1.
    frame : int64, the frame within its video, or -1 for tokens outside frames.
    visual : bool, the tokens that are ranked and may be dropped. Each lies in a frame.
    feature : bool, the tokens whose embedding comes from the vision tower, of videos and images
        alike. Usually the visual ones; InternVL also ranks the text tags around a frame.
    query : bool, the text tokens that ask. A tag that closes a frame or a video asks where no
        visual token follows it.
    """

    ids: Tensor
    video: Tensor
    frame: Tensor
    visual: Tensor
    feature: Tensor
    query: Tensor

    def __post_init__(self) -> None:
        lengths = {field.name: len(getattr(self, field.name)) for field in dataclasses.fields(self)}
        if len(set(lengths.values())) != 1:
            raise PromptError(f"The fields of a layout must be equally long, got {lengths}.")
        if bool((self.visual & (self.frame == NONE)).any()):
            raise PromptError("A visual token lies outside every frame.")

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Tensor) -> Layout:
        """Return the layout of the tokens ``rows`` (int64 indices), in that order."""
        return Layout(**{f.name: getattr(self, f.name)[rows] for f in dataclasses.fields(self)})


@dataclass(frozen=True, eq=False)
class Prompt:
    """A layout and the clips whose tokens it holds, in order of appearance.

    Attributes
    ----------
    layout : the tokens.
    videos : one `Clip` a video, indexed by ``layout.video``.
    images : one `Clip` an image. Images are read with the text: kept whole, never ranked.
    """

    layout: Layout
    videos: tuple[Clip, ...] = ()
    images: tuple[Clip, ...] = ()

    @property
    def num_visual(self) -> int:
        """Number of visual tokens, over all videos."""
        return int(self.layout.visual.sum())

    @property
    def num_frames(self) -> int:
        """Number of frames, over all videos."""
        return sum(clip.frames for clip in self.videos)

    def visual_rows(self, video: int | None = None) -> Tensor:
        """Token indices of the visual tokens, of one video or of all: int64 ``(visual,)``."""
        visual = self.layout.visual
        return (visual if video is None else visual & (self.layout.video == video)).nonzero()[:, 0]

    def rows_of_frames(self, video: int, frames: Tensor) -> Tensor:
        """Token indices of the prompt that shows only ``frames`` (int64) of ``video``.

        All text stays except what belongs to another frame or another video; the order of the
        prompt is kept. Returns int64 ``(tokens of the set,)``.
        """
        shown = torch.zeros(self.videos[video].frames, dtype=torch.bool)
        shown[frames] = True
        layout = self.layout
        own = layout.video == video
        in_frame = own & (layout.frame != NONE)
        keep = (layout.video == NONE) | own
        keep[in_frame] = shown[layout.frame[in_frame]]
        return keep.nonzero()[:, 0]

    def as_clip(self, video: int, frames: Tensor, rows: Tensor) -> Prompt:
        """Return the prompt of ``rows`` in which ``frames`` are a whole clip, one second apart.

        The reference scores every set as if it were a clip of its own with
        ``second_per_grid = 1.0``, whatever the sampling rate (paper section 3.2; fixtures, Q2).
        Only text after its last visual token asks.
        """
        layout = self.layout.take(rows)
        query = layout.query.clone()
        query[: int(layout.visual.nonzero()[-1])] = False
        position = torch.full((self.videos[video].frames,), NONE)
        position[frames] = torch.arange(len(frames))
        in_frame = layout.frame != NONE
        frame = layout.frame.clone()
        frame[in_frame] = position[layout.frame[in_frame]]
        own = torch.where(layout.video == video, 0, NONE)
        clip = dataclasses.replace(
            self.videos[video], frames=len(frames), seconds_per_frame=1.0, stamps=()
        )
        return Prompt(
            dataclasses.replace(layout, frame=frame, video=own, query=query),
            videos=(clip,),
            images=self.images,
        )


def query_mask(visual: Tensor, feature: Tensor) -> Tensor:
    """Mark the text after the last visual token, chat-template tail included (fixtures, C2).

    Parameters
    ----------
    visual, feature : bool ``(tokens,)``, as in `Layout`.

    Returns
    -------
    bool ``(tokens,)``
    """
    ranked = visual.nonzero()
    if len(ranked) == 0:
        return torch.zeros_like(visual)
    mask = torch.zeros_like(visual)
    mask[int(ranked[-1]) + 1 :] = True
    mask &= ~feature
    if not bool(mask.any()):
        raise PromptError(
            "No text follows the video, so nothing asks about it. Put the question after the video."
        )
    return mask
