"""The tiny trained models, loaded once for all tests of this folder."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from flexselect.core.architecture import Architecture
from flexselect.core.errors import CheckpointError
from flexselect.inference.registry import architecture_of, load_model, load_processor
from flexselect.testbed.locate import FAMILIES, checkpoint_folder

FRAMES = 16

families = pytest.mark.parametrize("family", FAMILIES)


@cache
def tiny(family: str) -> tuple[Architecture, Any]:
    """Return a tiny model's architecture, in float32, and its processor."""
    try:
        folder = checkpoint_folder(family)
    except CheckpointError as error:
        pytest.skip(str(error))
    return architecture_of(load_model(folder, "float32", device="cpu")), load_processor(folder)
