"""What can be wrong with a file, an option or a question is named, with what to do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import flexselect
from flexselect import FlexSelect, OptionError, VideoError
from flexselect.inference.engine import Engine
from flexselect.tests.paths import SMALL_MEDIA

from .films import (
    PICTURES,
    QUESTION,
    RATE,
    SIZE,
    Watch,
    damage,
    film,
    open_clip,
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": 0}, "fps must be positive"),
        ({"fps": -2.5}, "fps must be positive"),
        ({"fps": float("nan")}, "fps must be positive and finite, got nan"),
        ({"fps": float("inf")}, "fps must be positive and finite"),
        ({"fps": "2"}, "fps must be a number, got '2'"),
        ({"fps": 1, "frames": 4}, "either fps or frames"),
        ({"frames": 0}, "frames must be positive"),
        ({"frames": 1}, "frames must be at least 2"),
        ({"frames": 2.5}, "frames must be a whole number"),
        ({"frames": True}, "frames must be a whole number"),
        ({"frames": 4, "max_frames": 8}, "leave out max_frames"),
        ({"min_frames": 8, "max_frames": 4}, r"max_frames \(4\) is below min_frames \(8\)"),
        ({"min_pixels": 900, "max_pixels": 800}, r"max_pixels \(800\) is below min_pixels \(900\)"),
        ({"max_pixels": 60}, "max_pixels"),
        ({"frame": 4}, r"Unknown options \['frame'\].*'frames'"),
        ({"nframes": 4, "do_resize": False}, "do_resize.*nframes"),
        ({"backend": "opencv"}, "backend must be one of pyav, decord, torchcodec, got 'opencv'"),
        ({"frames_per_chunk": 0}, "frames_per_chunk must be a whole number of at least 1, got 0"),
        ({"frames_per_chunk": 1.5}, "frames_per_chunk must be a whole number"),
        ({"method": FlexSelect(budget=0)}, "budget must be at least 1"),
        ({"method": FlexSelect(budget=-5)}, "budget must be at least 1"),
        ({"method": FlexSelect(layer=99)}, "layer must be a whole number from 0 to 3"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_out_of_range(
    stock: Any, processor: Any, clip: Path, watch: Watch, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        flexselect.open_video(stock, processor, clip, **options)
    assert watch.calls == 0


def test_bounds_that_the_preset_would_ignore(
    stock: Any, processor: Any, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some presets look at a fixed number of pictures, which a bound does not bound."""
    engine = Engine(stock, FlexSelect())
    preset = replace(engine.preset, name="fixed", video={"frames": 16})
    monkeypatch.setattr("flexselect.inference.engine.preset_of", lambda _: preset)
    with pytest.raises(OptionError, match=r"max_frames bound fps.*fixed looks at 16 pictures"):
        flexselect.open_video(stock, processor, clip, max_frames=8)
    video = flexselect.open_video(stock, processor, clip, fps=RATE, max_frames=8, **SIZE)
    assert video.record["pictures"] == 8
    assert video.record["sampling"] == {"fps": RATE, "max_frames": 8, **SIZE}


def test_as_many_pictures_as_there_are_though_odd(stock: Any, processor: Any) -> None:
    path = SMALL_MEDIA / "video_90.mov"
    video = flexselect.open_video(stock, processor, path, frames=3, **SIZE)
    assert video.record["pictures"] == 2


@pytest.mark.parametrize(
    ("thing", "message"),
    [(None, "got NoneType"), ("tokenizer", "must be the model's processor.*load_processor")],
)
def test_something_else_for_a_processor(
    stock: Any, processor: Any, clip: Path, thing: Any, message: str
) -> None:
    thing = processor.tokenizer if thing == "tokenizer" else thing
    with pytest.raises(OptionError, match=message):
        flexselect.open_video(stock, thing, clip)


def test_a_processor_without_a_chat_template(stock: Any, processor: Any, clip: Path) -> None:
    bare = copy.deepcopy(processor)
    bare.chat_template = None
    with pytest.raises(OptionError, match="no chat template"):
        flexselect.open_video(stock, bare, clip)


def text_file(folder: Path, clip: Path) -> Path:
    path = folder / "notes.mp4"
    path.write_text("Not a video.\n" * 50)
    return path


FILES: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "missing": (lambda folder, clip: folder / "absent.mp4", r"absent\.mp4: no such file"),
    "folder": (lambda folder, clip: folder, "found a directory"),
    "text": (text_file, r"notes\.mp4: not a readable video.*another file"),
    "nothing-decodes": (
        lambda folder, clip: damage(clip, folder / "noise.mp4", list(range(PICTURES))),
        r"noise\.mp4: none of its 24 frames decodes",
    ),
    "one-picture": (
        lambda folder, clip: film(folder / "photo.mp4", 1),
        r"photo\.mp4: The video has 1 picture.*at least 2",
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_that_cannot_be_asked(
    stock: Any, processor: Any, clip: Path, tmp_path: Path, kind: str
) -> None:
    make, message = FILES[kind]
    with pytest.raises(VideoError, match=message):
        flexselect.open_video(stock, processor, make(tmp_path, clip), fps=RATE, **SIZE)


def test_a_video_of_which_one_picture_is_left(
    stock: Any, processor: Any, clip: Path, tmp_path: Path
) -> None:
    path = damage(clip, tmp_path / "holes.mp4", [*range(1, PICTURES)])
    video = open_clip(stock, processor, path)
    assert (video.clip.frames, video.record["pictures_lost"]) == (1, 23)
    assert len(video.ask(QUESTION, max_new_tokens=2).ids) == 2
