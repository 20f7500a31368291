"""InternVL's Lite selector: a small text model with its own projector, and often its own tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from ..core.decoder import LayerStates, device_of, layer_states, reference_states
from ..core.errors import CheckpointError
from ..core.layout import Layout, Prompt
from .positions import whole_positions

_TEXT_CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


class InternVLSelectorConfig(PreTrainedConfig):
    """What a selector is and how it was trained.

    Parameters
    ----------
    text_config : the small text model: ``qwen2``, ``qwen3``, or ``llama``, also for one that was an
        InternLM2.
    vision_hidden_size : width of the shuffled tower features that its projector reads.
    own_tokens : whether prompts must be put into the selector's own tokens.
    aggregation : ``"max"`` or ``"mean"``, the relevance it reproduces.
    base_model : the language model it started from.
    teacher_model, teacher_layer : whose ranking it learned; None where not recorded.
    """

    model_type = "flexselect_internvl"

    def __init__(
        self,
        text_config: dict[str, Any] | PreTrainedConfig | None = None,
        vision_hidden_size: int = 4096,
        own_tokens: bool = False,
        aggregation: str = "max",
        base_model: str | None = None,
        teacher_model: str | None = None,
        teacher_layer: int | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(text_config, PreTrainedConfig):
            fields = dict(text_config or {})
            text_config = _TEXT_CONFIGS[fields.pop("model_type", "qwen2")](**fields)
        self.text_config: PreTrainedConfig = text_config
        self.vision_hidden_size = vision_hidden_size
        self.own_tokens = own_tokens
        self.aggregation = aggregation
        self.base_model = base_model
        self.teacher_model = teacher_model
        self.teacher_layer = teacher_layer
        super().__init__(**kwargs)


class InternVLSelector(PreTrainedModel):
    """Ranks visual tokens from the tower's shuffled features.

    Only the last layer's norm, query and key projections are used of that layer; the text model is
    kept whole so that any checkpoint of its kind loads (fixtures, C1).

    Attributes
    ----------
    translate : puts a prompt into the selector's tokens, for one with ``own_tokens``.
    """

    config_class = InternVLSelectorConfig
    config: InternVLSelectorConfig
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules: ClassVar[list[str]] = [
        "LlamaDecoderLayer",
        "Qwen2DecoderLayer",
        "Qwen3DecoderLayer",
    ]

    def __init__(self, config: InternVLSelectorConfig) -> None:
        super().__init__(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.projector = Projector(config.vision_hidden_size, config.text_config.hidden_size)
        self.translate: Callable[[Prompt], Prompt] | None = None
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
        """Return ``prompt`` in the selector's own tokens, frame by frame and token by token.

        The reference finds the frames in the selector's tokens and cuts the model's prompt at the
        same places, off by the difference of the prefixes (fixtures, I3).
        """
        if self.translate is not None:
            return self.translate(prompt)
        if self.config.own_tokens:
            raise CheckpointError(
                f"The selector {self.name_or_path} reads its own tokens, but there is no tokenizer "
                "beside its weights, or none beside the model's. Add the files to both folders."
            )
        return prompt

    def project(self, features: Tensor) -> Tensor:
        """Project shuffled tower features ``(…, vision_hidden)`` to ``(…, hidden)``."""
        weight = self.projector.linear_1.weight
        return self.projector(features.to(weight.device, weight.dtype))

    def embed(self, ids: Tensor) -> Tensor:
        """Embed text ids ``(tokens,)`` with the selector's own table."""
        table = self.language_model.embed_tokens
        return table(ids.to(device_of(table)))

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
    """A layer norm and two linear layers from the tower's width to the text model's."""

    def __init__(self, vision_hidden_size: int, hidden_size: int) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(vision_hidden_size)
        self.linear_1 = nn.Linear(vision_hidden_size, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        """Project ``(…, vision_hidden)`` to ``(…, hidden)``."""
        return self.linear_2(nn.functional.gelu(self.linear_1(self.layer_norm(features))))


class Translator:
    """Puts a prompt into another tokenizer's tokens, stretch by stretch.

    Pictures keep their tokens one for one; the text between them is decoded and tokenised again,
    each stretch by itself, so that nothing can move a frame.

    Parameters
    ----------
    source, target : tokenizers that both know ``<img>``, ``</img>`` and ``<IMG_CONTEXT>``.
    """

    def __init__(self, source: Any, target: Any) -> None:
        self._source = source
        self._target = target

    def __call__(self, prompt: Prompt) -> Prompt:
        """Translate a prompt."""
        layout = prompt.layout
        rows = {f: getattr(layout, f) for f in ("video", "frame", "visual", "feature", "query")}
        marks = torch.stack([values.long() for values in rows.values()])
        starts = [0, *((marks.diff() != 0).any(0).nonzero()[:, 0] + 1).tolist(), len(layout)]
        parts: dict[str, list[Tensor]] = {name: [] for name in ("ids", *rows)}
        for start, stop in pairwise(starts):
            picture = bool(layout.visual[start] or layout.feature[start])
            ids = self._stretch(layout.ids[start:stop], picture, first=start == 0)
            parts["ids"].append(ids)
            for name, values in rows.items():
                parts[name].append(values[start].expand(len(ids)))
        taken = Layout(**{name: torch.cat(values) for name, values in parts.items()})
        return Prompt(taken, prompt.videos, prompt.images)

    def _stretch(self, ids: Tensor, picture: bool, first: bool) -> Tensor:
        if picture:
            tokens = self._source.convert_ids_to_tokens(ids.tolist())
            return torch.tensor(self._target.convert_tokens_to_ids(tokens))
        if first and ids[0] == self._source.bos_token_id:
            # The selector's conversations begin without the model's BOS (fixtures, I3).
            ids = ids[1:]
        text = self._source.decode(ids, clean_up_tokenization_spaces=False)
        again = self._target(text, add_special_tokens=False)["input_ids"]
        return torch.tensor(again, dtype=torch.long)
