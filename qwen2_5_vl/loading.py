"""Qwen2.5-VL: loading models, processors and Lite selectors, in whatever layout they are.

Main checkpoints need no conversion: stock transformers reads both the released key layout and its
own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from ..core.checkpoint import Checkpoint, load_into, read_json, some
from ..core.errors import CheckpointError, UnsupportedModelError
from ..core.hub import local_folder
from .convert import PUBLISHED, selector_config, selector_key
from .selector import Qwen2_5_VLSelector, Qwen2_5_VLSelectorConfig


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
