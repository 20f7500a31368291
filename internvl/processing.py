"""The processor of an original checkpoint, and the two ways a video is written into a prompt.

``framed`` is the stock processor's text, ``Frame1: <img>…</img>`` and so on, one line a frame.
``joined`` puts the frames side by side with no text between them, as the FlexSelect reference does
in its evaluation (fixtures, I1); the question follows without a line break.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLProcessor,
    InternVLVideoProcessor,
    PreTrainedTokenizerBase,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..core.errors import OptionError, PromptError

FrameStyle = Literal["framed", "joined"]

#: What InternVL2.5 was told about itself in every conversation it was trained on.
SYSTEM_PROMPT = (
    "你是书生·万象，英文名是InternVL，"  # noqa: RUF001 (the comma it was trained with)
    "是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)


class JoinedFramesProcessor(InternVLProcessor):
    """The stock processor, except that a video's frames stand side by side."""

    def replace_video_token(self, video_inputs: dict[str, Any], video_idx: int, **_: Any) -> str:
        """Return the text that takes the place of one ``<video>``."""
        frames = video_inputs["pixel_values_videos"][video_idx].shape[0]
        picture = self.image_token * self.image_seq_length
        return f"{self.start_image_token}{picture}{self.end_image_token}" * frames

    def to_dict(self) -> dict[str, Any]:
        """Describe the processor as the stock one: how frames are written is chosen at run time."""
        return {**super().to_dict(), "processor_class": InternVLProcessor.__name__}


def chat_template(style: FrameStyle = "framed", system: str = SYSTEM_PROMPT) -> str:
    """Return the ``internvl2_5`` conversation as a Jinja template.

    A conversation without a system message gets ``system``. The text does not begin with BOS: the
    tokenizer of a checkpoint that wants one adds it.
    """
    after_video = {"framed": "\\n", "joined": ""}[_check_style(style)]
    return (
        "{%- if messages[0]['role'] != 'system' -%}"
        f"{{{{- '<|im_start|>system\\n{system}<|im_end|>\\n' -}}}}"
        "{%- endif -%}"
        "{%- for message in messages -%}"
        "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
        "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
        "{%- for part in message['content'] -%}"
        "{%- if part['type'] == 'image' -%}{{- '<IMG_CONTEXT>\\n' -}}"
        f"{{%- elif part['type'] == 'video' -%}}{{{{- '<video>{after_video}' -}}}}"
        "{%- elif part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}"
        "{%- endfor -%}"
        "{%- endif -%}"
        "{{- '<|im_end|>\\n' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
    )


def build_processor(
    tokenizer: PreTrainedTokenizerBase,
    config: InternVLConfig,
    *,
    picture_size: int | None = None,
    min_patches: int = 1,
    max_patches: int = 12,
    template: str | None = None,
) -> InternVLProcessor:
    """Build the stock processor for a converted checkpoint.

    Parameters
    ----------
    tokenizer : as `internvl.tokenization.load_tokenizer` returns it.
    config : of the converted model.
    picture_size : pixels along each side of a frame or tile; default, the tower's own.
    min_patches, max_patches : tiles of a still image. Frames of a video are never tiled.
    template : chat template; default, InternVL2.5's.
    """
    side = picture_size or config.vision_config.image_size[0]
    pictures: dict[str, Any] = {
        "size": {"height": side, "width": side},
        "image_mean": IMAGENET_DEFAULT_MEAN,
        "image_std": IMAGENET_DEFAULT_STD,
    }
    return InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(
            **pictures, crop_to_patches=True, min_patches=min_patches, max_patches=max_patches
        ),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(**pictures),
        image_seq_length=config.image_seq_length,
        chat_template=template or chat_template(),
    )


def with_frame_style(processor: InternVLProcessor, style: FrameStyle) -> InternVLProcessor:
    """Return ``processor`` writing videos in ``style``; the one passed in stays as it is.

    A chat template of this module follows the style. Any other is kept, and with it the line break
    that it may put after ``<video>``.
    """
    kind = {"framed": InternVLProcessor, "joined": JoinedFramesProcessor}[_check_style(style)]
    template = processor.chat_template
    if template in {chat_template(known) for known in get_args(FrameStyle)}:
        template = chat_template(style)
    return kind(
        image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
        video_processor=processor.video_processor,
        image_seq_length=processor.image_seq_length,
        chat_template=template,
    )


def expand_videos(processor: InternVLProcessor, text: str, frames: Sequence[int]) -> str:
    """Write every ``<video>`` of ``text`` out as the processor would, before a frame is decoded.

    ``processor.tokenizer(expand_videos(…))`` gives the ids that ``processor(text, videos=…)``
    gives for videos of so many frames, in the style of `with_frame_style`.

    Parameters
    ----------
    frames : number of frames of each video, in the order of the placeholders.

    Raises
    ------
    PromptError
        There are more or fewer placeholders than videos.
    """
    parts = text.split(processor.video_token)
    if len(parts) - 1 != len(frames):
        raise PromptError(
            f"The prompt has {len(parts) - 1} {processor.video_token} placeholders for "
            f"{len(frames)} videos; expected one for each."
        )
    blank = {"pixel_values_videos": [torch.empty(count, 0, device="meta") for count in frames]}
    written = [processor.replace_video_token(blank, i) for i in range(len(frames))]
    return parts[0] + "".join(new + rest for new, rest in zip(written, parts[1:], strict=True))


def _check_style(style: str) -> str:
    if style not in get_args(FrameStyle):
        raise OptionError(f"style must be one of {', '.join(get_args(FrameStyle))}, got {style!r}.")
    return style
