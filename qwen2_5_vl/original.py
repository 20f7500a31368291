"""A published Lite selector's keys in this project's terms, as a pure function."""

from __future__ import annotations

from torch import Tensor

from ..core.checkpoint import rename_prefix

#: Only the first rule that fits counts.
_SELECTOR_KEYS = {
    "merger_token_selector.": "projector.",
    "": "language_model.",
}


def selector_tensor(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """Rename one tensor of a published Lite selector; see `core.checkpoint.Convert`.

    The stored model is a Qwen2 without a head, with a merger of its own. Here the Qwen2 is
    ``language_model`` and the merger ``projector``.
    """
    return [(rename_prefix(name, _SELECTOR_KEYS), tensor)]
