"""Qwen3-VL: loading models, processors and Lite selectors.

Main checkpoints need no conversion: they were released in the layout of transformers. No Lite
selector is published.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLProcessor

from ..core.checkpoint import read_json
from ..core.errors import UnsupportedModelError
from ..core.hub import local_folder
from ..core.loading import (
    check_class,
    check_sizes,
    fill_selector,
    keep_key,
    load_pretrained,
)
from .selector import Qwen3VLSelector, Qwen3VLSelectorConfig


def load_model(
    folder: Path, dtype: torch.dtype | None, device_map: Any, attn_implementation: str | None
) -> Any:
    """Load a checkpoint; see `Architecture.load_model`."""
    return load_pretrained(
        Qwen3VLForConditionalGeneration, folder, dtype, device_map, attn_implementation
    )


def load_processor(folder: Path) -> Any:
    """Load the stock processor."""
    return Qwen3VLProcessor.from_pretrained(folder)


def load_selector(path: str, model: Any) -> Qwen3VLSelector:
    """Load a Lite selector of ours for ``model``, in its dtype and on its device.

    Raises
    ------
    CheckpointError
        Files are missing or damaged, or keys do not match.
    UnsupportedModelError
        The selector is of another family, or for another size of tower.
    """
    folder = local_folder(path)
    raw = read_json(folder / "config.json")
    if raw.get("model_type") != Qwen3VLSelectorConfig.model_type:
        raise UnsupportedModelError(
            f"{path} is no selector for Qwen3-VL: its config.json says architectures="
            f"{raw.get('architectures')}, model_type={raw.get('model_type')!r}. None is published; "
            "train one (docs/training.md), or leave the selector out."
        )
    config = Qwen3VLSelectorConfig.from_dict(raw)
    with init_empty_weights():
        selector = Qwen3VLSelector(config)
    selector = fill_selector(selector, folder, keep_key, model, str(path))
    check_fit(selector, model)
    return selector


def check_fit(selector: Any, model: Any) -> None:
    """Check that ``selector`` is one of this family, for a tower like the one of ``model``."""
    check_class(selector, Qwen3VLSelector)
    ours, theirs = selector.config, model.config
    sizes = {
        "width of the vision tower": (ours.vision_hidden_size, theirs.vision_config.hidden_size),
        "spatial merge size": (ours.spatial_merge_size, theirs.vision_config.spatial_merge_size),
    }
    check_sizes(selector, sizes)
