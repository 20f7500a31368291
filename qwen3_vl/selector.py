"""Qwen3-VL's Lite selector: a small text model with its own patch merger."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.qwen3_vl.configuration_qwen3_vl import (
    Qwen3VLTextConfig,
    Qwen3VLVisionConfig,
)
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    Qwen3VLTextModel,
    Qwen3VLVisionPatchMerger,
)

from ..core.decoder import LayerStates, device_of, layer_states, reference_states
from ..core.layout import Prompt
from .positions import whole_positions


class Qwen3VLSelectorConfig(PreTrainedConfig):
    """What a selector is and how it was trained.

    Parameters
    ----------
    text_config : the small text model; rope included.
    vision_hidden_size, spatial_merge_size : what its projector reads from the tower.
    aggregation : ``"max"`` or ``"mean"``, the relevance it reproduces.
    base_model : the language model it started from.
    teacher_model, teacher_layer : whose ranking it learned; None where not recorded.
    """

    model_type = "flexselect_qwen3_vl"
    sub_configs: ClassVar[dict[str, type]] = {"text_config": Qwen3VLTextConfig}

    def __init__(
        self,
        text_config: dict[str, Any] | Qwen3VLTextConfig | None = None,
        vision_hidden_size: int = 1152,
        spatial_merge_size: int = 2,
        aggregation: str = "max",
        base_model: str | None = None,
        teacher_model: str | None = None,
        teacher_layer: int | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(text_config, Qwen3VLTextConfig):
            text_config = Qwen3VLTextConfig(**(text_config or {}))
        self.text_config: Qwen3VLTextConfig = text_config
        self.vision_hidden_size = vision_hidden_size
        self.spatial_merge_size = spatial_merge_size
        self.aggregation = aggregation
        self.base_model = base_model
        self.teacher_model = teacher_model
        self.teacher_layer = teacher_layer
        super().__init__(**kwargs)


class Qwen3VLSelector(PreTrainedModel):
    """Ranks visual tokens from the tower's last states, before the main model's merger.

    It adds nothing of lower depths. Only the last layer's norm, query and key projections are used
    of that layer; the text model is kept whole so that any checkpoint of its kind loads.
    """

    config_class = Qwen3VLSelectorConfig
    config: Qwen3VLSelectorConfig
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules: ClassVar[list[str]] = ["Qwen3VLTextDecoderLayer"]

    def __init__(self, config: Qwen3VLSelectorConfig) -> None:
        super().__init__(config)
        self.language_model = Qwen3VLTextModel._from_config(config.text_config)
        self.projector = Qwen3VLVisionPatchMerger(
            Qwen3VLVisionConfig(
                hidden_size=config.vision_hidden_size,
                spatial_merge_size=config.spatial_merge_size,
                out_hidden_size=config.text_config.hidden_size,
            )
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
        weight = self.projector.norm.weight
        return self.projector(states.to(weight.device, weight.dtype))

    def embed(self, ids: Tensor) -> Tensor:
        """Embed text ids ``(tokens,)`` with the selector's own table."""
        table = self.language_model.embed_tokens
        return table(ids.to(device_of(table)))

    def positions(self, prompt: Prompt) -> Tensor:
        """Positions of a whole prompt: int64 ``(3, tokens)``."""
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
