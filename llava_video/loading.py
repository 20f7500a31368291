"""LLaVA-Video: loading models, processors and Lite selectors, in whatever layout they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import Qwen2Config

from ..core.checkpoint import Checkpoint, load_into, read_json, some
from ..core.errors import CheckpointError, UnsupportedModelError
from ..core.hub import local_folder
from .convert import load_original
from .convert import load_processor as load_original_processor
from .modeling import LlavaVideoForConditionalGeneration
from .original import convert_config, is_original, selector_tensor
from .processing import LlavaVideoProcessor
from .selector import LlavaVideoSelector, LlavaVideoSelectorConfig

#: ``architectures`` of the config.json that the reference's training writes.
PUBLISHED = "Qwen2ModelForSelector"

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
    if is_original(folder):
        return load_original(
            folder,
            dtype=dtype,
            device_map=device_map,
            attn_implementation=attn_implementation,
            spatial_pool_mode=published_pooling(folder),
        )
    Checkpoint(folder)  # names missing and damaged files better than what follows would
    model, report = LlavaVideoForConditionalGeneration.from_pretrained(
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
            f"{folder} does not fit LLaVA-Video: "
            + "; ".join(f"{what}: {some(names)}" for what, names in wrong.items())
        )
    return model


def published_pooling(folder: Path) -> str | None:
    """Return how the reference pools a checkpoint's frames; None for as its config says.

    The published results, budgets and Lite selectors are for bilinear pooling to 14 x 14, also
    where a LLaVA-Video checkpoint's own config says average (13 x 13); `convert.load_original`
    follows the config. Checkpoints that do not end every row with a newline are no LLaVA-Video.
    """
    grid = read_json(folder / "config.json").get("mm_newline_position") == "grid"
    return "bilinear" if grid else None


def load_processor(folder: Path) -> Any:
    """Load the processor, or build it for a checkpoint in LLaVA-NeXT's format."""
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
        convert = _keep_key
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
    load_into(selector, Checkpoint(folder), convert, dtype=model.dtype, device=model.device)
    selector.name_or_path = str(path)
    check_fit(selector, model)
    return selector.to(model.device).eval()


def check_fit(selector: Any, model: Any) -> None:
    """Check that ``selector`` is one of this family, for a tower like the one of ``model``."""
    if not isinstance(selector, LlavaVideoSelector):
        raise UnsupportedModelError(
            f"A selector of class {type(selector).__name__} does not fit LLaVA-Video; give a "
            "LlavaVideoSelector."
        )
    ours, theirs = selector.config, model.config
    pairs = {
        "width of the vision tower": (ours.vision_hidden_size, theirs.vision_config.hidden_size),
        "video placeholder": (ours.video_token_id, theirs.video_token_id),
    }
    for what, (selector_has, model_has) in pairs.items():
        if selector_has != model_has:
            raise UnsupportedModelError(
                f"The selector {selector.name_or_path} does not fit this model: {what} "
                f"{selector_has}, the model has {model_has}."
            )


def selector_config(published: Mapping[str, Any], model_config: Any) -> LlavaVideoSelectorConfig:
    """Translate a published selector's flat config.json, for the model it serves.

    The published file describes neither a tower nor an aggregation: the reference takes both from
    the evaluated model and its command line.
    """
    theta = float(published.get("rope_theta", 1e6))
    return LlavaVideoSelectorConfig(
        text_config=Qwen2Config(
            **{name: published[name] for name in _TEXT_FIELDS if name in published},
            rope_parameters={"rope_type": "default", "rope_theta": theta},
        ),
        vision_hidden_size=model_config.vision_config.hidden_size,
        video_token_id=model_config.video_token_id,
        base_model=published.get("_name_or_path"),
    )


def _keep_key(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    return [(name, tensor)]
