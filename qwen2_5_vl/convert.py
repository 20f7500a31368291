"""Qwen2.5-VL: loading checkpoints, and the published Lite selector in this project's terms.

Main checkpoints need no conversion: stock transformers reads both the released key layout and its
own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from ..core.checkpoint import Checkpoint, load_into, read_json, some
from ..core.errors import CheckpointError, UnsupportedModelError
from ..core.hub import local_folder
from ..core.relevance import check_aggregation
from .selector import Qwen2_5_VLSelector, Qwen2_5_VLSelectorConfig

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


def load_model(
    folder: Path, dtype: torch.dtype | None, device_map: Any, attn_implementation: str | None
) -> Any:
    """Load a checkpoint; see `Architecture.load_model`."""
    Checkpoint(folder)  # names missing and damaged files better than what follows would
    model, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder,
        dtype="auto" if dtype is None else dtype,
        device_map=device_map,
        attn_implementation=attn_implementation,
        # Reported below with the rest, instead of an error that names no weight.
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    wrong = {what: sorted(map(str, names)) for what, names in report.items() if names}
    if wrong:
        raise CheckpointError(
            f"{folder} does not fit Qwen2.5-VL: "
            + "; ".join(f"{what}: {some(names)}" for what, names in wrong.items())
        )
    return model


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
        convert = _keep_key
    elif PUBLISHED in (raw.get("architectures") or []):
        config = selector_config(raw, model.config.vision_config)
        convert = _convert_key
    else:
        raise UnsupportedModelError(
            f"{path} is no selector for Qwen2.5-VL: its config.json says architectures="
            f"{raw.get('architectures')}, model_type={raw.get('model_type')!r}."
        )
    with init_empty_weights():
        selector = Qwen2_5_VLSelector(config)
    load_into(selector, Checkpoint(folder), convert, dtype=model.dtype, device=model.device)
    selector.name_or_path = str(path)
    check_fit(selector, model)
    return selector.to(model.device).eval()


def check_fit(selector: Any, model: Any) -> None:
    """Check that ``selector`` is one of this family, for a tower like the one of ``model``."""
    if not isinstance(selector, Qwen2_5_VLSelector):
        raise UnsupportedModelError(
            f"A selector of class {type(selector).__name__} does not fit Qwen2.5-VL; give a "
            "Qwen2_5_VLSelector."
        )
    ours, theirs = selector.config, model.config
    pairs = {
        "width of the vision tower": (ours.vision_hidden_size, theirs.vision_config.hidden_size),
        "spatial merge size": (ours.spatial_merge_size, theirs.vision_config.spatial_merge_size),
    }
    for what, (selector_has, model_has) in pairs.items():
        if selector_has != model_has:
            raise UnsupportedModelError(
                f"The selector {selector.name_or_path} does not fit this model: {what} "
                f"{selector_has}, the model has {model_has}."
            )


def _convert_key(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    return [(selector_key(name), tensor)]


def _keep_key(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    return [(name, tensor)]


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
