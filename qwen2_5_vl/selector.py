"""Qwen2.5-VL's Lite selector: a small text model with its own patch merger."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLPatchMerger,
    Qwen2_5_VLTextModel,
)

from ..core.decoder import LayerStates, device_of, layer_states, reference_states
from ..core.layout import Prompt
from .positions import whole_positions


class Qwen2_5_VLSelectorConfig(PreTrainedConfig):
    """What a selector is and how it was trained.

    Parameters
    ----------
    text_config : the small text model; rope included (the published selector uses yarn).
    vision_hidden_size, spatial_merge_size : what its projector reads from the tower.
    tokens_per_second : speed of the time axis, as in the model it serves.
    aggregation : ``"max"`` or ``"mean"``, the relevance it reproduces.
    base_model : the language model it started from.
    teacher_model, teacher_layer : whose ranking it learned; None where not recorded.
    """

    model_type = "flexselect_qwen2_5_vl"
    sub_configs: ClassVar[dict[str, type]] = {"text_config": Qwen2_5_VLTextConfig}

    def __init__(
        self,
        text_config: dict[str, Any] | Qwen2_5_VLTextConfig | None = None,
        vision_hidden_size: int = 1280,
        spatial_merge_size: int = 2,
        tokens_per_second: float = 2,
        aggregation: str = "max",
        base_model: str | None = None,
        teacher_model: str | None = None,
        teacher_layer: int | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(text_config, Qwen2_5_VLTextConfig):
            text_config = Qwen2_5_VLTextConfig(**(text_config or {}))
        self.text_config: Qwen2_5_VLTextConfig = text_config
        self.vision_hidden_size = vision_hidden_size
        self.spatial_merge_size = spatial_merge_size
        self.tokens_per_second = tokens_per_second
        self.aggregation = aggregation
        self.base_model = base_model
        self.teacher_model = teacher_model
        self.teacher_layer = teacher_layer
        super().__init__(**kwargs)


class Qwen2_5_VLSelector(PreTrainedModel):
    """Ranks visual tokens from the tower's states before the main model's merger.

    Only the last layer's norm, query and key projections are used of that layer; the text model is
    kept whole so that any checkpoint of its kind loads (fixtures, C1).
    """

    config_class = Qwen2_5_VLSelectorConfig
    config: Qwen2_5_VLSelectorConfig
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules: ClassVar[list[str]] = ["Qwen2_5_VLDecoderLayer"]

    def __init__(self, config: Qwen2_5_VLSelectorConfig) -> None:
        super().__init__(config)
        self.language_model = Qwen2_5_VLTextModel._from_config(config.text_config)
        self.projector = Qwen2_5_VLPatchMerger(
            dim=config.text_config.hidden_size,
            context_dim=config.vision_hidden_size,
            spatial_merge_size=config.spatial_merge_size,
        )
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

    def project(self, states: Tensor) -> Tensor:
        """Merge tower states ``(patches, vision_hidden)`` to ``(patches / merge ** 2, hidden)``."""
        weight = self.projector.ln_q.weight
        return self.projector(states.to(weight.device, weight.dtype))

    def embed(self, ids: Tensor) -> Tensor:
        """Embed text ids ``(tokens,)`` with the selector's own table."""
        table = self.language_model.embed_tokens
        return table(ids.to(device_of(table)))

    def positions(self, prompt: Prompt) -> Tensor:
        """Positions of a whole prompt: int64 ``(3, tokens)``."""
        return whole_positions(prompt, self.config.tokens_per_second)

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
