"""Qwen3-VL as the engine sees it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.architecture import Architecture, Pixels, Request
from ..core.decoder import LayerStates, device_of, layer_states, reference_states
from ..core.layout import Clip, Prompt
from .deepstack import reading_wide_rows, split, widen
from .encode import encode_pixels, layout_prompt, read_requests
from .loading import check_fit, load_model, load_processor, load_selector
from .positions import compact_positions, whole_positions
from .prepare import expand_prompt, picture_size, prepare_pixels, sample_pictures
from .selector import Qwen3VLSelector


class Qwen3VL(Architecture):
    """Stock ``Qwen3VLForConditionalGeneration``; see ``UPSTREAM.md`` beside this file."""

    family = "qwen3_vl"
    vision_inputs = (
        "pixel_values",
        "pixel_values_videos",
        "image_grid_thw",
        "video_grid_thw",
        "mm_token_type_ids",
    )
    pictures_per_frame = 2
    stamps_frames = True
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
        return whole_positions(prompt)

    def compact_positions(self, prompt: Prompt, rows: Tensor) -> Tensor:
        """Positions of the tokens ``rows`` with the frames that keep none taken out."""
        return compact_positions(prompt, rows)

    @property
    def decoder(self) -> Any:
        """The text model."""
        return self.model.model.language_model

    def embed(self, ids: Tensor) -> Tensor:
        """Embed text ids ``(tokens,)``, as wide rows; see `deepstack`."""
        table = self.decoder.embed_tokens
        return widen(table(ids.to(device_of(table))), self._levels)

    def reading(self, inputs: Mapping[str, Tensor]) -> AbstractContextManager[dict[str, Tensor]]:
        """Let the model read wide rows while this is open."""
        return reading_wide_rows(self.decoder, inputs)

    def states(
        self, embeds: Tensor, positions: Tensor, layer: int, query_rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Query and key states of the reference layer."""
        first, added = split(embeds, self.decoder.config.hidden_size)
        return reference_states(self.decoder, first, positions, layer, query_rows, added)

    def layer_states(
        self, embeds: Tensor, positions: Tensor, layers: Collection[int], query_rows: Tensor
    ) -> Iterator[LayerStates]:
        """States of several layers on one walk."""
        first, added = split(embeds, self.decoder.config.hidden_size)
        return layer_states(self.decoder, first, positions, layers, query_rows, added)

    @property
    def _levels(self) -> int:
        return len(self.model.config.vision_config.deepstack_visual_indexes)

    @classmethod
    def load_model(
        cls,
        folder: Path,
        dtype: torch.dtype | None,
        device_map: Any,
        attn_implementation: str | None,
    ) -> Any:
        """Load a checkpoint, which transformers reads as it is stored."""
        return load_model(folder, dtype, device_map, attn_implementation)

    @classmethod
    def load_processor(cls, folder: Path) -> Any:
        """Load the stock processor."""
        return load_processor(folder)

    def load_selector(self, path: str) -> Qwen3VLSelector:
        """Load a Lite selector of ours; none is published."""
        return load_selector(path, self.model)

    def check_selector(self, selector: Any) -> None:
        """Check family and size of a Lite selector."""
        super().check_selector(selector)
        check_fit(selector, self.model)

    def sample(self, count: int, fps: float, sampling: Mapping[str, Any]) -> Tensor:
        """Choose pictures by the policy of the stock video processor."""
        return sample_pictures(count, fps, sampling)

    def picture_size(
        self, height: int, width: int, pictures: int, limits: Mapping[str, Any]
    ) -> tuple[int, int]:
        """Choose the size of pictures by the policy of the stock video processor."""
        vision = self.model.config.vision_config
        factor = vision.patch_size * vision.spatial_merge_size
        return picture_size(height, width, pictures, factor, limits)

    def pixels(self, processor: Any, pictures: Tensor, seconds_per_picture: float) -> Pixels:
        """Prepare decoded pictures for the tower."""
        return prepare_pixels(processor, pictures, seconds_per_picture)

    def expand(self, processor: Any, text: str, videos: Sequence[Clip]) -> Tensor:
        """Tokenise a templated prompt with expanded videos."""
        return expand_prompt(processor, text, videos)
