"""The families under contract, and how their prompts are made.

A family is one line of `FAMILIES`: a module of ``tiny/`` that builds a random model of the stock
class, the family's real processor around a tiny tokenizer, and a Lite selector. Everything else
here, and every test of this folder, knows no family.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import flexselect
from flexselect.inference.apply import Applied
from flexselect.inference.features import Encoded

from .tiny import internvl, llava_video, qwen2_5_vl, qwen3_vl

#: Side-effect free knobs that make every video of the suite take several sets and lose tokens.
LAYER, FRAMES_PER_SET = 2, 3
#: Seconds between pictures of the suite's videos: not 1, so that pace matters.
SECONDS_PER_PICTURE = 0.75


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes
    ----------
    name : as in `Architecture.family`.
    tiny : module with ``processor()``, ``process(processor, text, images, videos, **options)`` to
        run it, ``model(tokenizer, seed, **text_config_overrides)`` and
        ``selector(model, seed, **config_overrides)``, the HEIGHT and WIDTH of a video's pictures
        and the IMAGE_HEIGHT and IMAGE_WIDTH of images, and in OTHER_TOWER the overrides that make a
        selector for a tower of another width.
    pictures : pictures of a video that become one frame.
    timed : whether its processor tells the model when frames were taken; else they count as one
        second apart.
    """

    name: str
    tiny: ModuleType
    pictures: int
    timed: bool

    def processor(self) -> Any:
        return _processor(self)

    def model(self, seed: int = 0, **overrides: Any) -> Any:
        """Build a model; the same seed gives the same weights."""
        return self.tiny.model(self.processor().tokenizer, seed, **overrides)

    def selector(self, model: Any, seed: int = 1, **overrides: Any) -> Any:
        """Build a Lite selector for ``model``."""
        return self.tiny.selector(model, seed, **overrides)

    def selector_of_another_size(self, model: Any) -> Any:
        """Build a Lite selector for a vision tower of another width."""
        return self.tiny.selector(model, 1, **self.tiny.OTHER_TOWER)

    @property
    def seconds_per_frame(self) -> float:
        """Time from a frame to the next as the model's inputs have it."""
        return SECONDS_PER_PICTURE * self.pictures if self.timed else 1.0

    def frame_tokens(self, model: Any) -> int:
        """Visual tokens of one frame, as the family's own layout has them."""
        [request] = flexselect.architecture_of(model).read(self.inputs([Video(2), "?"]))
        return request.prompt.num_visual // 2

    def video(self, frames: int, seed: int) -> Tensor:
        """Draw a video that becomes ``frames`` frames: uint8 ``(pictures, 3, height, width)``."""
        size = (frames * self.pictures, 3, self.tiny.HEIGHT, self.tiny.WIDTH)
        return noise(size, seed)

    def image(self, seed: int) -> Tensor:
        return noise((3, self.tiny.IMAGE_HEIGHT, self.tiny.IMAGE_WIDTH), 1000 + seed)

    def inputs(self, *conversations: Sequence[Any], padding_side: str = "left") -> dict[str, Any]:
        """Run the real processor over one conversation a row.

        A conversation is the user's message: strings, `Video` and `Image`, in order; or a list of
        chat messages whose content is such a sequence.
        """
        chats = [_as_chat(conversation) for conversation in conversations]
        parts = [part for chat in chats for _, content in chat for part in content]
        videos = [self.video(p.frames, p.seed) for p in parts if isinstance(p, Video)]
        return self.inputs_of(videos, *conversations, padding_side=padding_side)

    def inputs_of(
        self, videos: Sequence[Tensor], *conversations: Sequence[Any], padding_side: str = "left"
    ) -> dict[str, Any]:
        """Run the processor with these pictures in the place of the videos."""
        processor = self.processor()
        chats = [_as_chat(conversation) for conversation in conversations]
        parts = [part for chat in chats for _, content in chat for part in content]
        images = [self.image(p.seed) for p in parts if isinstance(p, Image)]
        texts = [self.templated(chat) for chat in chats]
        options: dict[str, Any] = {}
        if videos:
            options["videos"] = list(videos)
            options["do_sample_frames"] = False
            options["video_metadata"] = [
                {
                    "total_num_frames": len(video),
                    "fps": 1 / SECONDS_PER_PICTURE,
                    "frames_indices": list(range(len(video))),
                }
                for video in videos
            ]
        if images:
            options["images"] = images
        processor.tokenizer.padding_side = padding_side
        return self.tiny.process(processor, text=texts, **options)

    def templated(self, chat: Sequence[tuple[str, Sequence[Any]]]) -> str:
        """Write a chat with the processor's template."""
        messages = [
            {"role": role, "content": [_content(part) for part in content]}
            for role, content in chat
        ]
        processor = self.processor()
        return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@dataclass(frozen=True)
class Video:
    """A random video of ``frames`` frames."""

    frames: int
    seed: int = 0


@dataclass(frozen=True)
class Image:
    """A random image."""

    seed: int = 0


#: Every family under contract. The tests of this folder run for each.
FAMILIES = [
    Family("qwen2_5_vl", qwen2_5_vl, pictures=2, timed=True),
    Family("qwen3_vl", qwen3_vl, pictures=2, timed=False),
    Family("llava_video", llava_video, pictures=1, timed=False),
    Family("internvl", internvl, pictures=1, timed=False),
]


def noise(size: tuple[int, ...], seed: int) -> Tensor:
    """Draw pictures, uint8."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=draw)


def knobs(budget: int, **more: Any) -> dict[str, Any]:
    """Return knobs of FlexSelect under which the suite's videos take several sets."""
    return {"budget": budget, "layer": LAYER, "frames_per_set": FRAMES_PER_SET, **more}


def encoded(applied: Applied, inputs: Mapping[str, Any]) -> list[Encoded]:
    """Encode every row of a batch as the engine does."""
    return [applied.engine.encode(request) for request in applied.architecture.read(inputs)]


def unpatched_positions(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Position ids of a padded batch under the convention the family's weights were trained with.

    For Qwen2.5-VL those differ from what transformers >= 5.3 would choose, so comparisons with the
    unpatched model pass them.
    """
    architecture = flexselect.architecture_of(model)
    mask = inputs["attention_mask"].bool()
    parts = [architecture.positions(request.prompt) for request in architecture.read(inputs)]
    shape = (*parts[0].shape[:-1], *mask.shape)
    positions = torch.zeros(shape, dtype=torch.long)
    for row, part in enumerate(parts):
        positions[..., row, mask[row]] = part
    return positions


def _as_chat(conversation: Sequence[Any]) -> list[tuple[str, Sequence[Any]]]:
    if isinstance(conversation[0], tuple):
        return list(conversation)
    return [("user", conversation)]


def _content(part: Any) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": type(part).__name__.lower()}


@cache
def _processor(family: Family) -> Any:
    return family.tiny.processor()
