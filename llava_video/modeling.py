"""LLaVA-Video as the smallest subclass of transformers' LLaVA-OneVision.

Stock transformers has the parts but not the packing: LLaVA-OneVision ends a whole video with one
newline embedding, LLaVA-Video ends every row of every frame with one. Importing this module
registers the classes with the Auto classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionModel,
    LlavaOnevisionPreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..core.decoder import device_of, weight_of
from ..core.errors import OptionError, PromptError

PoolMode = Literal["bilinear", "average", "max"]
NewlinePosition = Literal["grid", "frame", "one_token", "no_token"]

#: Pictures that pass through the vision tower at once when whole videos are encoded.
PICTURES_PER_CHUNK = 32


class LlavaVideoConfig(LlavaOnevisionConfig):
    """LLaVA-OneVision's configuration, and how the frames of a video are packed.

    Parameters
    ----------
    spatial_pool_mode : how a frame's patches are pooled: ``bilinear`` (27 × 27 to 14 × 14),
        ``average`` or ``max`` (to 13 × 13).
    spatial_pool_stride : patches to a pooled token, along each axis.
    newline_position : where the newline embedding goes: after every row (``grid``), after every
        frame (``frame``), once after the video (``one_token``, as LLaVA-OneVision), or nowhere
        (``no_token``).

    Raises
    ------
    OptionError
        A field has a value that no LLaVA-Video model has.
    """

    model_type = "llava_video"

    spatial_pool_mode: str = "bilinear"
    spatial_pool_stride: int = 2
    newline_position: str = "grid"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        frame_grid(1, self.spatial_pool_mode, self.spatial_pool_stride, self.newline_position)
        if self.vision_feature_layer != -1 or self.vision_feature_select_strategy != "full":
            raise OptionError(
                "LLaVA-Video reads every patch of the last layer its tower has: expected "
                "vision_feature_layer -1 and vision_feature_select_strategy 'full', got "
                f"{self.vision_feature_layer} and {self.vision_feature_select_strategy!r}."
            )

    @property
    def frame_grid(self) -> tuple[int, int]:
        """Visual tokens of a frame as rows and columns, newlines included: 14 × 15."""
        return frame_grid(
            self.vision_config.image_size // self.vision_config.patch_size,
            self.spatial_pool_mode,
            self.spatial_pool_stride,
            self.newline_position,
        )


class LlavaVideoModel(LlavaOnevisionModel):
    """LLaVA-OneVision's model with LLaVA-Video's frames."""

    config_class = LlavaVideoConfig

    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """Run the vision tower: ``(frames, 3, height, width)`` to patch features.

        Parameters
        ----------
        pictures : as the processor makes them, on any device and of any float dtype.

        Returns
        -------
        ``(frames, patches, tower hidden)`` on the tower's device: what the last layer puts out,
        without the layer norm that follows it.
        """
        tower = self.vision_tower
        embeds = tower.embeddings(pictures.to(device_of(tower), tower.dtype))
        return tower.encoder(inputs_embeds=embeds).last_hidden_state

    def frame_features(self, patches: Tensor) -> Tensor:
        """Turn patch features into the visual tokens of each frame, with the model's own parts.

        ``(frames, patches, tower hidden)`` to ``(frames, tokens, hidden)``; see `frame_features`.
        """
        newline = weight_of(self, "image_newline")
        return frame_features(patches, self.multi_modal_projector, newline, self.config)

    def get_video_features(
        self, pixel_values_videos: Tensor | Sequence[Tensor], **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Encode whole videos for the language model.

        Parameters
        ----------
        pixel_values_videos : ``(videos, frames, 3, height, width)``, or one
            ``(frames, 3, height, width)`` a video where they differ in length.

        Returns
        -------
        ``pooler_output`` holds the visual tokens of every video: ``(videos, tokens, hidden)``, or
        one ``(tokens, hidden)`` a video where they differ in length.

        Raises
        ------
        PromptError
            The tensor has another number of axes.
        """
        newline = weight_of(self, "image_newline")
        videos = []
        for pictures in pixel_values_videos:
            if pictures.ndim != 4:
                raise PromptError(
                    "pixel_values_videos must be (videos, frames, 3, height, width); each video "
                    f"has the shape {tuple(pictures.shape)}."
                )
            frames = [
                self.frame_features(self.encode_pictures(chunk))
                for chunk in pictures.split(PICTURES_PER_CHUNK)
            ]
            videos.append(join_frames(torch.cat(frames), newline, self.config.newline_position))
        # Stock transformers, too, puts a list here where the tokens of inputs differ in number.
        pooled: Any = videos
        if len({len(video) for video in videos}) == 1:
            pooled = torch.stack(videos)
        return BaseModelOutputWithPooling(pooler_output=pooled)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values_videos: Tensor | Sequence[Tensor] | None = None,
        inputs_embeds: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Put the visual tokens of videos in place and leave everything else to the stock class.

        transformers 5.17 appends its own newline to what `get_video_features` returns, later
        releases do not; so the stock class never sees the video.
        """
        encoded = dict(mm_encoder_outputs or {})
        video = encoded.pop("video", None)
        if encoded:
            kwargs["mm_encoder_outputs"] = encoded
        if pixel_values_videos is not None:
            if video is not None:
                raise PromptError("Pass pixel_values_videos or an encoded video, not both.")
            video = self.get_video_features(pixel_values_videos)
        if video is None:
            return super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        features = torch.cat(list(video.pooler_output)).to(inputs_embeds)
        _, placeholders = self.get_placeholder_mask(
            input_ids, inputs_embeds=inputs_embeds, video_features=features
        )
        outputs = super().forward(
            inputs_embeds=inputs_embeds.masked_scatter(placeholders, features), **kwargs
        )
        if not isinstance(outputs, tuple):
            outputs.video_hidden_states = features
        return outputs


class LlavaVideoForConditionalGeneration(LlavaOnevisionForConditionalGeneration):
    """LLaVA-Video with its language-model head."""

    config_class = LlavaVideoConfig

    def __init__(self, config: LlavaVideoConfig) -> None:
        # The parent's own __init__ would build, and throw away, the stock model.
        LlavaOnevisionPreTrainedModel.__init__(self, config)
        self.model = LlavaVideoModel(config)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def get_video_features(
        self, pixel_values_videos: Tensor | Sequence[Tensor], **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """See `LlavaVideoModel.get_video_features`."""
        return self.model.get_video_features(pixel_values_videos, **kwargs)


def frame_features(
    patches: Tensor, projector: nn.Module, newline: Tensor, config: LlavaVideoConfig
) -> Tensor:
    """Project and pool patch features, and add the newlines that belong to a frame.

    Pooling follows the projection (fixtures, L3), so the model and a Lite selector share the patch
    features and nothing after them.

    Parameters
    ----------
    patches : ``(frames, patches, tower hidden)``.
    projector : tower hidden to hidden, of the model or of a Lite selector.
    newline : ``(hidden,)``.
    config : how frames are pooled and packed.

    Returns
    -------
    ``(frames, tokens, hidden)``, on the projector's device and of its dtype: 210 tokens for
    LLaVA-Video-7B.
    """
    like = next(projector.parameters())
    projected = projector(patches.to(device_of(projector), like.dtype))
    pooled = pool_patches(projected, config.spatial_pool_mode, config.spatial_pool_stride)
    return add_newlines(pooled, newline, config.newline_position)


def pool_patches(features: Tensor, mode: str, stride: int) -> Tensor:
    """Pool the square of patches of each frame: ``(frames, patches, hidden)`` to a smaller square.

    ``bilinear`` interpolates to ceil(side / stride) without aligning corners, in the working dtype;
    ``average`` and ``max`` pool whole windows only, floor(side / stride) of them (fixtures, L1).

    Returns
    -------
    ``(frames, rows, columns, hidden)``
    """
    side = math.isqrt(features.shape[1])
    maps = features.unflatten(1, (side, side)).permute(0, 3, 1, 2).contiguous()
    if mode == "bilinear":
        maps = functional.interpolate(maps, size=(math.ceil(side / stride),) * 2, mode="bilinear")
    elif mode == "average":
        maps = functional.avg_pool2d(maps, stride)
    elif mode == "max":
        maps = functional.max_pool2d(maps, stride)
    else:
        raise OptionError(_unknown("spatial_pool_mode", mode, PoolMode))
    return maps.permute(0, 2, 3, 1)


def add_newlines(frames: Tensor, newline: Tensor, position: str) -> Tensor:
    """Flatten pooled frames, with the newline embedding where each frame has it.

    Parameters
    ----------
    frames : ``(frames, rows, columns, hidden)``.
    newline : ``(hidden,)``.
    position : see `LlavaVideoConfig`.

    Returns
    -------
    ``(frames, tokens, hidden)``
    """
    newline = newline.to(frames)
    if position == "grid":
        column = newline.expand(*frames.shape[:2], 1, -1)
        return torch.cat((frames, column), dim=2).flatten(1, 2)
    tokens = frames.flatten(1, 2)
    if position == "frame":
        return torch.cat((tokens, newline.expand(len(tokens), 1, -1)), dim=1)
    return tokens


def join_frames(frames: Tensor, newline: Tensor, position: str) -> Tensor:
    """Join the frames of one video: ``(frames, tokens, hidden)`` to ``(tokens, hidden)``.

    Adds the one newline that ends the video where ``position`` is ``one_token``.
    """
    tokens = frames.flatten(0, 1)
    if position == "one_token":
        tokens = torch.cat((tokens, newline.to(tokens)[None]))
    return tokens


def frame_grid(side: int, mode: str, stride: int, position: str) -> tuple[int, int]:
    """Visual tokens of a frame as rows and columns, newlines included.

    Parameters
    ----------
    side : patches along each side of a picture.
    mode, stride, position : see `LlavaVideoConfig`.

    Raises
    ------
    OptionError
        A value is unknown or out of range.
    """
    if mode not in get_args(PoolMode):
        raise OptionError(_unknown("spatial_pool_mode", mode, PoolMode))
    if position not in get_args(NewlinePosition):
        raise OptionError(_unknown("newline_position", position, NewlinePosition))
    if stride < 1:
        raise OptionError(f"spatial_pool_stride must be at least 1, got {stride}.")
    pooled = math.ceil(side / stride) if mode == "bilinear" else side // stride
    if position == "grid":
        return pooled, pooled + 1
    if position == "frame":
        return 1, pooled * pooled + 1
    return pooled, pooled


def video_tokens(frames: int, grid: tuple[int, int], position: str) -> int:
    """Visual tokens of a video of ``frames`` frames, newlines included."""
    return frames * grid[0] * grid[1] + (position == "one_token")


def _unknown(field: str, value: str, known: Any) -> str:
    return f"{field} must be one of {', '.join(get_args(known))}, got {value!r}."


AutoConfig.register(LlavaVideoConfig.model_type, LlavaVideoConfig, exist_ok=True)
AutoModel.register(LlavaVideoConfig, LlavaVideoModel, exist_ok=True)
AutoModelForImageTextToText.register(
    LlavaVideoConfig, LlavaVideoForConditionalGeneration, exist_ok=True
)
AutoModelForMultimodalLM.register(
    LlavaVideoConfig, LlavaVideoForConditionalGeneration, exist_ok=True
)
