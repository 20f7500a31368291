"""Qwen2.5-VL's choice of pictures and sizes: that of qwen-vl-utils, and what it stumbles over."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from qwen_vl_utils import vision_process

import flexselect
from flexselect.core.errors import OptionError, VideoError
from flexselect.qwen2_5_vl.prepare import picture_size, sample_pictures
from flexselect.tests.architectures.factories import FAMILIES
from flexselect.tests.inference.session.films import film

FACTOR = 28
FAMILY = next(family for family in FAMILIES if family.name == "qwen2_5_vl")


@given(count=st.integers(2, 300), frames=st.integers(2, 300))
@example(count=3, frames=3)
@example(count=5, frames=3)
@example(count=100, frames=7)
def test_never_more_pictures_than_asked_or_there(count: int, frames: int) -> None:
    indices = sample_pictures(count, 30.0, {"frames": frames}).tolist()
    assert len(indices) == min(frames, count) // 2 * 2
    assert indices[0] == 0
    assert indices[-1] == count - 1
    assert all(a < b for a, b in pairwise(indices))


@given(
    count=st.integers(2, 500),
    fps=st.floats(0.1, 8),
    least=st.integers(1, 40),
    more=st.integers(0, 40),
)
def test_a_rate_stays_between_its_bounds(count: int, fps: float, least: int, more: int) -> None:
    most = max(2, least + more)
    sampling = {"fps": fps, "min_frames": least, "max_frames": most}
    indices = sample_pictures(count, 8.0, sampling).tolist()
    assert len(indices) % 2 == 0
    assert 2 <= len(indices) <= min(most, count)
    # A pair more than asked for at the least, where an even number fits between the bounds.
    assert len(indices) >= min(least, count // 2 * 2, most // 2 * 2)


def test_a_rate_gives_what_qwen_vl_utils_gives() -> None:
    sampling = {"fps": 2, "min_frames": 4, "max_frames": 1024}
    for count, rate in [(900, 30.0), (24, 4.0), (61, 29.97), (100_000, 25.0)]:
        wanted = {**sampling, "max_frames": min(1024, count)}
        number = vision_process.smart_nframes(wanted, total_frames=count, video_fps=rate)
        assert len(sample_pictures(count, rate, sampling)) == number


def test_one_picture_is_too_few() -> None:
    with pytest.raises(VideoError, match=r"1 picture.*at least 2"):
        sample_pictures(1, 30.0, {"frames": 2})


@pytest.mark.parametrize(("pictures", "frames", "read"), [(3, 3, 2), (5, 3, 2), (5, 5, 4)])
def test_odd_numbers_of_real_pictures(
    tmp_path: Path, pictures: int, frames: int, read: int
) -> None:
    path = film(tmp_path / "short.mp4", pictures)
    limits: Any = {"min_pixels": 768, "max_pixels": 1536}
    video = flexselect.open_video(FAMILY.model(), FAMILY.processor(), path, frames=frames, **limits)
    assert video.record["pictures"] == read
    assert video.clip.frames == read // 2


# -- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pictures", [2, 64, 512, 1024])
@pytest.mark.parametrize("limits", [{}, {"max_pixels": 200_000}, {"min_pixels": 150_000}])
def test_sizes_are_those_of_qwen_vl_utils(pictures: int, limits: dict[str, int]) -> None:
    least = limits.get("min_pixels", 128 * FACTOR**2)
    shared = vision_process.MODEL_SEQ_LEN * FACTOR**2 * 0.9 / pictures * 2
    most = max(min(768 * FACTOR**2, shared), int(least * 1.05))
    most = min(most, limits.get("max_pixels", most))
    for height, width in [(720, 1280), (1920, 1080), (64, 64), (100, 2000)]:
        size = picture_size(height, width, pictures, FACTOR, limits)
        assert size == vision_process.smart_resize(
            height, width, factor=FACTOR, min_pixels=int(least), max_pixels=int(most)
        )


@given(
    height=st.integers(16, 3000),
    width=st.integers(16, 3000),
    pictures=st.integers(2, 1024),
    limit=st.integers(FACTOR**2, 128 * FACTOR**2 - 1),
)
@example(height=16, width=16, pictures=2, limit=785)
@example(height=309, width=309, pictures=2, limit=784)
def test_a_size_is_within_its_maximum_or_refused(
    height: int, width: int, pictures: int, limit: int
) -> None:
    try:
        h, w = picture_size(height, width, pictures, FACTOR, {"max_pixels": limit})
    except VideoError:
        # The shorter side would be less than a token, whatever keeps the shape.
        scale = (limit / (height * width)) ** 0.5
        assert min(height, width) * scale < FACTOR
        return
    assert h > 0
    assert w > 0
    assert h % FACTOR == w % FACTOR == 0
    assert h * w <= limit


def test_a_maximum_alone_lowers_the_usual_minimum() -> None:
    # 128 visual tokens are usual: 100352 pixels.
    h, w = picture_size(480, 640, 16, FACTOR, {"max_pixels": 50_176})
    assert FACTOR**2 < h * w <= 50_176
    with pytest.raises(OptionError, match=r"max_pixels \(50176\) is below min_pixels \(60000\)"):
        picture_size(480, 640, 16, FACTOR, {"max_pixels": 50_176, "min_pixels": 60_000})


def test_less_than_one_token() -> None:
    assert picture_size(480, 480, 16, FACTOR, {"max_pixels": 784}) == (28, 28)
    with pytest.raises(OptionError, match=r"max_pixels \(783\).*28 x 28 = 784 pixels"):
        picture_size(480, 480, 16, FACTOR, {"max_pixels": 783})


@pytest.mark.parametrize(("height", "width"), [(16, 4096), (4096, 16)])
def test_pictures_too_narrow_for_the_model(height: int, width: int) -> None:
    with pytest.raises(VideoError, match=rf"{width} x {height} pixels.*at most 200 times"):
        picture_size(height, width, 16, FACTOR, {})


def test_pictures_that_would_be_less_than_a_token_high() -> None:
    with pytest.raises(VideoError, match=r"4096 x 28 pixels.*less than the 28.*Raise max_pixels"):
        picture_size(28, 4096, 16, FACTOR, {"max_pixels": 50_176})


def test_a_narrow_film(tmp_path: Path) -> None:
    path = film(tmp_path / "banner.mp4", 4, height=16, width=4096)
    with pytest.raises(VideoError, match="4096 x 16 pixels"):
        flexselect.open_video(FAMILY.model(), FAMILY.processor(), path, fps=4)
