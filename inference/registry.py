"""Which family a model belongs to. A family's folder is imported only when its model comes."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ..core.architecture import Architecture
from ..core.errors import UnsupportedModelError

#: Class of a loaded model: (family, name of its `Architecture`).
FAMILIES: dict[str, tuple[str, str]] = {
    "Qwen2_5_VLForConditionalGeneration": ("qwen2_5_vl", "Qwen2_5_VL"),
}


def architecture_of(model: Any) -> Architecture:
    """Return the family's view of a loaded model, or raise `UnsupportedModelError`."""
    for cls in type(model).__mro__:
        if cls.__name__ in FAMILIES:
            family, name = FAMILIES[cls.__name__]
            module = import_module(f"..{family}.architecture", __package__)
            return getattr(module, name)(model)
    raise UnsupportedModelError(
        f"{type(model).__name__} is not supported. Supported classes: {', '.join(FAMILIES)}."
    )
