"""The processor of LLaVA-Video: SigLIP pictures, the ``qwen_1_5`` conversation, time instructions.

It is LLaVA-OneVision's processor with LLaVA-Video's number of placeholders. Importing this module
registers it with AutoProcessor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from transformers import (
    AddedToken,
    AutoProcessor,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
)

from ..core.errors import PromptError
from .modeling import LlavaVideoConfig, frame_grid, video_tokens

#: The ``qwen_1_5`` conversation: ChatML, with a default system prompt. A picture's placeholder is
#: followed by a line break where text follows it.
CHAT_TEMPLATE = (
    "{%- if messages[0].role != 'system' -%}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string -%}{{ message.content }}"
    "{%- else -%}"
    "{%- for item in message.content -%}"
    "{%- if item.type == 'text' -%}{{ item.text }}"
    "{%- else -%}"
    "{{ '<video>' if item.type == 'video' else '<image>' }}"
    "{{ '\\n' if loop.nextitem is defined and loop.nextitem.type == 'text' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{ '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{{ '<|im_start|>assistant\\n' if add_generation_prompt }}"
)

_SIGLIP_MEAN_STD = [0.5, 0.5, 0.5]


class LlavaVideoProcessor(LlavaOnevisionProcessor):
    """Prepares prompts and decoded frames for LLaVA-Video.

    Parameters
    ----------
    spatial_pool_mode, spatial_pool_stride, newline_position : as in `LlavaVideoConfig`.
    time_instruction : tell the model how long each video lasts and when its frames were taken; see
        `time_instruction`.

    The other parameters are those of `LlavaOnevisionProcessor`.
    """

    # Videos of one batch may differ in length, and then stay a list.
    skip_tensor_conversion: ClassVar[list[str]] = [
        *LlavaOnevisionProcessor.skip_tensor_conversion,
        "pixel_values_videos",
    ]

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        video_processor: Any = None,
        num_image_tokens: int = 729,
        vision_feature_select_strategy: str = "full",
        chat_template: str | None = None,
        image_token: str = "<image>",
        video_token: str = "<video>",
        vision_aspect_ratio: str = "anyres_max_9",
        spatial_pool_mode: str = "bilinear",
        spatial_pool_stride: int = 2,
        newline_position: str = "grid",
        time_instruction: bool = False,
        **kwargs: Any,
    ) -> None:
        self.spatial_pool_mode = spatial_pool_mode
        self.spatial_pool_stride = spatial_pool_stride
        self.newline_position = newline_position
        self.time_instruction = time_instruction
        super().__init__(
            image_processor,
            tokenizer,
            video_processor,
            num_image_tokens=num_image_tokens,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=CHAT_TEMPLATE if chat_template is None else chat_template,
            image_token=image_token,
            video_token=video_token,
            vision_aspect_ratio=vision_aspect_ratio,
            **kwargs,
        )

    @property
    def frame_grid(self) -> tuple[int, int]:
        """Visual tokens of a frame as rows and columns, newlines included: 14 × 15."""
        side = math.isqrt(self.num_image_tokens)
        return frame_grid(
            side, self.spatial_pool_mode, self.spatial_pool_stride, self.newline_position
        )

    def __call__(
        self,
        images: Any = None,
        text: Any = None,
        videos: Any = None,
        *,
        time_instruction: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Tokenise prompts, expand their placeholders, and prepare the pictures.

        Parameters
        ----------
        text : a prompt or a batch of them, with one ``<video>`` for each video.
        videos : decoded frames, a video ``(frames, 3, height, width)`` or its list.
        time_instruction : overrides the processor's own setting. Needs ``video_metadata`` with
            ``fps``, ``total_num_frames`` and ``frames_indices`` for every video.

        Returns
        -------
        What `LlavaOnevisionProcessor` returns; ``pixel_values_videos`` is a list where the videos
        of a batch differ in length.

        Raises
        ------
        PromptError
            A time instruction is asked for and the videos' times are not known.
        """
        wanted = self.time_instruction if time_instruction is None else time_instruction
        if wanted and videos is not None and text is not None:
            text = self._with_times(text, kwargs.get("video_metadata"))
        inputs = super().__call__(images=images, text=text, videos=videos, **kwargs)
        pictures = inputs.get("pixel_values_videos")
        same = pictures is not None and len({len(video) for video in pictures}) == 1
        if same and kwargs.get("return_tensors") == "pt":
            inputs["pixel_values_videos"] = torch.stack(pictures)
        return inputs

    def _process_videos(self, videos: Any, **kwargs: Any) -> Any:
        """Hold back the stock stacking, which fails on videos of different lengths."""
        return super()._process_videos(videos, **{**kwargs, "return_tensors": None})

    def replace_video_token(self, video_inputs: Mapping[str, Any], video_idx: int, **_: Any) -> str:
        """Return the placeholders of one video."""
        frames = len(video_inputs["pixel_values_videos"][video_idx])
        tokens: str = self.video_token * video_tokens(
            frames, self.frame_grid, self.newline_position
        )
        return tokens

    def _with_times(self, text: str | Sequence[str], metadata: Any) -> list[str]:
        prompts = [text] if isinstance(text, str) else list(text)
        count = sum(prompt.count(self.video_token) for prompt in prompts)
        clips = _flatten(metadata)
        if len(clips) != count:
            raise PromptError(
                f"time_instruction needs one entry of video_metadata for each of the {count} "
                f"videos, got {len(clips)}. Pass video_metadata, or leave the instruction out."
            )
        remaining = iter(clips)
        timed = []
        for prompt in prompts:
            first, *rest = prompt.split(self.video_token)
            for part in rest:
                line_break = "" if part.startswith("\n") else "\n"
                instruction = time_instruction(next(remaining))
                first += f"{self.video_token}\n{instruction}{line_break}{part}"
            timed.append(first)
        return timed


def time_instruction(metadata: Mapping[str, Any]) -> str:
    """Tell how long a video lasts and when its sampled frames were taken.

    The wording is the one LLaVA-Video was trained and published with (missing space included): to
    the model, other words are another task.

    Parameters
    ----------
    metadata : ``fps`` and ``total_num_frames`` of the video file, and ``frames_indices``, the
        sampled frames; transformers' `VideoMetadata` or a mapping.

    Raises
    ------
    PromptError
        One of the three is missing.
    """
    fps, total, indices = (
        metadata.get(key) for key in ("fps", "total_num_frames", "frames_indices")
    )
    if not fps or total is None or indices is None:
        raise PromptError(
            "time_instruction needs fps, total_num_frames and frames_indices in video_metadata, "
            f"got {dict(metadata)}."
        )
    times = ",".join(f"{index / fps:.2f}s" for index in indices)
    return (
        f"The video lasts for {total / fps:.2f} seconds, and {len(indices)} frames are uniformly "
        f"sampled from it. These frames are located at {times}.Please answer the following "
        "questions related to this video."
    )


def build_processor(
    tokenizer: Any, config: LlavaVideoConfig, *, time_instruction: bool = False
) -> LlavaVideoProcessor:
    """Build the processor of a model from its tokenizer.

    Parameters
    ----------
    tokenizer : ``<image>`` and ``<video>`` are added to it where it lacks them.
    config : pictures get the size of its tower, prompts the number of tokens of its frames. SigLIP
        pictures are resized without cropping, by bicubic interpolation, to values in [-1, 1].
    """
    add_placeholders(tokenizer)
    size = config.vision_config.image_size
    pictures = {
        "size": {"height": size, "width": size},
        "image_mean": _SIGLIP_MEAN_STD,
        "image_std": _SIGLIP_MEAN_STD,
    }
    return LlavaVideoProcessor(
        image_processor=LlavaOnevisionImageProcessor(
            image_grid_pinpoints=config.image_grid_pinpoints, **pictures
        ),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(**pictures),
        num_image_tokens=(size // config.vision_config.patch_size) ** 2,
        vision_aspect_ratio=config.vision_aspect_ratio,
        spatial_pool_mode=config.spatial_pool_mode,
        spatial_pool_stride=config.spatial_pool_stride,
        newline_position=config.newline_position,
        time_instruction=time_instruction,
    )


def add_placeholders(tokenizer: Any) -> tuple[int, int]:
    """Add ``<image>`` and ``<video>`` to a tokenizer that lacks them, and return their ids."""
    tokens = [AddedToken(token, special=True, normalized=False) for token in ("<image>", "<video>")]
    tokenizer.add_tokens(tokens, special_tokens=True)
    image, video = tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
    return image, video


def _flatten(metadata: Any) -> list[Mapping[str, Any]]:
    if metadata is None:
        return []
    if isinstance(metadata, Mapping):
        return [metadata]
    return [entry for item in metadata for entry in _flatten(item)]


AutoProcessor.register(LlavaVideoConfig, LlavaVideoProcessor, exist_ok=True)
