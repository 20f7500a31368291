"""InternVL: loading models, processors and Lite selectors, in whatever layout they are."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import InternVLForConditionalGeneration, InternVLProcessor

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
from .convert import load_original
from .convert import load_processor as load_original_processor
from .original import convert_text_config, is_original, selector_tensor
from .selector import InternVLSelector, InternVLSelectorConfig, Translator
from .tokenization import added_tokens, load_tokenizer

#: ``architectures`` of the config.json that the reference's training writes, and whether such a
#: selector reads the model's own tokens.
PUBLISHED = {"Qwen2ForSelector_EXTERNAL": False, "InternLM2ForSelector_EXTERNAL": True}


def load_model(
    folder: Path, dtype: torch.dtype | None, device_map: Any, attn_implementation: str | None
) -> Any:
    """Load a checkpoint; see `Architecture.load_model`."""
    if is_original(folder):
        return load_original(
            folder, dtype=dtype, device_map=device_map, attn_implementation=attn_implementation
        )
    return load_pretrained(
        InternVLForConditionalGeneration, folder, dtype, device_map, attn_implementation
    )


def load_processor(folder: Path) -> Any:
    """Load the stock processor, or build it for a checkpoint in the original layout."""
    if is_original(folder):
        return load_original_processor(folder)
    return InternVLProcessor.from_pretrained(folder)


def load_selector(path: str, model: Any) -> InternVLSelector:
    """Load a Lite selector for ``model``, ours or published, in its dtype and on its device.

    A selector with tokens of its own needs two tokenizers, of the model and its own; both are
    looked for beside the weights.

    Raises
    ------
    CheckpointError
        Files are missing or damaged, or keys do not match.
    UnsupportedModelError
        The selector is of another family, or for another size of tower.
    """
    folder = local_folder(path)
    raw = read_json(folder / "config.json")
    kinds = [kind for kind in raw.get("architectures") or [] if kind in PUBLISHED]
    if raw.get("model_type") == InternVLSelectorConfig.model_type:
        config = InternVLSelectorConfig.from_dict(raw)
        convert: Any = keep_key
    elif kinds:
        config = selector_config(raw, model.config, own_tokens=not PUBLISHED[kinds[0]])
        convert = partial(selector_tensor, text_config=config.text_config)
    else:
        raise UnsupportedModelError(
            f"{path} is no selector for InternVL: its config.json says architectures="
            f"{raw.get('architectures')}, model_type={raw.get('model_type')!r}."
        )
    with init_empty_weights():
        selector = InternVLSelector(config)
    selector = fill_selector(selector, folder, convert, model, str(path))
    check_fit(selector, model)
    if config.own_tokens:
        selector.translate = translator(folder, model)
    return selector


def check_fit(selector: Any, model: Any) -> None:
    """Check that ``selector`` is one of this family, for a tower like the one of ``model``."""
    check_class(selector, InternVLSelector)
    ours, theirs = selector.config, model.config
    sizes = {
        "width of the shuffled tower features": (
            ours.vision_hidden_size,
            theirs.vision_config.hidden_size * int(1 / theirs.downsample_ratio) ** 2,
        ),
    }
    check_sizes(selector, sizes)


def selector_config(
    published: Mapping[str, Any], model_config: Any, *, own_tokens: bool
) -> InternVLSelectorConfig:
    """Translate a published selector's flat config.json, for the model it serves."""
    vision = model_config.vision_config.hidden_size
    return InternVLSelectorConfig(
        text_config=convert_text_config(published),
        vision_hidden_size=vision * int(1 / model_config.downsample_ratio) ** 2,
        own_tokens=own_tokens,
        base_model=published.get("_name_or_path"),
    )


def translator(selector: Path, model: Any) -> Translator | None:
    """Build the translator from the tokenizers beside the weights, or None where one is missing.

    Parameters
    ----------
    selector : folder of the selector, or of what it starts from.
    model : the model it serves.
    """
    if not (model.name_or_path and added_tokens(selector)):
        return None
    folder = local_folder(model.name_or_path)
    if not added_tokens(folder):
        return None
    return Translator(load_processor(folder).tokenizer, load_tokenizer(selector))
