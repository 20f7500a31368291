"""Which family a model belongs to. A family's folder is imported only when its model comes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from ..core.architecture import Architecture
from ..core.checkpoint import read_json
from ..core.errors import (
    CheckpointError,
    FlexSelectError,
    OptionError,
    UnsupportedModelError,
)
from ..core.hub import local_folder
from ..core.loading import without_layers

#: Class of a loaded model: (family, name of its `Architecture`).
FAMILIES: dict[str, tuple[str, str]] = {
    "InternVLForConditionalGeneration": ("internvl", "InternVL"),
    "LlavaVideoForConditionalGeneration": ("llava_video", "LlavaVideo"),
    "Qwen2_5_VLForConditionalGeneration": ("qwen2_5_vl", "Qwen2_5_VL"),
    "Qwen3VLForConditionalGeneration": ("qwen3_vl", "Qwen3VL"),
}

#: ``model_type`` of a checkpoint's config.json: class of FAMILIES it is loaded as.
CHECKPOINTS: dict[str, str] = {
    "internvl": "InternVLForConditionalGeneration",
    "internvl_chat": "InternVLForConditionalGeneration",
    "llava_qwen": "LlavaVideoForConditionalGeneration",
    "llava_video": "LlavaVideoForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
}

#: Shorter names that commands also take for a family.
ALIASES: dict[str, str] = {"llava": "llava_video", "qwen": "qwen2_5_vl", "qwen3": "qwen3_vl"}

#: Ways of spreading a model that accelerate knows by name.
_SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")


def family_named(name: str) -> str:
    """Return the family's folder for its name or a shorter one; `OptionError` for no family."""
    families = sorted({family for family, _ in FAMILIES.values()})
    family = ALIASES.get(name, name)
    if family not in families:
        known = ", ".join([*families, *sorted(ALIASES)])
        raise OptionError(f"There is no model family {name!r}; choose one of {known}.")
    return family


def architecture_of(model: Any) -> Architecture:
    """Return the family's view of a loaded model, or raise `UnsupportedModelError`."""
    name = _supported(model)
    if name is not None:
        return _family(name)(model)
    what = type(model).__name__
    inner = model.modules() if isinstance(model, nn.Module) else ()
    wrapped = next(filter(None, map(_supported, inner)), None)
    if wrapped is not None:
        raise UnsupportedModelError(
            f"{what} is a wrapper around a {wrapped}. Apply flexselect to the model inside, before "
            "it is compiled or wrapped."
        )
    raise UnsupportedModelError(
        f"{what} is not supported. Supported classes: {', '.join(FAMILIES)}."
    )


def load_model(
    path_or_id: str | Path,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    device_map: Any = None,
    attn_implementation: str | None = None,
) -> Any:
    """Load a model of a supported family, ready to answer.

    Parameters
    ----------
    path_or_id : folder, or hub id, of a checkpoint in the layout of transformers or in the
        original one of its authors.
    dtype : ``"auto"`` as stored, or a dtype or its name.
    device : where to put all of it; default: the first GPU, else the CPU.
    device_map : instead of ``device``, how to spread it, as in transformers.
    attn_implementation : attention kernel, as in transformers.

    Raises
    ------
    CheckpointError
        Files are missing, or keys and shapes do not all match: no weight is ever left random.
    OptionError
        A device is not there, or the attention kernel is unknown, not installed, or not for this
        model.
    UnsupportedModelError
        No family loads this kind of checkpoint.
    """
    folder, family = _resolve(path_or_id)
    placed = _placement(device, device_map)
    _check_attention(attn_implementation)
    try:
        model = family.load_model(folder, _dtype(dtype), placed, attn_implementation)
    except (ImportError, ValueError) as error:
        about_kernel = attn_implementation is not None and (
            isinstance(error, ImportError) or attn_implementation in str(error)
        )
        if isinstance(error, FlexSelectError) or not about_kernel:
            raise
        raise OptionError(
            f"attn_implementation {attn_implementation!r} cannot be used for this model here: "
            f"{_first_line(error)} Install what it needs, or take 'sdpa'."
        ) from error
    return model.eval()


def load_tower(
    path_or_id: str | Path,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
) -> Any:
    """Load a model without the layers of its text model, which stay on the meta device.

    It encodes videos and embeds text, and takes the memory of those parts alone. Parameters and
    errors are those of `load_model`.
    """
    folder, family = _resolve(path_or_id)
    placed = without_layers(_placement(device, None))
    return family.load_model(folder, _dtype(dtype), placed, None).eval()


def load_processor(path_or_id: str | Path) -> Any:
    """Load the processor of a checkpoint of a supported family.

    Raises
    ------
    CheckpointError
        Its files are missing or damaged.
    UnsupportedModelError
        No family loads this kind of checkpoint.
    """
    folder, family = _resolve(path_or_id)
    try:
        return family.load_processor(folder)
    except FlexSelectError:
        raise
    # Of a damaged file, tokenizers raises no narrower class.
    except Exception as error:
        raise CheckpointError(
            f"{folder} holds no whole processor ({_first_line(error)}). Beside the weights there "
            "must be processor_config.json or preprocessor_config.json, tokenizer_config.json, and "
            "tokenizer.json or the files of a slow tokenizer. Download the checkpoint again, or "
            "call save_pretrained of its processor with this folder."
        ) from error


def family_of(path_or_id: str | Path) -> str:
    """Return the family of a checkpoint, from its configuration; no weights are read.

    Raises
    ------
    CheckpointError
        There is no checkpoint.
    UnsupportedModelError
        It is of no family that is supported.
    """
    return _resolve(path_or_id)[1].family


def load_selector(path_or_id: str | Path, model: Any) -> Any:
    """Load a Lite selector for ``model``, ours or in the format the reference publishes.

    The same as giving its path to `FlexSelect`; for more than one use of one selector.

    Raises
    ------
    CheckpointError, UnsupportedModelError
        Files are missing or do not match, or the selector is not for this model.
    """
    return architecture_of(model).load_selector(str(path_or_id))


def convert_model(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a checkpoint in its authors' layout as one that transformers loads.

    Parameters
    ----------
    source : folder, or hub id, of the checkpoint; read shard by shard.
    destination : folder to make; it appears only when it is whole.
    dtype : ``"auto"`` as stored, or a dtype or its name.
    overwrite : replace a destination that exists.
    progress : called with (bytes done, bytes).

    Raises
    ------
    CheckpointError
        As `load_model`; or the destination exists or cannot be written.
    UnsupportedModelError
        No family knows this kind of checkpoint, or it needs no conversion.
    """
    folder, family = _resolve(source)
    return family.convert_checkpoint(
        folder, Path(destination), dtype=_dtype(dtype), overwrite=overwrite, progress=progress
    )


def _resolve(path_or_id: str | Path) -> tuple[Path, type[Architecture]]:
    folder = local_folder(path_or_id)
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in CHECKPOINTS:
        raise UnsupportedModelError(
            f"{path_or_id} holds a model of type {kind!r}. Supported types: "
            f"{', '.join(CHECKPOINTS)}."
        )
    return folder, _family(CHECKPOINTS[kind])


def _supported(model: Any) -> str | None:
    """Name the class of `FAMILIES` that a model is of."""
    return next((cls.__name__ for cls in type(model).__mro__ if cls.__name__ in FAMILIES), None)


def _family(class_name: str) -> type[Architecture]:
    family, name = FAMILIES[class_name]
    return getattr(import_module(f"..{family}.architecture", __package__), name)


def _placement(device: str | torch.device | None, device_map: Any) -> Any:
    """Check where a model shall go, and return it as a device map."""
    if device is not None and device_map is not None:
        raise OptionError("Give either device or device_map, not both.")
    if device_map is None:
        placed = str(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        _check_device("device", placed, "'cpu', 'cuda' or 'cuda:1'")
        return placed
    expected = f"one of {', '.join(map(repr, _SPREADS))}, a device, or a mapping to devices"
    if isinstance(device_map, Mapping):
        for module, place in device_map.items():
            if place != "disk":
                _check_device(f"device_map[{module!r}]", place, "'cpu', 'disk' or 'cuda:1'")
    elif device_map not in _SPREADS:
        _check_device("device_map", device_map, expected)
    return device_map


def _check_device(option: str, value: Any, expected: str) -> None:
    """Raise `OptionError` unless ``value`` names a device of this machine."""
    try:
        device = torch.device(value)
        module = torch.get_device_module(device)
        count = module.device_count() if module.is_available() else 0
    # Torch has no module for kinds that hold no data, such as meta, and not every one counts.
    except (RuntimeError, TypeError, AttributeError) as error:
        raise OptionError(f"{option} must be {expected}, got {value!r}.") from error
    if (device.index or 0) >= count:
        raise OptionError(
            f"{option} {str(value)!r} is not there: torch sees {count} {device.type} device(s) on "
            f"this machine. Expected {expected}."
        )


def _check_attention(name: str | None) -> None:
    """Raise `OptionError` for an attention kernel that transformers does not know."""
    known = ["eager", *transformers.AttentionInterface().valid_keys()]
    if name is not None and name not in known:
        raise OptionError(
            f"attn_implementation must be one of {', '.join(sorted(set(known)))}, got {name!r}."
        )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """Resolve a dtype's name; None for "as stored"."""
    if dtype == "auto":
        return None
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise OptionError(
            f"dtype must be 'auto', 'bfloat16', 'float16' or 'float32', got {dtype!r}."
        )
    return resolved
