"""open_video on real and damaged files: what it makes equals the stock path."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import flexselect
from flexselect import FlexSelect, Full
from flexselect.inference.video import BACKENDS, probe, read_frames
from flexselect.tests.architectures.factories import unpatched_positions
from flexselect.tests.paths import MEDIA, SMALL_MEDIA, needs_media

from .films import (
    KNOBS,
    PICTURES,
    QUESTION,
    RATE,
    SIZE,
    damage,
    messages,
    open_clip,
    stock_features,
    stock_inputs,
)

SMALL = ["h265_video.mp4", "unordered.mov", "video_90.mov"]
LARGE = ["corrupted.mp4", "flipping_a_pancake.mkv", "nasa_13013.mp4"]


@pytest.mark.parametrize(
    "path",
    [pytest.param(SMALL_MEDIA / name, id=name) for name in SMALL]
    + [pytest.param(MEDIA / name, id=name, marks=needs_media) for name in LARGE],
)
def test_every_real_file_is_answered(stock: Any, processor: Any, path: Path) -> None:
    info = probe(path)
    video = flexselect.open_video(stock, processor, path, method=FlexSelect(budget=1), **SIZE)
    answer = video.ask(QUESTION, max_new_tokens=3)
    selection, per_frame = answer.selection, video.clip.rows * video.clip.columns
    assert len(answer.ids) == 3
    assert isinstance(answer.text, str)
    assert str(answer) == answer.text
    # The family rounds the budget up to a whole frame.
    assert len(selection.kept) == per_frame
    assert selection.num_visual == video.clip.frames * per_frame
    assert bool((selection.kept.diff() > 0).all())
    assert int(selection.kept[0]) >= 0
    assert int(selection.kept[-1]) < selection.num_visual
    assert bool((video.times.diff() > 0).all())
    assert float(video.times[0]) >= 0
    assert float(video.times[-1]) < info.duration
    assert answer.moments
    for moment in answer.moments:
        assert 0 <= moment.start < moment.end
        assert moment.start < info.duration
    height, width = video.record["picture_size"]
    assert (height > width) == (info.height > info.width)
    json.dumps(selection.settings)


def test_the_record_says_what_decided_the_answer(opened: flexselect.Video, clip: Path) -> None:
    settings = opened.ask(QUESTION, max_new_tokens=1).selection.settings
    assert settings.pop("duration") == pytest.approx(PICTURES / RATE)
    assert settings == {
        "method": "flexselect",
        **KNOBS,
        "selector": None,
        "aggregation": "max",
        "query": "all",
        "positions": "original",
        "sets_per_batch": None,
        "family": "qwen2_5_vl",
        "model": "",
        "preset": "qwen2_5_vl",
        "dtype": "float32",
        "attention": "sdpa",
        "flexselect": flexselect.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "video": str(clip),
        "pictures": 24,
        "pictures_lost": 0,
        "frames": 12,
        "picture_size": [32, 40],
        "sampling": {"fps": RATE, "min_frames": 4, "max_frames": 1024, **SIZE},
        "backend": "pyav",
        "question": QUESTION,
    }


def test_no_moment_ends_after_the_video(stock: Any, processor: Any) -> None:
    """Times 0.0 and 0.6 of a video of 1.0 s: the second frame is not shown until 1.2 s."""
    path = SMALL_MEDIA / "h265_video.mp4"
    method = FlexSelect(budget=1, frames_per_set=1)
    video = flexselect.open_video(stock, processor, path, method=method, **SIZE)
    for question in "abcdefgh":
        answer = video.ask(question, max_new_tokens=1)
        assert all(moment.end <= 1.0 + 1e-6 for moment in answer.moments)


# -- the stock path --------------------------------------------------------------------------------


@pytest.mark.parametrize("frames_per_chunk", [1, 2, 5, 32])
@pytest.mark.parametrize(
    ("sampling", "indices"),
    [
        pytest.param({"fps": RATE}, range(24), id="every-picture"),
        pytest.param({"frames": 8}, [0, 3, 7, 10, 13, 16, 20, 23], id="number"),
        pytest.param({"fps": 1}, [0, 5, 9, 14, 18, 23], id="rate"),
    ],
)
def test_a_stream_of_chunks_equals_the_processor_and_the_tower_at_once(
    stock: Any,
    processor: Any,
    clip: Path,
    sampling: dict[str, Any],
    indices: Any,
    frames_per_chunk: int,
) -> None:
    video = flexselect.open_video(
        stock, processor, clip, frames_per_chunk=frames_per_chunk, **sampling, **SIZE
    )
    indices = list(indices)
    size = tuple(video.record["picture_size"])
    [part] = read_frames(clip, indices, size=size)
    inputs = stock_inputs(processor, part.frames, fps=len(indices) / (PICTURES / RATE))
    encoded = video.encoded(messages(QUESTION), 0)
    [request] = flexselect.architecture_of(stock).read(inputs)
    assert torch.equal(encoded.prompt.layout.ids, inputs["input_ids"][0])
    for name in ("video", "frame", "visual", "feature", "query"):
        ours, theirs = (getattr(p.layout, name) for p in (encoded.prompt, request.prompt))
        assert torch.equal(ours, theirs), name
    assert encoded.prompt.videos == (video.clip,)
    seconds = float(inputs["second_per_grid_ts"][0])
    assert video.clip.seconds_per_frame == pytest.approx(seconds)
    assert replace(video.clip, seconds_per_frame=seconds) == request.prompt.videos[0]
    torch.testing.assert_close(
        video.features.model, stock_features(stock, inputs), rtol=1e-5, atol=1e-5
    )
    assert video.times.tolist() == pytest.approx([index / RATE for index in indices[::2]])


@pytest.mark.parametrize("lite", [False, True], ids=["self", "lite"])
def test_asking_equals_apply_and_generate(
    model: Any, processor: Any, clip: Path, selector_folder: Path, lite: bool
) -> None:
    more: Any = {"selector": selector_folder, "layer": None} if lite else {}
    flexselect.apply(model, **{**KNOBS, **more})
    video = flexselect.open_video(model, processor, clip, fps=RATE, frames_per_chunk=5, **SIZE)
    [part] = read_frames(clip, range(PICTURES), size=tuple(video.record["picture_size"]))
    inputs = stock_inputs(processor, part.frames, fps=RATE)
    prompt = inputs["input_ids"].shape[1]
    for beams in (1, 3):
        options: Any = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams}
        out = model.generate(**inputs, **options)
        [theirs] = model.flexselect.selections
        answer = video.ask(QUESTION, **options)
        assert torch.equal(answer.ids, out[0, prompt:])
        assert torch.equal(answer.selection.kept, theirs.kept)
        torch.testing.assert_close(answer.selection.scores, theirs.scores, rtol=1e-4, atol=1e-5)
        assert len(theirs.kept) < theirs.num_visual


def test_full_equals_the_unpatched_model(stock: Any, processor: Any, clip: Path) -> None:
    video = open_clip(stock, processor, clip, method=Full())
    [part] = read_frames(clip, range(PICTURES), size=tuple(video.record["picture_size"]))
    inputs = stock_inputs(processor, part.frames, fps=RATE)
    out = stock.generate(
        **inputs,
        position_ids=unpatched_positions(stock, inputs),
        max_new_tokens=8,
        do_sample=False,
    )
    answer = video.ask(QUESTION, max_new_tokens=8)
    assert torch.equal(answer.ids, out[0, inputs["input_ids"].shape[1] :])
    assert len(answer.selection.kept) == answer.selection.num_visual
    # Nothing was ranked to keep it, but some of it was looked at more than the rest.
    assert answer.selection.scores is None
    assert answer.moments


# -- damage ----------------------------------------------------------------------------------------


def check_pairs_of_survivors(video: flexselect.Video, processor: Any, path: Path) -> None:
    """Pairs are of the pictures that decoded, in order; an odd last one is paired with itself."""
    info = probe(path)
    parts = list(
        read_frames(info, range(info.num_frames), size=tuple(video.record["picture_size"]))
    )
    pictures = torch.cat([part.frames for part in parts])
    stamps = np.concatenate([part.timestamps for part in parts])
    assert video.record["pictures"] == len(pictures)
    assert video.record["pictures_lost"] == info.num_frames - len(pictures) > 0
    assert video.clip.frames == -(-len(pictures) // 2) == len(video.times)
    decoded = np.concatenate([part.indices for part in parts])
    assert video.pictures.tolist() == decoded.tolist()
    np.testing.assert_allclose(video.times.numpy(), stamps[::2])
    features = stock_features(video.engine.model, stock_inputs(processor, pictures, fps=info.fps))
    torch.testing.assert_close(video.features.model, features, rtol=1e-5, atol=1e-5)
    answer = video.ask(QUESTION, max_new_tokens=2)
    assert answer.selection.num_visual == len(features)
    assert len(answer.ids) == 2


@pytest.mark.parametrize("frames_per_chunk", [1, 3, 32])
@pytest.mark.parametrize("lost", [[5], [0, 1, 2], [6, 7, 13, 22], [23]], ids=str)
def test_pictures_lost_to_damage(
    stock: Any,
    processor: Any,
    clip: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    lost: list[int],
    frames_per_chunk: int,
) -> None:
    path = damage(clip, tmp_path / "damaged.mp4", lost)
    video = open_clip(stock, processor, path, frames_per_chunk=frames_per_chunk)
    assert video.report.lost.tolist() == lost
    assert f"{len(lost)} of 24 requested frames could not be decoded" in caplog.text
    check_pairs_of_survivors(video, processor, path)


def test_a_decoder_may_deliver_in_uneven_parts(
    stock: Any, processor: Any, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def uneven(info: Any, indices: Any, chunk: int) -> Iterator[Any]:
        for part in np.split(indices[indices != 4], [1, 4, 6, 11, 12, 19]):
            [frames] = read_frames(info, part)
            yield part, frames.frames.permute(0, 2, 3, 1)

    monkeypatch.setitem(BACKENDS, "uneven", uneven)
    video = open_clip(stock, processor, clip, backend="uneven")
    path = clip.with_name("without-4.mp4")
    even = open_clip(stock, processor, damage(clip, path, [4]))
    assert video.report.lost.tolist() == [4]
    assert video.clip == even.clip
    assert torch.equal(video.times, even.times)
    torch.testing.assert_close(video.features.model, even.features.model, rtol=1e-5, atol=1e-5)


@needs_media
def test_a_really_damaged_file(stock: Any, processor: Any) -> None:
    path = MEDIA / "corrupted.mp4"
    video = open_clip(stock, processor, path, fps=None, frames=50, frames_per_chunk=4)
    assert (video.record["pictures"], video.clip.frames) == (49, 25)
    check_pairs_of_survivors(video, processor, path)


@pytest.mark.parametrize("where", ["decode", "prepare", "encode"])
def test_an_interrupted_opening_leaves_no_thread_and_no_open_file(
    stock: Any, processor: Any, clip: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """While the error is still held, as a notebook holds the last one."""

    def stop(stage: str, *_: Any) -> None:
        if stage == where:
            raise KeyboardInterrupt

    if where == "prepare":
        monkeypatch.setattr(
            type(processor.video_processor), "__call__", lambda *_, **__: stop(where)
        )
    with pytest.raises(KeyboardInterrupt) as held:
        open_clip(stock, processor, clip, frames_per_chunk=2, progress=stop)
    assert held.value.__traceback__ is not None
    assert not [t.name for t in threading.enumerate() if t.name.startswith("flexselect")]
    assert clip not in open_files()


def open_files() -> list[Path]:
    """Files that this process has open; empty where the system does not tell."""
    folder = Path("/proc/self/fd")
    names = list(folder.iterdir()) if folder.exists() else []
    return [name.readlink() for name in names if name.is_symlink()]


# -- memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames_per_chunk", [32, 8])
def test_a_stream_is_halved_where_the_device_is_too_small(
    model: Any,
    processor: Any,
    clip: Path,
    opened: flexselect.Video,
    caplog: pytest.LogCaptureFixture,
    frames_per_chunk: int,
) -> None:
    tried: list[int] = []

    def tower(module: Any, args: Any, kwargs: Any) -> None:
        tried.append(int(kwargs["grid_thw"][0, 0]))
        if tried[-1] > 3:
            raise torch.OutOfMemoryError("out of memory")

    model.model.visual.register_forward_pre_hook(tower, with_kwargs=True)
    with caplog.at_level(logging.WARNING, logger="flexselect"):
        video = open_clip(model, processor, clip, frames_per_chunk=frames_per_chunk)
    torch.testing.assert_close(video.features.model, opened.features.model, rtol=1e-5, atol=1e-5)
    too_many = [frames for frames in tried if frames > 3]
    assert len(too_many) == len(caplog.records) == {32: 2, 8: 2}[frames_per_chunk]
    assert "Out of device memory" in caplog.text
    assert sum(frames for frames in tried if frames <= 3) == 12
