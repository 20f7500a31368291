"""Which family a model belongs to. A family's folder is imported only when its model comes."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ..core.architecture import Architecture
from ..core.checkpoint import read_json
from ..core.errors import OptionError, UnsupportedModelError
from ..core.hub import local_folder

#: Class of a loaded model: (family, name of its `Architecture`).
FAMILIES: dict[str, tuple[str, str]] = {
    "InternVLForConditionalGeneration": ("internvl", "InternVL"),
    "LlavaVideoForConditionalGeneration": ("llava_video", "LlavaVideo"),
    "Qwen2_5_VLForConditionalGeneration": ("qwen2_5_vl", "Qwen2_5_VL"),
}

#: ``model_type`` of a checkpoint's config.json: class of FAMILIES it is loaded as.
CHECKPOINTS: dict[str, str] = {
    "internvl": "InternVLForConditionalGeneration",
    "internvl_chat": "InternVLForConditionalGeneration",
    "llava_qwen": "LlavaVideoForConditionalGeneration",
    "llava_video": "LlavaVideoForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
}


def architecture_of(model: Any) -> Architecture:
    """Return the family's view of a loaded model, or raise `UnsupportedModelError`."""
    for cls in type(model).__mro__:
        if cls.__name__ in FAMILIES:
            return _family(cls.__name__)(model)
    raise UnsupportedModelError(
        f"{type(model).__name__} is not supported. Supported classes: {', '.join(FAMILIES)}."
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
    UnsupportedModelError
        No family loads this kind of checkpoint.
    """
    folder, family = _resolve(path_or_id)
    if device is not None and device_map is not None:
        raise OptionError("Give either device or device_map, not both.")
    if device_map is None:
        device_map = str(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = family.load_model(folder, _dtype(dtype), device_map, attn_implementation)
    return model.eval()


def load_processor(path_or_id: str | Path) -> Any:
    """Load the processor of a checkpoint of a supported family."""
    folder, family = _resolve(path_or_id)
    return family.load_processor(folder)


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


def _family(class_name: str) -> type[Architecture]:
    family, name = FAMILIES[class_name]
    return getattr(import_module(f"..{family}.architecture", __package__), name)


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
