"""Qwen2.5-VL: what a new Lite selector starts from, and how the tower's states reach it."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor

from ..core.architecture import Pixels
from ..core.errors import UnsupportedModelError
from ..core.loading import TEXT_FIELDS, copy_weights
from .encode import encode_pixels
from .selector import Qwen2_5_VLSelector, Qwen2_5_VLSelectorConfig

#: Parts that the reference does not train: its projector stays as it was cut (fixtures, T5).
FROZEN: tuple[str, ...] = ("projector",)

#: The rope that the reference's training forces onto its base model (fixtures, Q8).
_YARN = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0}
#: Shares of half a head's width that time, height and width get, in eighths.
_SECTIONS = (2, 3, 3)


def new_selector(
    model: Any, text: Any, sibling: Any | None, own_tokens: bool, **record: Any
) -> Qwen2_5_VLSelector:
    """Build a selector for ``model`` from a small text model.

    With a sibling, its merger is the projector and its rope stays. Without one the projector is the
    model's own merger cut to as many outputs as the text model is wide, and the rope is yarn by 4
    with the sections of the released models, as in the reference.

    Parameters
    ----------
    model : the model it will serve.
    text : a Qwen2-style text model whose weights are copied.
    sibling : the model of this family that ``text`` belongs to, if any.
    own_tokens : whether ``text`` reads other tokens than the model.
    record : ``aggregation``, ``base_model``, ``teacher_model``, ``teacher_layer``.

    Raises
    ------
    UnsupportedModelError
        ``text`` is of another kind, reads other tokens, or does not fit the model.
    """
    config = text.config
    if config.model_type not in ("qwen2", "qwen2_5_vl_text"):
        raise UnsupportedModelError(
            f"A Lite selector for Qwen2.5-VL starts from a Qwen2 text model, not from one of type "
            f"{config.model_type!r}."
        )
    if own_tokens:
        raise UnsupportedModelError(
            "A Lite selector for Qwen2.5-VL reads the model's own tokens, but the student's "
            "tokenizer differs. Take a Qwen2 or Qwen2.5 model."
        )
    vision = model.config.vision_config
    fields = {name: getattr(config, name) for name in TEXT_FIELDS if hasattr(config, name)}
    with init_empty_weights():
        selector = Qwen2_5_VLSelector(
            Qwen2_5_VLSelectorConfig(
                text_config={**fields, "rope_parameters": _rope(config, sibling)},
                vision_hidden_size=vision.hidden_size,
                spatial_merge_size=vision.spatial_merge_size,
                tokens_per_second=vision.tokens_per_second,
                **record,
            )
        )
    copy_weights(selector.language_model, text.state_dict(), "the student's text model")
    merger = (model if sibling is None else sibling).model.visual.merger.state_dict()
    if sibling is None:
        width = selector.hidden_size
        merger = {
            name: value[:width] if name.startswith("mlp.2.") else value
            for name, value in merger.items()
        }
    copy_weights(selector.projector, merger, "the student's projector")
    return selector


def encode_states(model: Any, pixels: Pixels) -> tuple[Tensor, Tensor]:
    """Run the tower: features for the model, and the states that projectors read.

    Returns
    -------
    ``(feature tokens, hidden)`` and ``(feature tokens, merge ** 2 * tower hidden)``, in prompt
    order.
    """
    vision = model.config.vision_config
    raw = _Unprojected(vision.spatial_merge_size**2, vision.hidden_size, model.model.visual.dtype)
    features, states = encode_pixels(model, pixels, raw)
    assert states is not None
    return features, states


def project_states(model: Any, selector: Qwen2_5_VLSelector, states: Tensor) -> Tensor:
    """Project states of `encode_states` to the selector's features ``(feature tokens, hidden)``."""
    return selector.project(states.reshape(-1, selector.config.vision_hidden_size))


class _Unprojected:
    """Stands in for a selector where the states before its projector are wanted."""

    def __init__(self, merged: int, width: int, dtype: torch.dtype) -> None:
        self.hidden_size = merged * width
        self.dtype = dtype

    def project(self, states: Tensor) -> Tensor:
        """Lay the states that are merged into one token side by side."""
        return states.reshape(-1, self.hidden_size)


def _rope(config: Any, sibling: Any | None) -> dict[str, Any]:
    """Rope of the selector's text model."""
    rope = dict(config.rope_parameters)
    if sibling is not None:
        return rope
    heads = config.num_attention_heads
    half = (getattr(config, "head_dim", None) or config.hidden_size // heads) // 2
    if half % sum(_SECTIONS):
        raise UnsupportedModelError(
            f"The student's heads are {2 * half} wide; time, height and width share half of that "
            f"2 : 3 : 3, so it must be a multiple of {2 * sum(_SECTIONS)}."
        )
    return {
        **_YARN,
        "rope_theta": rope["rope_theta"],
        "original_max_position_embeddings": config.max_position_embeddings,
        "mrope_section": [part * half // sum(_SECTIONS) for part in _SECTIONS],
    }
