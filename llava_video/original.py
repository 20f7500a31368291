"""An original checkpoint's configuration and keys in transformers' terms, as pure functions."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer, Qwen2Config, SiglipVisionConfig

from ..core.checkpoint import read_json, rename_prefix
from ..core.errors import CheckpointError
from .modeling import LlavaVideoConfig
from .processing import add_placeholders

logger = logging.getLogger(__name__)

_KEYS = {
    "model.vision_tower.vision_tower.vision_model.": "model.vision_tower.",
    "model.mm_projector.0.": "model.multi_modal_projector.linear_1.",
    "model.mm_projector.2.": "model.multi_modal_projector.linear_2.",
    "model.embed_tokens.": "model.language_model.embed_tokens.",
    "model.layers.": "model.language_model.layers.",
    "model.norm.": "model.language_model.norm.",
}
_SELECTOR_KEYS = {
    "mm_projector.0.": "projector.linear_1.",
    "mm_projector.2.": "projector.linear_2.",
    "embed_tokens.": "language_model.embed_tokens.",
    "layers.": "language_model.layers.",
    "norm.": "language_model.norm.",
}

#: Towers that checkpoints name but do not describe, with the layer that LLaVA-NeXT deletes.
_TOWERS = {
    "siglip-so400m-patch14-384": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    }
}
_TEXT_REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "vocab_size",
)
_TEXT_OPTIONAL = (
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
    "initializer_range",
    "max_position_embeddings",
    "max_window_layers",
    "sliding_window",
    "tie_word_embeddings",
    "use_cache",
    "use_sliding_window",
)
#: Settings of LLaVA-NeXT that change what the model computes, and the only values known here.
_SUPPORTED: dict[str, tuple[object, ...]] = {
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_resampler_type": (None,),
    "mm_vision_select_feature": ("patch", None),
    "add_faster_video": (False, None),
}
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")


def is_original(folder: str | Path) -> bool:
    """Whether a folder holds a checkpoint in LLaVA-NeXT's format with a Qwen2 language model."""
    path = Path(folder) / "config.json"
    return path.is_file() and _is_original(read_json(path))


def convert_config(
    folder: str | Path,
    *,
    spatial_pool_mode: str | None = None,
    newline_position: str | None = None,
) -> LlavaVideoConfig:
    """Translate the ``config.json`` of an original checkpoint.

    The tower is described by ``vision_config.json`` beside it, or known by its name. Both count the
    tower's last layer, which LLaVA-NeXT deletes (fixtures, 1).

    Raises
    ------
    CheckpointError
        A setting is missing, or has a value that no supported model has.
    """
    folder = Path(folder)
    path = folder / "config.json"
    raw = read_json(path)
    if not _is_original(raw):
        raise CheckpointError(
            f"{path} describes a {raw.get('model_type')!r} model; expected 'llava_qwen', the "
            "format of LLaVA-NeXT. A converted model is loaded with from_pretrained."
        )
    for key, known in _SUPPORTED.items():
        if raw.get(key) not in known:
            raise CheckpointError(f"{path}: {key} must be {known[0]!r}, got {raw.get(key)!r}.")
    if "unpad" not in str(raw.get("mm_patch_merge_type")):
        raise CheckpointError(
            f"{path}: mm_patch_merge_type must be 'spatial_unpad', got "
            f"{raw.get('mm_patch_merge_type')!r}; without it there is no newline embedding."
        )
    image_id = int(raw.get("image_token_index", 151646))
    video_id = image_id + 1
    if has_tokenizer(folder):
        image_id, video_id = add_placeholders(AutoTokenizer.from_pretrained(folder))
        if max(image_id, video_id) >= int(_need(raw, "vocab_size", path)):
            raise CheckpointError(
                f"{path}: vocab_size {raw['vocab_size']} leaves no room for the placeholders "
                f"<image> ({image_id}) and <video> ({video_id}) of its tokenizer."
            )
    return LlavaVideoConfig(
        text_config=_text_config(raw, path),
        vision_config=_vision_config(raw, path),
        image_token_index=image_id,
        video_token_index=video_id,
        image_grid_pinpoints=_pinpoints(raw),
        vision_aspect_ratio=_aspect_ratio(raw, path),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        # Where its config is silent, LLaVA-NeXT pools by 2 and ends the video with one newline.
        spatial_pool_mode=spatial_pool_mode or raw.get("mm_spatial_pool_mode") or "bilinear",
        spatial_pool_stride=int(raw.get("mm_spatial_pool_stride") or 2),
        newline_position=newline_position or raw.get("mm_newline_position") or "one_token",
    )


def convert_tensor(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """Rename one tensor of an original checkpoint; see `core.checkpoint.Convert`."""
    return [(rename_prefix(name, _KEYS), tensor)]


def selector_tensor(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """Rename one tensor of a published Lite selector; see `core.checkpoint.Convert`.

    The stored model is a Qwen2 without a head, with its own projector and newline. Here the Qwen2
    is ``language_model``, the projector ``projector`` with the stock model's layers, and the
    newline keeps its name, ``image_newline``.
    """
    return [(rename_prefix(name, _SELECTOR_KEYS), tensor)]


def ignored_keys(config: LlavaVideoConfig) -> list[str]:
    """Name the tables that older releases stored and newer ones compute: without a use here."""
    return [
        "model.vision_tower.vision_tower.vision_model.embeddings.position_ids",
        *(
            f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
            for layer in range(config.text_config.num_hidden_layers)
        ),
    ]


def tied_keys(config: LlavaVideoConfig) -> dict[str, str]:
    """Map the parameters that share another's weight to that other."""
    if not config.tie_word_embeddings:
        return {}
    return {"lm_head.weight": "model.language_model.embed_tokens.weight"}


def has_tokenizer(folder: Path) -> bool:
    """Whether a checkpoint brings its tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def _is_original(raw: Mapping[str, Any]) -> bool:
    architectures = raw.get("architectures") or []
    return raw.get("model_type") == "llava_qwen" or "LlavaQwenForCausalLM" in architectures


def _need(raw: Mapping[str, Any], key: str, path: Path) -> Any:
    if raw.get(key) is None:
        raise CheckpointError(f"{path} lacks {key}.")
    return raw[key]


def _text_config(raw: Mapping[str, Any], path: Path) -> Qwen2Config:
    fields = {key: _need(raw, key, path) for key in _TEXT_REQUIRED}
    fields |= {key: raw[key] for key in _TEXT_OPTIONAL if key in raw}
    if raw.get("rope_scaling") is not None:
        # LLaVA-NeXT sets it to None before it builds the model (fixtures, L5).
        logger.warning("%s: rope_scaling is ignored, as LLaVA-NeXT ignores it.", path)
    theta = float(_need(raw, "rope_theta", path))
    return Qwen2Config(**fields, rope_parameters={"rope_type": "default", "rope_theta": theta})


def _vision_config(raw: Mapping[str, Any], path: Path) -> SiglipVisionConfig:
    beside = path.with_name("vision_config.json")
    name = str(_need(raw, "mm_vision_tower", path))
    if beside.is_file():
        tower: Mapping[str, Any] = read_json(beside)
    elif Path(name).name in _TOWERS:
        tower = _TOWERS[Path(name).name]
    else:
        raise CheckpointError(
            f"{path}: the vision tower {name!r} is unknown; expected {', '.join(_TOWERS)}. "
            f"Describe another SigLIP tower in {beside}."
        )
    dims = {key: _need(tower, key, beside) for key in next(iter(_TOWERS.values()))}
    dims["num_hidden_layers"] -= 1
    return SiglipVisionConfig(**dims, vision_use_head=False)


def _pinpoints(raw: Mapping[str, Any]) -> list[Any] | None:
    pinpoints = raw.get("image_grid_pinpoints")
    return pinpoints if isinstance(pinpoints, list) else None


def _aspect_ratio(raw: Mapping[str, Any], path: Path) -> str:
    ratio = str(raw.get("image_aspect_ratio"))
    if re.fullmatch(r"anyres_max_\d+", ratio):
        return ratio
    logger.warning(
        "%s: images (not videos) are cut as anyres_max_9; image_aspect_ratio %r is unknown.",
        path,
        ratio,
    )
    return "anyres_max_9"
