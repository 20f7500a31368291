"""A needle video, the tiny trained models that read it, and the video opened by each."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

import flexselect
from flexselect.testbed.locate import checkpoint_folder
from flexselect.testbed.videos import NeedleVideo, make_needle_video

#: Visual tokens that may stay of 128 (Qwen2.5-VL) or 384 (InternVL).
BUDGET = 16
FRAMES = 64


@cache
def loaded(family: str) -> tuple[Any, Any]:
    """(model, processor) of a family's tiny checkpoint."""
    folder = checkpoint_folder(family)
    return flexselect.load_model(folder), flexselect.load_processor(folder)


@pytest.fixture(scope="package")
def needle_video(tmp_path_factory: pytest.TempPathFactory) -> NeedleVideo:
    path = tmp_path_factory.mktemp("seeing") / "film.mp4"
    return make_needle_video(
        path, split="validation", index=3, frames=FRAMES, tasks=["number", "colour"]
    )


def open_with(family: str, path: Path, method: Any = None) -> flexselect.Video:
    model, processor = loaded(family)
    chosen = flexselect.FlexSelect(budget=BUDGET) if method is None else method
    return flexselect.open_video(model, processor, path, method=chosen, frames=FRAMES)


@pytest.fixture(scope="package")
def opened(needle_video: NeedleVideo) -> flexselect.Video:
    """Opened by the tiny Qwen2.5-VL: 32 frames of 2 × 2 tokens."""
    return open_with("qwen2_5_vl", needle_video.path)


@pytest.fixture(scope="package")
def opened_with_tags(needle_video: NeedleVideo) -> flexselect.Video:
    """Opened by the tiny InternVL: 64 frames of 2 × 2 tokens between two tags."""
    return open_with("internvl", needle_video.path)


@pytest.fixture(scope="package")
def answered(opened: flexselect.Video, needle_video: NeedleVideo) -> flexselect.Answer:
    return opened.ask(needle_video.questions[0].text)
