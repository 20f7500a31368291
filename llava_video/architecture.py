"""LLaVA-Video as the engine sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.architecture import Architecture, Pixels, Request
from ..core.decoder import reference_states, weight_of
from ..core.layout import Clip, Grid, Prompt
from .convert import convert_checkpoint
from .encode import encode_pixels, frame_grid, layout_prompt, read_requests
from .loading import (
    check_fit,
    load_model,
    load_processor,
    load_selector,
    published_pooling,
)
from .positions import compact_positions, whole_positions
from .prepare import expand_prompt, prepare_pixels
from .selector import LlavaVideoSelector, embed_with_newline


class LlavaVideo(Architecture):
    """``LlavaVideoForConditionalGeneration``; see ``UPSTREAM.md`` beside this file."""

    family = "llava_video"
    vision_inputs = (
        "pixel_values",
        "pixel_values_videos",
        "image_sizes",
        "image_sizes_videos",
        "batch_num_images",
        "mm_token_type_ids",
    )

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
        """Positions of a whole prompt: int64 ``(tokens,)``."""
        return whole_positions(prompt)

    def compact_positions(self, prompt: Prompt, rows: Tensor) -> Tensor:
        """Positions of the tokens ``rows``, counted without gaps."""
        return compact_positions(prompt, rows)

    @property
    def decoder(self) -> Any:
        """The text model."""
        return self.model.model.language_model

    def embed(self, ids: Tensor) -> Tensor:
        """Embed text ids ``(tokens,)``."""
        core = self.model.model
        newline = weight_of(core, "image_newline")
        return embed_with_newline(
            ids, self.decoder.embed_tokens, newline, core.config.video_token_id
        )

    def states(
        self, embeds: Tensor, positions: Tensor, layer: int, query_rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Query and key states of the reference layer."""
        return reference_states(self.decoder, embeds, positions, layer, query_rows)

    def grid(self, clip: Clip) -> Grid:
        """Return the cell of each visual token of a frame; newlines show nothing."""
        return frame_grid(clip, self.model.config)

    @classmethod
    def load_model(
        cls,
        folder: Path,
        dtype: torch.dtype | None,
        device_map: Any,
        attn_implementation: str | None,
    ) -> Any:
        """Load a checkpoint, converted or in the original layout."""
        return load_model(folder, dtype, device_map, attn_implementation)

    @classmethod
    def load_processor(cls, folder: Path) -> Any:
        """Load the processor, or build it for a checkpoint in the original layout."""
        return load_processor(folder)

    @classmethod
    def convert_checkpoint(
        cls,
        source: Path,
        destination: Path,
        *,
        dtype: torch.dtype | None = None,
        overwrite: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Path:
        """Write a checkpoint in the original layout as one that transformers loads."""
        return convert_checkpoint(
            source,
            destination,
            dtype=dtype,
            overwrite=overwrite,
            spatial_pool_mode=published_pooling(source),
            progress=progress,
        )

    def load_selector(self, path: str) -> LlavaVideoSelector:
        """Load a Lite selector, ours or published."""
        return load_selector(path, self.model)

    def check_selector(self, selector: Any) -> None:
        """Check family and size of a Lite selector."""
        super().check_selector(selector)
        check_fit(selector, self.model)

    def picture_size(
        self, height: int, width: int, pictures: int, limits: Mapping[str, Any]
    ) -> tuple[int, int]:
        """Return the one size the tower takes."""
        side = self.model.config.vision_config.image_size
        return side, side

    def pixels(self, processor: Any, pictures: Tensor, seconds_per_picture: float) -> Pixels:
        """Prepare decoded pictures for the tower."""
        return prepare_pixels(processor, pictures, seconds_per_picture, self.model.config)

    def expand(self, processor: Any, text: str, videos: Sequence[Clip]) -> Tensor:
        """Tokenise a templated prompt with expanded videos."""
        return expand_prompt(processor, text, videos)
