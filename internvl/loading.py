"""InternVL: loading models, processors and Lite selectors, in whatever layout they are."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import InternVLForConditionalGeneration, InternVLProcessor

from ..core.checkpoint import Checkpoint, load_into, read_json, some
from ..core.errors import CheckpointError, UnsupportedModelError
from ..core.hub import local_folder
from .convert import load_original
from .convert import load_processor as load_original_processor
from .original import ORIGINAL, convert_text_config, selector_tensor
from .selector import InternVLSelector, InternVLSelectorConfig, Translator
from .tokenization import added_tokens, load_tokenizer

#: ``architectures`` of the config.json that the reference's training writes, and whether such a
#: selector reads the model's own tokens.
PUBLISHED = {"Qwen2ForSelector_EXTERNAL": False, "InternLM2ForSelector_EXTERNAL": True}


def load_model(
    folder: Path, dtype: torch.dtype | None, device_map: Any, attn_implementation: str | None
) -> Any:
    """Load a checkpoint; see `Architecture.load_model`."""
    if read_json(folder / "config.json").get("model_type") == ORIGINAL:
        return load_original(
            folder, dtype=dtype, device_map=device_map, attn_implementation=attn_implementation
        )
    Checkpoint(folder)  # names missing and damaged files better than what follows would
    model, report = InternVLForConditionalGeneration.from_pretrained(
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
            f"{folder} does not fit InternVL: "
            + "; ".join(f"{what}: {some(names)}" for what, names in wrong.items())
        )
    return model


def load_processor(folder: Path) -> Any:
    """Load the stock processor, or build it for a checkpoint in the original layout."""
    if read_json(folder / "config.json").get("model_type") == ORIGINAL:
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
        convert: Any = _keep_key
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
    load_into(selector, Checkpoint(folder), convert, dtype=model.dtype, device=model.device)
    selector.name_or_path = str(path)
    check_fit(selector, model)
    if config.own_tokens:
        selector.translate = _translator(folder, Path(model.config._name_or_path))
    return selector.to(model.device).eval()


def check_fit(selector: Any, model: Any) -> None:
    """Check that ``selector`` is one of this family, for a tower like the one of ``model``."""
    if not isinstance(selector, InternVLSelector):
        raise UnsupportedModelError(
            f"A selector of class {type(selector).__name__} does not fit InternVL; give an "
            "InternVLSelector."
        )
    theirs = model.config
    pairs = {
        "width of the shuffled tower features": (
            selector.config.vision_hidden_size,
            theirs.vision_config.hidden_size * int(1 / theirs.downsample_ratio) ** 2,
        ),
    }
    for what, (selector_has, model_has) in pairs.items():
        if selector_has != model_has:
            raise UnsupportedModelError(
                f"The selector {selector.name_or_path} does not fit this model: {what} "
                f"{selector_has}, the model has {model_has}."
            )


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


def _translator(selector: Path, model: Path) -> Translator | None:
    """Build the translator from the tokenizers beside the weights, or None where one is missing."""
    if not (added_tokens(selector) and added_tokens(model)):
        return None
    return Translator(load_processor(model).tokenizer, load_tokenizer(selector))


def _keep_key(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    return [(name, tensor)]
