"""A prompt made by hand, one token a letter, to read layouts by eye."""

from __future__ import annotations

import torch
from torch import Tensor

from flexselect.core.layout import NONE, Clip, Layout, Prompt, query_mask

# A token a letter: text before; video A of three frames, each a time stamp (t) and two visual
# tokens; text between; video B of two frames without stamps; an image (i); the question.
TEXT = "ss[tAAtAAtAA]m(BBBB)iiqq"
VIDEO = "..00000000000.111111...."
FRAME = "...000111222...0011....."


def index_of(text: str) -> Tensor:
    return torch.tensor([NONE if letter == "." else int(letter) for letter in text])


def make() -> Prompt:
    letters = torch.tensor([ord(letter) for letter in TEXT])
    visual = (letters == ord("A")) | (letters == ord("B"))
    feature = visual | (letters == ord("i"))
    layout = Layout(
        letters, index_of(VIDEO), index_of(FRAME), visual, feature, query_mask(visual, feature)
    )
    return Prompt(layout, (Clip(3, 1, 2, 0.5), Clip(2, 2, 1, 4.0)), (Clip(1, 1, 2),))


def text_of(prompt: Prompt, rows: Tensor | None = None) -> str:
    ids = prompt.layout.ids if rows is None else prompt.layout.ids[rows]
    return "".join(map(chr, ids.tolist()))
