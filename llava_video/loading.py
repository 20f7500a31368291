"""LLaVA-Video: loading models, processors and Lite selectors, in whatever layout they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import Qwen2Config

from ..core.checkpoint import read_json
from ..core.errors import UnsupportedModelError
from ..core.hub import local_folder
from ..core.loading import (
    TEXT_FIELDS,
    check_class,
    check_sizes,
    fill_selector,
    keep_key,
    load_pretrained,
)
from .convert import load_original
from .convert import load_processor as load_original_processor
from .modeling import LlavaVideoForConditionalGeneration
from .original import convert_config, is_original, selector_tensor
from .processing import LlavaVideoProcessor
from .selector import LlavaVideoSelector, LlavaVideoSelectorConfig

#: ``architectures`` of the config.json that the reference's training writes.
PUBLISHED = "Qwen2ModelForSelector"


def load_model(
    folder: Path, dtype: torch.dtype | None, device_map: Any, attn_implementation: str | None
) -> Any:
    """Load a checkpoint; see `Architecture.load_model`."""
    if is_original(folder):
        return load_original(
            folder,
            dtype=dtype,
            device_map=device_map,
            attn_implementation=attn_implementation,
            spatial_pool_mode=published_pooling(folder),
        )
    return load_pretrained(
        LlavaVideoForConditionalGeneration, folder, dtype, device_map, attn_implementation
    )


def load_processor(folder: Path) -> Any:
    """Load the processor, or build it for a checkpoint in the original layout."""
    if is_original(folder):
        config = convert_config(folder, spatial_pool_mode=published_pooling(folder))
        return load_original_processor(folder, config)
    return LlavaVideoProcessor.from_pretrained(folder)


def load_selector(path: str, model: Any) -> LlavaVideoSelector:
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
    if raw.get("model_type") == LlavaVideoSelectorConfig.model_type:
        config = LlavaVideoSelectorConfig.from_dict(raw)
        convert = keep_key
    elif PUBLISHED in (raw.get("architectures") or []):
        config = selector_config(raw, model.config)
        convert = selector_tensor
    else:
        raise UnsupportedModelError(
            f"{path} is no selector for LLaVA-Video: its config.json says architectures="
            f"{raw.get('architectures')}, model_type={raw.get('model_type')!r}."
        )
    with init_empty_weights():
        selector = LlavaVideoSelector(config)
    selector = fill_selector(selector, folder, convert, model, str(path))
    check_fit(selector, model)
    return selector


def check_fit(selector: Any, model: Any) -> None:
    """Check that ``selector`` is one of this family, for a tower like the one of ``model``."""
    check_class(selector, LlavaVideoSelector)
    ours, theirs = selector.config, model.config
    sizes = {
        "width of the vision tower": (ours.vision_hidden_size, theirs.vision_config.hidden_size),
        "video placeholder": (ours.video_token_id, theirs.video_token_id),
    }
    check_sizes(selector, sizes)


def selector_config(published: Mapping[str, Any], model_config: Any) -> LlavaVideoSelectorConfig:
    """Translate a published selector's flat config.json, for the model it serves.

    The published file describes neither a tower nor an aggregation: the reference takes both from
    the evaluated model and its command line.
    """
    theta = float(published.get("rope_theta", 1e6))
    return LlavaVideoSelectorConfig(
        text_config=Qwen2Config(
            **{name: published[name] for name in TEXT_FIELDS if name in published},
            rope_parameters={"rope_type": "default", "rope_theta": theta},
        ),
        vision_hidden_size=model_config.vision_config.hidden_size,
        video_token_id=model_config.video_token_id,
        base_model=published.get("_name_or_path"),
    )


def published_pooling(folder: Path) -> str | None:
    """Return how the reference pools a checkpoint's frames; None for as its config says.

    The published results, budgets and Lite selectors are for bilinear pooling to 14 x 14, also
    where a LLaVA-Video checkpoint's own config says average (13 x 13); `convert.load_original`
    follows the config. Checkpoints that do not end every row with a newline are no LLaVA-Video.
    """
    grid = read_json(folder / "config.json").get("mm_newline_position") == "grid"
    return "bilinear" if grid else None
