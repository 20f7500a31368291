"""Qwen2.5-VL: a published Lite selector's configuration and keys in this project's terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..core.errors import CheckpointError
from ..core.relevance import check_aggregation
from .selector import Qwen2_5_VLSelectorConfig

#: ``architectures`` of the config.json that the reference's training writes.
PUBLISHED = "Qwen2_5_Token_Selector_External"

_TEXT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "use_sliding_window",
)


def selector_config(published: Mapping[str, Any], vision_config: Any) -> Qwen2_5_VLSelectorConfig:
    """Translate a published selector's flat config.json.

    Parameters
    ----------
    published : its config.json. Its rope decides: the training code forces yarn by 4 onto the
        Qwen2 base, and the selector needs the same frequencies (fixtures, Q8).
    vision_config : of the model it serves. The published file does not describe a tower.
    """
    rope = dict(published.get("rope_scaling") or {})
    rope_type = rope.pop("type", "default")
    rope.setdefault("rope_type", rope_type)
    rope["rope_theta"] = published.get("rope_theta", 1e6)
    if "mrope_section" not in rope:
        raise CheckpointError(
            "The selector's config.json has no rope_scaling.mrope_section, so its positions are "
            "unknown. Take the config.json it was published with."
        )
    layer = published.get("token_selector_layer")
    return Qwen2_5_VLSelectorConfig(
        text_config={
            **{name: published[name] for name in _TEXT_FIELDS if name in published},
            "rope_parameters": rope,
        },
        vision_hidden_size=vision_config.hidden_size,
        spatial_merge_size=vision_config.spatial_merge_size,
        tokens_per_second=vision_config.tokens_per_second,
        aggregation=check_aggregation(published.get("drop_func_name", "max")),
        base_model=published.get("_name_or_path"),
        teacher_layer=None if layer is None else int(layer),
    )


def selector_key(name: str) -> str:
    """Rename a published selector's key to the one in `Qwen2_5_VLSelector`."""
    prefix, found, rest = name.partition("merger_token_selector.")
    if found and not prefix:
        return f"projector.{rest}"
    return f"language_model.{name}"
