"""Qwen3-VL's choice of pictures and sizes: that of the stock video processor."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import Qwen3VLVideoProcessor
from transformers.video_utils import VideoMetadata

from flexselect.core.errors import OptionError, PromptError, VideoError
from flexselect.core.layout import Clip
from flexselect.qwen3_vl.prepare import MOST_PIXELS, expand_prompt, picture_size, sample_pictures
from flexselect.tests.architectures.factories import FAMILIES

FACTOR = 32
[FAMILY] = [family for family in FAMILIES if family.name == "qwen3_vl"]


@pytest.mark.parametrize(("count", "rate"), [(900, 30.0), (24, 4.0), (61, 29.97), (100_000, 25.0)])
def test_a_rate_gives_what_the_stock_processor_gives(count: int, rate: float) -> None:
    metadata = VideoMetadata(total_num_frames=count, fps=rate)
    expected = Qwen3VLVideoProcessor().sample_frames(metadata)
    chosen = sample_pictures(count, rate, {"fps": 2, "min_frames": 4, "max_frames": 768})
    assert chosen.tolist() == expected.tolist()


@given(count=st.integers(2, 300), frames=st.integers(2, 300))
@example(count=3, frames=3)
def test_never_more_pictures_than_asked_or_there(count: int, frames: int) -> None:
    indices = sample_pictures(count, 30.0, {"frames": frames}).tolist()
    assert len(indices) == min(frames, count)
    assert (indices[0], indices[-1]) == (0, count - 1)
    assert all(a < b for a, b in pairwise(indices))


def test_one_picture_is_too_few() -> None:
    with pytest.raises(VideoError, match=r"1 picture.*at least 2"):
        sample_pictures(1, 30.0, {"frames": 2})


@pytest.mark.parametrize("pictures", [2, 6, 64, 768])
@pytest.mark.parametrize(("height", "width"), [(720, 1280), (64, 48), (1081, 333)])
def test_a_size_is_the_stock_processors_for_the_whole_video(
    pictures: int, height: int, width: int
) -> None:
    """With the limits that are released with the checkpoints."""
    processor = Qwen3VLVideoProcessor(
        size={"shortest_edge": 4096, "longest_edge": MOST_PIXELS}, cap_pixels_per_frame=False
    )
    patches = processor.get_num_of_video_patches(pictures, height, width)
    rows, columns = picture_size(height, width, pictures, FACTOR, {})
    assert rows % FACTOR == columns % FACTOR == 0
    assert (rows // 16) * (columns // 16) * -(-pictures // 2) == patches
    assert rows * columns * pictures <= MOST_PIXELS * 1.01


@given(
    height=st.integers(32, 2000),
    width=st.integers(32, 2000),
    pictures=st.integers(2, 768),
    most=st.integers(16, 700),
)
def test_limits_are_of_one_picture(height: int, width: int, pictures: int, most: int) -> None:
    if max(height, width) > 4 * min(height, width):
        return
    size = picture_size(height, width, pictures, FACTOR, {"max_pixels": most * FACTOR**2})
    # A pair is counted for an odd last picture.
    assert size[0] * size[1] <= most * FACTOR**2 * (1 + 1 / pictures) + FACTOR**2
    larger = picture_size(height, width, pictures, FACTOR, {"min_pixels": most * FACTOR**2})
    # Rounded down by less than a token on each side.
    assert larger[0] * larger[1] >= most * FACTOR**2 * (1 - 1 / pictures) - FACTOR * sum(larger)


def test_a_minimum_goes_past_what_the_video_has_in_all() -> None:
    free = picture_size(720, 1280, 768, FACTOR, {})
    least = picture_size(720, 1280, 768, FACTOR, {"min_pixels": 131_072})
    assert free[0] * free[1] * 768 <= MOST_PIXELS < least[0] * least[1] * 768
    assert least[0] * least[1] >= 131_072 - FACTOR * sum(least)


def test_sizes_that_cannot_be() -> None:
    with pytest.raises(OptionError, match=r"max_pixels \(100\) is less than one visual token"):
        picture_size(720, 1280, 8, FACTOR, {"max_pixels": 100})
    with pytest.raises(VideoError, match="at most 200 times"):
        picture_size(40, 10_000, 8, FACTOR, {})


def test_as_many_videos_as_places() -> None:
    processor = FAMILY.processor()
    with pytest.raises(PromptError, match="0 places for a video, but there are 1"):
        expand_prompt(processor, "No video.", [Clip(2, 3, 4)])


def test_stamps_are_written_as_they_are_given() -> None:
    processor = FAMILY.processor()
    clip = Clip(3, 3, 4, stamps=(0.26, 61.04, 3600.0))
    ids = expand_prompt(processor, "<|video_pad|>", [clip])
    text = processor.tokenizer.decode(ids[ids != processor.video_token_id])
    frame = "<|vision_start|><|vision_end|>"
    assert text == f"<0.3 seconds>{frame}<61.0 seconds>{frame}<3600.0 seconds>{frame}"
    assert int((ids == processor.video_token_id).sum()) == 36
    assert ids.dtype == torch.long
