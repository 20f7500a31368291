"""The tiny models, opened once, and short needle videos to ask them about."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

import flexselect
from flexselect.evaluation.needle import Recipe
from flexselect.testbed.locate import checkpoint_folder

#: As long as the shortest training clip's half: nothing to select from, quick to render.
SHORT = Recipe("validation", frames=8, videos=4)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where needle videos are rendered, for this process and those it starts."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEXSELECT_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def videos(cache: Path) -> list[Path]:
    """Videos of eight pictures."""
    return [SHORT.render(index) for index in range(SHORT.videos)]


@pytest.fixture(scope="session", params=["internvl", "qwen2_5_vl"])
def tiny(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """Model and processor of each family that has a tiny checkpoint."""
    folder = checkpoint_folder(request.param)
    model = flexselect.load_model(folder, dtype="float32", device="cpu")
    return model, flexselect.load_processor(folder)


@pytest.fixture
def own_accelerate() -> Iterator[None]:
    """Let a test use accelerate without leaving its global state to the next one."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
