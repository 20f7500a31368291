"""LLaVA-Video: what a new Lite selector starts from, and how the tower's states reach it."""

from __future__ import annotations

from typing import Any

from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import Qwen2Config

from ..core.architecture import Pixels
from ..core.errors import UnsupportedModelError
from ..core.loading import copy_weights
from .modeling import frame_features
from .selector import LlavaVideoSelector, LlavaVideoSelectorConfig

#: Parts that are not trained. The reference's training names none for LLaVA-Video (inferred).
FROZEN: tuple[str, ...] = ()


def new_selector(
    model: Any, text: Any, sibling: Any | None, own_tokens: bool, **record: Any
) -> LlavaVideoSelector:
    """Build a selector for ``model`` from a small text model.

    With a sibling, its projector and newline come along; without one they start at random.

    Parameters
    ----------
    model : the model it will serve.
    text : a Qwen2 text model whose weights are copied.
    sibling : the model of this family that ``text`` belongs to, if any.
    own_tokens : whether ``text`` reads other tokens than the model.
    record : ``aggregation``, ``base_model``, ``teacher_model``, ``teacher_layer``.

    Raises
    ------
    UnsupportedModelError
        ``text`` is of another kind, reads other tokens, or does not fit the model.
    """
    config = text.config
    if config.model_type != "qwen2":
        raise UnsupportedModelError(
            f"A Lite selector for LLaVA-Video starts from a Qwen2 text model, not from one of type "
            f"{config.model_type!r}."
        )
    if own_tokens:
        raise UnsupportedModelError(
            "A Lite selector for LLaVA-Video reads the model's own tokens, but the student's "
            "tokenizer differs. Take a Qwen2 or Qwen2.5 model."
        )
    with init_empty_weights():
        selector = LlavaVideoSelector(
            LlavaVideoSelectorConfig(
                text_config=Qwen2Config(**config.to_dict()),
                vision_hidden_size=model.config.vision_config.hidden_size,
                video_token_id=model.config.video_token_id,
                **record,
            )
        )
    copy_weights(selector.language_model, text.state_dict(), "the student's text model")
    width = selector.hidden_size
    if sibling is None:
        projector: Any = selector.projector.to_empty(device=text.device)
        for part in projector.children():
            part.reset_parameters()
        projector.to(text.dtype)
        newline = text.embed_tokens.weight.new_empty(width).normal_(std=width**-0.5)
    else:
        weights = sibling.model.multi_modal_projector.state_dict()
        copy_weights(selector.projector, weights, "the student's projector")
        newline = sibling.model.image_newline.detach().clone()
    selector.image_newline = nn.Parameter(newline)
    return selector


def encode_states(model: Any, pixels: Pixels) -> tuple[Tensor, Tensor]:
    """Run the tower: features for the model, and the states that projectors read.

    Returns
    -------
    ``(feature tokens, hidden)`` and ``(frames, patches, tower hidden)``.
    """
    core = model.model
    patches = core.encode_pictures(pixels.values)
    return core.frame_features(patches).flatten(0, 1), patches


def project_states(model: Any, selector: LlavaVideoSelector, states: Tensor) -> Tensor:
    """Project states of `encode_states` to the selector's features ``(feature tokens, hidden)``."""
    return frame_features(states, selector.projector, selector.image_newline, model.config).flatten(
        0, 1
    )
