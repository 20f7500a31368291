"""The entry point by which lmms-eval finds the plug-in; kept light, it loads at every start.

``python -m lmms_eval --model flexselect_qwen2_5_vl --model_args pretrained=… --tasks …``
"""

from __future__ import annotations

from typing import Any

#: Name in ``--model``: class in `.model`.
MODELS = {
    "flexselect_internvl": "InternVLModel",
    "flexselect_llava_video": "LlavaVideoModel",
    "flexselect_qwen2_5_vl": "Qwen2_5_VLModel",
    "flexselect_qwen3_vl": "Qwen3VLModel",
}

#: Shorter names that ``--model`` also takes.
_ALIASES = {
    "flexselect_llava_video": ("flexselect_llava",),
    "flexselect_qwen2_5_vl": ("flexselect_qwen",),
}


def manifests() -> list[Any]:
    """Say what there is to load; no model code is imported for it."""
    # Importing this asks for our manifests already, so it cannot stand at the top.
    from lmms_eval.models.registry_v2 import ModelManifest

    folder = __package__
    return [
        ModelManifest(
            name, chat_class_path=f"{folder}.model.{loaded}", aliases=_ALIASES.get(name, ())
        )
        for name, loaded in MODELS.items()
    ]
