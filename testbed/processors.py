"""The real processors of Qwen2.5-VL and InternVL, at the testbed's size, with chat templates.

The classes are those of transformers, with the normalisation of the real models. Only sizes and
the tokenizer differ. The templates are written for this project in each family's format.
"""

from __future__ import annotations

from typing import Any

from transformers import (
    GotOcr2ImageProcessor,
    InternVLProcessor,
    InternVLVideoProcessor,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from ..core.errors import OptionError
from .scenes import FRAME, GRID
from .tokenizer import SYSTEM_PROMPT, TURN_END, TURN_START, build_tokenizer

_IMAGENET: dict[str, Any] = {
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def build_processor(family: str) -> Any:
    """Build the processor of Qwen2.5-VL or InternVL around its tokenizer.

    Raises
    ------
    OptionError
        For another family.
    """
    tokenizer = build_tokenizer(family)
    if family == "qwen2_5_vl":
        size = {"shortest_edge": FRAME * FRAME, "longest_edge": FRAME * FRAME}
        return Qwen2_5_VLProcessor(
            Qwen2VLImageProcessor(size=size),
            tokenizer,
            # The cap on a whole video is for real resolutions; unset, it warns at every call.
            Qwen2VLVideoProcessor(size=size, cap_pixels_per_frame=False),
            chat_template=_chat_template(
                image="<|vision_start|><|image_pad|><|vision_end|>",
                video="<|vision_start|><|video_pad|><|vision_end|>",
                system=SYSTEM_PROMPT,
            ),
        )
    if family == "internvl":
        size = {"height": FRAME, "width": FRAME}
        return InternVLProcessor(
            GotOcr2ImageProcessor(size=size, crop_to_patches=False, **_IMAGENET),
            tokenizer,
            InternVLVideoProcessor(size=size, **_IMAGENET),
            image_seq_length=GRID * GRID,
            chat_template=_chat_template(image="<IMG_CONTEXT>\n", video="<video>\n", system=None),
        )
    raise OptionError(f"family={family!r} has no processor here; LLaVA-Video brings its own.")


def _chat_template(*, image: str, video: str, system: str | None) -> str:
    """Write a chat template with these placeholders and this default system message."""
    default = "" if system is None else f"{TURN_START}system\n{system}{TURN_END}\n"
    return (
        "{%- for message in messages -%}"
        "{%- if loop.first and message['role'] != 'system' -%}"
        "{{- " + repr(default) + " -}}"
        "{%- endif -%}"
        "{{- '" + TURN_START + "' + message['role'] + '\\n' -}}"
        "{%- if message['content'] is string -%}"
        "{{- message['content'] -}}"
        "{%- else -%}"
        "{%- for part in message['content'] -%}"
        "{%- if part['type'] == 'image' -%}{{- " + repr(image) + " -}}"
        "{%- elif part['type'] == 'video' -%}{{- " + repr(video) + " -}}"
        "{%- elif part['type'] == 'text' -%}{{- part['text'] -}}"
        "{%- else -%}{{- raise_exception('content must be image, video or text') -}}"
        "{%- endif -%}"
        "{%- endfor -%}"
        "{%- endif -%}"
        "{{- '" + TURN_END + "\\n' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '" + TURN_START + "assistant\\n' -}}{%- endif -%}"
    )
