"""Qwen3-VL: what a new Lite selector starts from, and how the tower's states reach it."""

from __future__ import annotations

from typing import Any

from accelerate import init_empty_weights
from torch import Tensor

from ..core.architecture import Pixels
from ..core.errors import UnsupportedModelError
from ..core.loading import TEXT_FIELDS, copy_weights
from .encode import look
from .selector import Qwen3VLSelector, Qwen3VLSelectorConfig

#: Parts that are not trained: none, as there is no reference for this family.
FROZEN: tuple[str, ...] = ()

#: Shares of half a head's width that time, height and width get in the released models.
_SECTIONS = (24, 20, 20)


def new_selector(
    model: Any, text: Any, sibling: Any | None, own_tokens: bool, **record: Any
) -> Qwen3VLSelector:
    """Build a selector for ``model`` from a small text model.

    With a sibling, its merger is the projector and its rope stays. Without one the projector is the
    model's own merger cut to as many outputs as the text model is wide, and half of each head is
    shared by time, height and width as in the released models.

    Parameters
    ----------
    model : the model it will serve.
    text : a Qwen3-style text model whose weights are copied.
    sibling : the model of this family that ``text`` belongs to, if any.
    own_tokens : whether ``text`` reads other tokens than the model.
    record : ``aggregation``, ``base_model``, ``teacher_model``, ``teacher_layer``.

    Raises
    ------
    UnsupportedModelError
        ``text`` is of another kind, reads other tokens, or does not fit the model.
    """
    config = text.config
    if config.model_type not in ("qwen3", "qwen3_vl_text"):
        raise UnsupportedModelError(
            f"A Lite selector for Qwen3-VL starts from a Qwen3 text model, not from one of type "
            f"{config.model_type!r}."
        )
    if own_tokens:
        raise UnsupportedModelError(
            "A Lite selector for Qwen3-VL reads the model's own tokens, but the student's "
            "tokenizer differs. Take a Qwen3 or Qwen3-VL model."
        )
    vision = model.config.vision_config
    names = (*TEXT_FIELDS, "head_dim", "attention_bias")
    fields = {name: getattr(config, name) for name in names if hasattr(config, name)}
    with init_empty_weights():
        selector = Qwen3VLSelector(
            Qwen3VLSelectorConfig(
                text_config={**fields, "rope_parameters": _rope(config, sibling)},
                vision_hidden_size=vision.hidden_size,
                spatial_merge_size=vision.spatial_merge_size,
                **record,
            )
        )
    copy_weights(selector.language_model, text.state_dict(), "the student's text model")
    merger = (model if sibling is None else sibling).model.visual.merger.state_dict()
    if sibling is None:
        width = selector.hidden_size
        merger = {
            name: value[:width] if name.startswith("linear_fc2.") else value
            for name, value in merger.items()
        }
    copy_weights(selector.projector, merger, "the student's projector")
    return selector


def encode_states(model: Any, pixels: Pixels) -> tuple[Tensor, Tensor]:
    """Run the tower: features for the model, and the states that projectors read.

    Returns
    -------
    ``(feature tokens, (1 + levels) * hidden)`` and
    ``(feature tokens, merge ** 2 * tower hidden)``, in prompt order.
    """
    features, states = look(model, pixels)
    vision = model.config.vision_config
    return features, states.reshape(-1, vision.spatial_merge_size**2 * vision.hidden_size)


def project_states(model: Any, selector: Qwen3VLSelector, states: Tensor) -> Tensor:
    """Project states of `encode_states` to the selector's features ``(feature tokens, hidden)``."""
    return selector.project(states.reshape(-1, selector.config.vision_hidden_size))


def _rope(config: Any, sibling: Any | None) -> dict[str, Any]:
    """Rope of the selector's text model."""
    rope = dict(config.rope_parameters)
    if sibling is not None:
        return rope
    half = config.head_dim // 2
    if half * _SECTIONS[1] % sum(_SECTIONS):
        raise UnsupportedModelError(
            f"The student's heads are {config.head_dim} wide; time, height and width share half of "
            "that 6 : 5 : 5, so it must be a multiple of 32."
        )
    sections = [part * half // sum(_SECTIONS) for part in _SECTIONS]
    return {**rope, "mrope_section": sections, "mrope_interleaved": True}
