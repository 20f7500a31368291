"""Qwen2.5-VL: loading models, processors and Lite selectors, in whatever layout they are.

Main checkpoints need no conversion: stock transformers reads both the released key layout and its
own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from ..core.checkpoint import read_json
from ..core.errors import CheckpointError, UnsupportedModelError
from ..core.hub import local_folder
from ..core.loading import (
    TEXT_FIELDS,
    check_class,
    check_sizes,
    fill_selector,
    keep_key,
    load_pretrained,
)
from ..core.relevance import check_aggregation
from .original import selector_tensor
from .selector import Qwen2_5_VLSelector, Qwen2_5_VLSelectorConfig

#: ``architectures`` of the config.json that the reference's training writes.
PUBLISHED = "Qwen2_5_Token_Selector_External"


def load_model(
    folder: Path, dtype: torch.dtype | None, device_map: Any, attn_implementation: str | None
) -> Any:
    """Load a checkpoint; see `Architecture.load_model`."""
    return load_pretrained(
        Qwen2_5_VLForConditionalGeneration, folder, dtype, device_map, attn_implementation
    )


def load_processor(folder: Path) -> Any:
    """Load the stock processor."""
    return Qwen2_5_VLProcessor.from_pretrained(folder)


def load_selector(path: str, model: Any) -> Qwen2_5_VLSelector:
    """Load a Lite selector for ``model``, ours or published, in its dtype and on its device.

    Raises
    ------
    CheckpointError
        Files are missing or damaged, or keys do not match.
    UnsupportedModelError
        The selector is of another family, or for another size of tower.
    """
    folder = local_folder(path)
    raw = read_json(folder / "config.json")
    if raw.get("model_type") == Qwen2_5_VLSelectorConfig.model_type:
        config = Qwen2_5_VLSelectorConfig.from_dict(raw)
        convert = keep_key
    elif PUBLISHED in (raw.get("architectures") or []):
        config = selector_config(raw, model.config)
        convert = selector_tensor
    else:
        raise UnsupportedModelError(
            f"{path} is no selector for Qwen2.5-VL: its config.json says architectures="
            f"{raw.get('architectures')}, model_type={raw.get('model_type')!r}."
        )
    with init_empty_weights():
        selector = Qwen2_5_VLSelector(config)
    selector = fill_selector(selector, folder, convert, model, str(path))
    check_fit(selector, model)
    return selector


def check_fit(selector: Any, model: Any) -> None:
    """Check that ``selector`` is one of this family, for a tower like the one of ``model``."""
    check_class(selector, Qwen2_5_VLSelector)
    ours, theirs = selector.config, model.config
    sizes = {
        "width of the vision tower": (ours.vision_hidden_size, theirs.vision_config.hidden_size),
        "spatial merge size": (ours.spatial_merge_size, theirs.vision_config.spatial_merge_size),
    }
    check_sizes(selector, sizes)


def selector_config(published: Mapping[str, Any], model_config: Any) -> Qwen2_5_VLSelectorConfig:
    """Translate a published selector's flat config.json, for the model it serves.

    Parameters
    ----------
    published : its config.json. Its rope decides: the training code forces yarn by 4 onto the
        Qwen2 base, and the selector needs the same frequencies (fixtures, Q8).
    model_config : of the model it serves. The published file does not describe a tower.
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
    vision = model_config.vision_config
    return Qwen2_5_VLSelectorConfig(
        text_config={
            **{name: published[name] for name in TEXT_FIELDS if name in published},
            "rope_parameters": rope,
        },
        vision_hidden_size=vision.hidden_size,
        spatial_merge_size=vision.spatial_merge_size,
        tokens_per_second=vision.tokens_per_second,
        aggregation=check_aggregation(published.get("drop_func_name", "max")),
        base_model=published.get("_name_or_path"),
        teacher_layer=None if layer is None else int(layer),
    )
