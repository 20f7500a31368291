"""Qwen2.5-VL as the engine sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.architecture import Architecture, Pixels, Request
from ..core.budget import round_up
from ..core.decoder import device_of, reference_states
from ..core.layout import Clip, Prompt
from .encode import encode_pixels, layout_prompt, read_requests
from .loading import check_fit, load_model, load_processor, load_selector
from .positions import compact_positions, whole_positions
from .prepare import expand_prompt, picture_size, prepare_pixels, sample_pictures
from .selector import Qwen2_5_VLSelector


class Qwen2_5_VL(Architecture):
    """Stock ``Qwen2_5_VLForConditionalGeneration``; see ``UPSTREAM.md`` beside this file."""

    family = "qwen2_5_vl"
    vision_inputs = (
        "pixel_values",
        "pixel_values_videos",
        "image_grid_thw",
        "video_grid_thw",
        "second_per_grid_ts",
        "mm_token_type_ids",
    )
    pictures_per_frame = 2
    sampling_options = (*Architecture.sampling_options, "min_pixels", "max_pixels")

    def has_video(self, inputs: Mapping[str, Any]) -> bool:
        """Whether the batch shows a video."""
        return inputs.get("pixel_values_videos") is not None

    def read(self, inputs: Mapping[str, Any]) -> list[Request]:
        """Lay out a processor's batch."""
        return read_requests(inputs, self.model.config)

    def layout(self, ids: Tensor, videos: Sequence[Clip], images: Sequence[Clip]) -> Prompt:
        """Lay out expanded token ids."""
        return layout_prompt(ids, videos, images, self.model.config)

    def encode(self, pixels: Pixels, selector: Any | None) -> tuple[Tensor, Tensor | None]:
        """Run the tower over a few frames, once for model and selector."""
        return encode_pixels(self.model, pixels, selector)

    def positions(self, prompt: Prompt) -> Tensor:
        """Positions of a whole prompt: int64 ``(3, tokens)``."""
        return whole_positions(prompt, self.model.config.vision_config.tokens_per_second)

    def compact_positions(self, prompt: Prompt, rows: Tensor) -> Tensor:
        """Positions of the tokens ``rows`` with the frames that keep none taken out."""
        return compact_positions(prompt, rows, self.model.config.vision_config.tokens_per_second)

    @property
    def decoder(self) -> Any:
        """The text model."""
        return self.model.model.language_model

    def embed(self, ids: Tensor) -> Tensor:
        """Embed text ids ``(tokens,)``."""
        table = self.decoder.embed_tokens
        return table(ids.to(device_of(table)))

    def states(
        self, embeds: Tensor, positions: Tensor, layer: int, query_rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Query and key states of the reference layer."""
        return reference_states(self.decoder, embeds, positions, layer, query_rows)

    def effective_budget(self, budget: int, prompt: Prompt) -> int:
        """Round the budget up to whole frames of the first video, as the reference does (Q3)."""
        clip = prompt.videos[0]
        return round_up(budget, clip.rows * clip.columns)

    @classmethod
    def load_model(
        cls,
        folder: Path,
        dtype: torch.dtype | None,
        device_map: Any,
        attn_implementation: str | None,
    ) -> Any:
        """Load a checkpoint; stock transformers reads the released layout and its own."""
        return load_model(folder, dtype, device_map, attn_implementation)

    @classmethod
    def load_processor(cls, folder: Path) -> Any:
        """Load the stock processor."""
        return load_processor(folder)

    def load_selector(self, path: str) -> Qwen2_5_VLSelector:
        """Load a Lite selector, ours or published."""
        return load_selector(path, self.model)

    def check_selector(self, selector: Any) -> None:
        """Check family and size of a Lite selector."""
        super().check_selector(selector)
        check_fit(selector, self.model)

    def sample(self, count: int, fps: float, sampling: Mapping[str, Any]) -> Tensor:
        """Choose pictures by the policy of qwen-vl-utils."""
        return sample_pictures(count, fps, sampling)

    def picture_size(
        self, height: int, width: int, pictures: int, limits: Mapping[str, Any]
    ) -> tuple[int, int]:
        """Choose the size of pictures by the policy of qwen-vl-utils."""
        vision = self.model.config.vision_config
        factor = vision.patch_size * vision.spatial_merge_size
        return picture_size(height, width, pictures, factor, limits)

    def pixels(self, processor: Any, pictures: Tensor, seconds_per_picture: float) -> Pixels:
        """Prepare decoded pictures for the tower."""
        return prepare_pixels(processor, pictures, seconds_per_picture)

    def expand(self, processor: Any, text: str, videos: Sequence[Clip]) -> Tensor:
        """Tokenise a templated prompt with expanded videos."""
        return expand_prompt(processor, text, videos)
