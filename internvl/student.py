"""InternVL: what a new Lite selector starts from, and how the tower's states reach it."""

from __future__ import annotations

from typing import Any

from accelerate import init_empty_weights
from torch import Tensor

from ..core.architecture import Pixels
from ..core.errors import UnsupportedModelError
from ..core.loading import copy_weights
from .encode import encode_pixels
from .loading import translator
from .selector import InternVLSelector, InternVLSelectorConfig

__all__ = ["FROZEN", "encode_states", "new_selector", "project_states", "translator"]

#: Parts that are not trained. The reference's log of InternVL names none (inferred).
FROZEN: tuple[str, ...] = ()


def new_selector(
    model: Any, text: Any, sibling: Any | None, own_tokens: bool, **record: Any
) -> InternVLSelector:
    """Build a selector for ``model`` from a small text model.

    With a sibling, its projector comes along; without one the projector starts at random.

    Parameters
    ----------
    model : the model it will serve.
    text : a Qwen2-, Qwen3- or Llama-style text model whose weights are copied.
    sibling : the model of this family that ``text`` belongs to, if any.
    own_tokens : whether ``text`` reads other tokens than the model.
    record : ``aggregation``, ``base_model``, ``teacher_model``, ``teacher_layer``.

    Raises
    ------
    UnsupportedModelError
        ``text`` is of another kind, knows no pictures, or does not fit the model.
    """
    config = text.config
    if config.model_type not in ("llama", "qwen2", "qwen3"):
        raise UnsupportedModelError(
            "A Lite selector for InternVL starts from a Qwen2, Qwen3 or Llama text model, not from "
            f"one of type {config.model_type!r}."
        )
    if own_tokens and sibling is None:
        raise UnsupportedModelError(
            "The student's tokenizer differs from the model's and knows no <img>. Start from a "
            "small InternVL, such as OpenGVLab/InternVL2_5-1B."
        )
    fields = config.to_dict()
    with init_empty_weights():
        selector = InternVLSelector(
            InternVLSelectorConfig(
                text_config=fields,
                vision_hidden_size=model.config.vision_config.hidden_size
                * int(1 / model.config.downsample_ratio) ** 2,
                own_tokens=own_tokens,
                **record,
            )
        )
    copy_weights(selector.language_model, text.state_dict(), "the student's text model")
    if sibling is None:
        projector: Any = selector.projector.to_empty(device=text.device)
        for part in projector.children():
            part.reset_parameters()
        projector.to(text.dtype)
    else:
        weights = sibling.model.multi_modal_projector.state_dict()
        copy_weights(selector.projector, weights, "the student's projector")
    return selector


def encode_states(model: Any, pixels: Pixels) -> tuple[Tensor, Tensor]:
    """Run the tower: features for the model, and the states that projectors read.

    Returns
    -------
    ``(feature tokens, hidden)`` and ``(feature tokens, shuffled tower hidden)``.
    """
    features, states = encode_pixels(model, pixels, _Unprojected())
    assert states is not None
    return features, states


def project_states(model: Any, selector: InternVLSelector, states: Tensor) -> Tensor:
    """Project states of `encode_states` to the selector's features ``(feature tokens, hidden)``."""
    return selector.project(states)


class _Unprojected:
    """Stands in for a selector where the states before its projector are wanted."""

    def project(self, states: Tensor) -> Tensor:
        """Return the states."""
        return states
