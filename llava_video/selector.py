"""LLaVA-Video's Lite selector: a small text model with its own projector and newline."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, Qwen2Config, Qwen2Model

from ..core.decoder import LayerStates, device_of, layer_states, reference_states
from ..core.layout import Prompt
from .positions import whole_positions


class LlavaVideoSelectorConfig(PreTrainedConfig):
    """What a selector is and how it was trained.

    Parameters
    ----------
    text_config : the small text model.
    vision_hidden_size : what its projector reads from the tower.
    video_token_id : the placeholder in the prompts of the model it serves.
    aggregation : ``"max"`` or ``"mean"``, the relevance it reproduces.
    base_model : the language model it started from.
    teacher_model, teacher_layer : whose ranking it learned; None where not recorded.
    """

    model_type = "flexselect_llava_video"
    sub_configs: ClassVar[dict[str, type]] = {"text_config": Qwen2Config}

    def __init__(
        self,
        text_config: dict[str, Any] | Qwen2Config | None = None,
        vision_hidden_size: int = 1152,
        video_token_id: int = 151647,
        aggregation: str = "max",
        base_model: str | None = None,
        teacher_model: str | None = None,
        teacher_layer: int | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(text_config, Qwen2Config):
            text_config = Qwen2Config(**(text_config or {}))
        self.text_config: Qwen2Config = text_config
        self.vision_hidden_size = vision_hidden_size
        self.video_token_id = video_token_id
        self.aggregation = aggregation
        self.base_model = base_model
        self.teacher_model = teacher_model
        self.teacher_layer = teacher_layer
        super().__init__(**kwargs)


class LlavaVideoSelector(PreTrainedModel):
    """Ranks visual tokens from the tower's patch features.

    Only the last layer's norm, query and key projections are used of that layer; the text model is
    kept whole so that any checkpoint of its kind loads (fixtures, C1).
    """

    config_class = LlavaVideoSelectorConfig
    config: LlavaVideoSelectorConfig
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules: ClassVar[list[str]] = ["Qwen2DecoderLayer"]

    def __init__(self, config: LlavaVideoSelectorConfig) -> None:
        super().__init__(config)
        hidden = config.text_config.hidden_size
        self.language_model = Qwen2Model._from_config(config.text_config)
        self.projector = Projector(config.vision_hidden_size, hidden)
        self.image_newline = nn.Parameter(torch.empty(hidden).normal_(std=hidden**-0.5))
        self.post_init()

    @property
    def hidden_size(self) -> int:
        """Width of its embeddings."""
        return self.config.text_config.hidden_size

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.language_model.layers)

    @property
    def aggregation(self) -> str:
        """The aggregation it was trained to reproduce."""
        return self.config.aggregation

    def localise(self, prompt: Prompt) -> Prompt:
        """Return ``prompt``: the selector shares the model's tokens."""
        return prompt

    def embed(self, ids: Tensor) -> Tensor:
        """Embed text ids ``(tokens,)`` with the selector's own table and newline."""
        return embed_with_newline(
            ids, self.language_model.embed_tokens, self.image_newline, self.config.video_token_id
        )

    def positions(self, prompt: Prompt) -> Tensor:
        """Positions of a whole prompt: int64 ``(tokens,)``."""
        return whole_positions(prompt)

    def states(
        self, embeds: Tensor, positions: Tensor, layer: int, query_rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Query and key states of ``layer``; see `core.decoder.reference_states`."""
        return reference_states(self.language_model, embeds, positions, layer, query_rows)

    def layer_states(
        self, embeds: Tensor, positions: Tensor, layers: Collection[int], query_rows: Tensor
    ) -> Iterator[LayerStates]:
        """States of several layers on one walk; see `core.decoder.layer_states`."""
        return layer_states(self.language_model, embeds, positions, layers, query_rows)


class Projector(nn.Module):
    """Two linear layers from the tower's width to the text model's."""

    def __init__(self, vision_hidden_size: int, hidden_size: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision_hidden_size, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, patches: Tensor) -> Tensor:
        """Project ``(…, vision_hidden)`` to ``(…, hidden)``."""
        return self.linear_2(nn.functional.gelu(self.linear_1(patches)))


def embed_with_newline(
    ids: Tensor, table: nn.Module, newline: Tensor, video_token_id: int
) -> Tensor:
    """Embed text ids; a video placeholder among them is the newline that ends a video."""
    ids = ids.to(device_of(table))
    ends = ids == video_token_id
    embeds = table(ids.masked_fill(ends, 0))
    return torch.where(ends[:, None], newline.to(embeds), embeds)
