"""Exactly the requested frames come back: every frame of these films carries its number."""

import importlib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexselect.core.errors import OptionError, VideoError
from flexselect.inference.video import VideoInfo, probe, read_frames, sample_fps, sample_uniform
from flexselect.inference.video.pyav import plan

FRAMES = 90
CELL = 16
ROWS, COLUMNS = 3, 4


def picture(number: int) -> np.ndarray:
    """Black and white cells that spell `number` in binary, the lowest bit first."""
    bits = np.array([number >> bit & 1 for bit in range(ROWS * COLUMNS)]).reshape(ROWS, COLUMNS)
    cells = np.kron(bits, np.ones((CELL, CELL), dtype=np.int64))
    return np.repeat((cells * 215 + 20)[..., None], 3, axis=2).astype(np.uint8)


def numbers(frames: torch.Tensor) -> list[int]:
    """Read the numbers back from (n, 3, height, width)."""
    grey = frames.float().mean(1).reshape(-1, ROWS, CELL, COLUMNS, CELL).mean((2, 4))
    assert ((grey - 127.5).abs() > 40).all(), "a cell is neither black nor white"
    bits = (grey > 127.5).flatten(1).long()
    return (bits * (1 << torch.arange(ROWS * COLUMNS))).sum(1).tolist()


def film(path: Path, times: Sequence[int], *, codec: str = "libx264", **options: str) -> Path:
    """Write one numbered frame at each of `times`, in milliseconds."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = COLUMNS * CELL, ROWS * CELL, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


STEADY = [40 * number for number in range(FRAMES)]
# Long and short pauses in turn, as of a screen recording.
UNEVEN = np.cumsum([0] + [(20, 33, 250, 40, 100)[n % 5] for n in range(FRAMES - 1)]).tolist()

ORDINARY = {"g": "12", "bf": "0", "preset": "ultrafast", "sc_threshold": "0"}
# b_strategy 0 forces the B-frames that a clever encoder would leave out of such pictures.
B_FRAMES = {"g": "12", "bf": "3", "b_strategy": "0", "preset": "veryfast", "sc_threshold": "0"}
OPEN_GOP = {**B_FRAMES, "x264-params": "open-gop=1:b-pyramid=normal"}
FILMS = {
    "cfr.mp4": (STEADY, ORDINARY),
    "vfr.mp4": (UNEVEN, ORDINARY),
    "b_frames.mp4": (STEADY, B_FRAMES),
    "vfr_b_frames.mp4": (UNEVEN, B_FRAMES),
    "open_gop.mp4": (STEADY, OPEN_GOP),
    "one_keyframe.mkv": (STEADY, {**B_FRAMES, "g": "1000"}),
    "vfr.mkv": (UNEVEN, B_FRAMES),
    "stream.ts": (STEADY, B_FRAMES),
}


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> dict[str, VideoInfo]:
    folder = tmp_path_factory.mktemp("films")
    return {
        name: probe(film(folder / name, times, **options))
        for name, (times, options) in FILMS.items()
    }


def read(info: VideoInfo, indices: Sequence[int], **options: Any) -> torch.Tensor:
    """Read and check the numbers, indices and times of every chunk; return the pixels."""
    stream = read_frames(info, indices, **options)
    parts = list(stream)
    got = np.concatenate([part.indices for part in parts])
    assert got.tolist() == list(indices)
    assert stream.report.requested == stream.report.decoded == len(indices)
    assert not len(stream.report.lost)
    assert stream.report.message == ""
    times = np.concatenate([part.timestamps for part in parts])
    np.testing.assert_array_equal(times, info.timestamps[got])
    frames = torch.cat([part.frames for part in parts])
    assert frames.dtype == torch.uint8
    assert numbers(frames) == list(indices)
    return frames


@pytest.mark.parametrize("name", FILMS)
def test_probe_counts_and_times_every_frame(films: dict[str, VideoInfo], name: str) -> None:
    info, times = films[name], FILMS[name][0]
    assert info.num_frames == FRAMES
    assert (info.width, info.height) == (COLUMNS * CELL, ROWS * CELL)
    assert (info.rotation, info.codec, info.missing) == (0, "h264", 0)
    np.testing.assert_allclose(info.timestamps, np.array(times) / 1000, atol=1e-3)
    assert info.duration > info.timestamps[-1]
    assert info.fps == pytest.approx(FRAMES / info.duration)
    if times is STEADY:
        assert info.fps == pytest.approx(25, rel=1e-3)


@pytest.mark.parametrize("name", [name for name in FILMS if "b_frames" in name or "gop" in name])
def test_the_films_with_b_frames_are_stored_out_of_order(
    films: dict[str, VideoInfo], name: str
) -> None:
    assert (np.diff(films[name].index.pts) < 0).any()


@pytest.mark.parametrize("name", FILMS)
@pytest.mark.parametrize(
    "indices",
    [
        [0],
        [FRAMES - 1],
        [3, 40, 41, 88],
        [11, 12, 13, 23, 24, 25, 47, 48],
        list(range(0, FRAMES, 9)),
        list(range(FRAMES)),
    ],
    ids=["first", "last", "sparse", "around keyframes", "spread", "dense"],
)
def test_the_requested_frames_come_back(
    films: dict[str, VideoInfo], name: str, indices: list[int]
) -> None:
    read(films[name], indices)


@pytest.mark.parametrize("name", FILMS)
def test_seeking_and_chunking_change_no_pixel(films: dict[str, VideoInfo], name: str) -> None:
    info = films[name]
    everything = read(info, range(FRAMES), chunk=100)
    for chunk in (1, 3, 32):
        torch.testing.assert_close(read(info, range(FRAMES), chunk=chunk), everything)
    for start in range(0, 30, 7):
        sparse = list(range(start, FRAMES, 29))
        torch.testing.assert_close(read(info, sparse, chunk=2), everything[sparse], rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["decord", "torchcodec"])
@pytest.mark.parametrize("name", FILMS)
def test_other_backends_return_the_same_frames_or_refuse(
    films: dict[str, VideoInfo], name: str, backend: str
) -> None:
    needs(backend)
    info = films[name]
    if name == "stream.ts" or (name, backend) == ("open_gop.mp4", "decord"):
        with pytest.raises(VideoError, match=f"{backend} cannot decode.*other frames.*pyav"):
            next(read_frames(info, [12], backend=backend))
        return
    for indices in ([0, 3, 11, 12, 13, 40, 41, FRAMES - 1], [80], range(FRAMES)):
        ours = read(info, indices)
        theirs = read(info, indices, backend=backend, chunk=3)
        torch.testing.assert_close(theirs, ours, rtol=0, atol=2)


def needs(backend: str) -> None:
    """Skip where an optional backend cannot run."""
    module = {"decord": "decord", "torchcodec": "torchcodec.decoders"}[backend]
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        pytest.skip(f"{backend} is not usable here: {str(error).strip().splitlines()[0]}")


def test_a_request_reads_only_the_groups_it_needs(films: dict[str, VideoInfo]) -> None:
    index = films["b_frames.mp4"].index
    first, last = plan(index, np.array([2, 80]))
    assert first.start == 0
    assert index.keyframes[last.start]
    # Two groups of twelve pictures and no more, of ninety.
    assert (first.stop - first.start) + (last.stop - last.start) < 24
    (dense,) = plan(index, np.arange(FRAMES))
    assert (dense.start, dense.stop) == (0, FRAMES - 1)


def test_leading_pictures_start_at_the_keyframe_shown_before_them(
    films: dict[str, VideoInfo],
) -> None:
    index = films["open_gop.mp4"].index
    keys = np.flatnonzero(index.keyframes)
    first, _ = index.positions(index.frames)
    leading = [
        number
        for number in range(FRAMES)
        if index.pts[keys[keys <= first[number]][-1]] > index.frames[number]
    ]
    assert leading, "the encoder made no open group of pictures: the test is empty"
    for number in leading:
        (segment,) = plan(index, np.array([number]))
        assert index.pts[segment.start] <= index.frames[number]
        read(films["open_gop.mp4"], [number])


def test_no_more_than_a_chunk_is_held(films: dict[str, VideoInfo]) -> None:
    stream = read_frames(films["cfr.mp4"], range(50), chunk=8)
    assert [len(part.frames) for part in stream] == [8] * 6 + [2]
    first = next(read_frames(films["cfr.mp4"], range(50), chunk=8))
    assert first.frames.shape == (8, 3, ROWS * CELL, COLUMNS * CELL)
    assert first.frames.untyped_storage().nbytes() == first.frames.numel()


def test_size_resizes_upright_frames(films: dict[str, VideoInfo]) -> None:
    info = films["cfr.mp4"]
    (part,) = read_frames(info, [5, 6], size=(24, 32))
    assert part.frames.shape == (2, 3, 24, 32)
    large = torch.nn.functional.interpolate(part.frames, size=(48, 64), mode="nearest")
    assert numbers(large) == [5, 6]


@pytest.mark.parametrize(
    ("colorspace", "expected"), [(1, (255, 24, 0)), (6, (255, 0, 0))], ids=["bt709", "bt601"]
)
def test_the_colour_matrix_of_the_file_is_honoured(
    tmp_path: Path, colorspace: int, expected: tuple[int, int, int]
) -> None:
    # One and the same YUV, red under BT.601; another hue if read as BT.709.
    path = tmp_path / "red.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "1"})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        stream.codec_context.colorspace = colorspace
        stream.codec_context.color_range = 1
        for number in range(3):
            frame = av.VideoFrame(64, 64, "yuv420p")
            for plane, value in zip(frame.planes, (81, 90, 240), strict=True):
                plane.update(bytes([value]) * plane.buffer_size)
            frame.pts, frame.time_base = number, Fraction(1, 10)
            frame.colorspace, frame.color_range = colorspace, 1
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    (part,) = read_frames(path, [1])
    mean = part.frames[0].float().mean((1, 2))
    torch.testing.assert_close(mean, torch.tensor(expected).float(), rtol=0, atol=4)


@pytest.mark.parametrize("pixels", ["yuv420p10le", "yuvj420p", "yuv444p"])
def test_other_pixel_formats_become_rgb(tmp_path: Path, pixels: str) -> None:
    path = tmp_path / "pixels.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "5"})
        stream.width, stream.height, stream.pix_fmt = COLUMNS * CELL, ROWS * CELL, pixels
        for number in range(6):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    frames = read(probe(path), [1, 5])
    # The range is right too: black is 20 and white 235 as they were drawn.
    assert frames.float().amin() == pytest.approx(20, abs=8)
    assert frames.float().amax() == pytest.approx(235, abs=8)


def test_rgb_with_alpha_keeps_its_colours(tmp_path: Path) -> None:
    path = tmp_path / "alpha.mov"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt = "rgba"
        pixels = np.full((32, 32, 4), (200, 100, 50, 128), dtype=np.uint8)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgba")))
        container.mux(stream.encode())
    (part,) = read_frames(path, [0])
    assert part.frames[0, :, 7, 9].tolist() == [200, 100, 50]


def test_avi_that_reorders_frames_is_announced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    probe(film(tmp_path / "plain.avi", STEADY, **ORDINARY))
    assert not caplog.messages
    probe(film(tmp_path / "reordered.avi", STEADY, **B_FRAMES))
    assert "AVI keeps no presentation times" in caplog.text


@pytest.mark.parametrize(
    ("indices", "options", "message"),
    [
        ([FRAMES], {}, r"0\.\.89"),
        ([-1, 3], {}, r"0\.\.89"),
        ([3, 2], {}, "ascending"),
        ([3, 3], {}, "ascending"),
        ([], {}, "non-empty"),
        ([0.5], {}, "whole"),
        ([0], {"backend": "opencv"}, "pyav, decord, torchcodec"),
        ([0], {"chunk": 0}, "chunk"),
        ([0], {"size": (0, 5)}, "size"),
    ],
)
def test_bad_requests_are_refused(
    films: dict[str, VideoInfo], indices: list[int], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        read_frames(films["cfr.mp4"], indices, **options)


def info_of(times: Sequence[float] | np.ndarray, duration: float) -> VideoInfo:
    stamps = np.array(times, dtype=np.float64)
    return VideoInfo(
        path=Path("film"),
        duration=duration,
        fps=len(stamps) / duration,
        num_frames=len(stamps),
        width=4,
        height=4,
        rotation=0,
        codec="h264",
        container="mp4",
        missing=0,
        timestamps=stamps,
        stream=0,
        index=None,  # type: ignore[arg-type]
    )


TEN_SECONDS = info_of(np.arange(300) / 30, 10.0)


def test_sample_uniform_matches_the_published_rule() -> None:
    expected = np.linspace(0, 299, 8, dtype=int)
    assert sample_uniform(TEN_SECONDS, 8).tolist() == expected.tolist()
    assert sample_uniform(TEN_SECONDS, 1).tolist() == [0]
    assert sample_uniform(TEN_SECONDS, 1000).tolist() == list(range(300))


def test_sample_fps_takes_the_frame_on_screen() -> None:
    assert sample_fps(TEN_SECONDS, 1).tolist() == list(range(0, 300, 30))
    assert sample_fps(TEN_SECONDS, 60).tolist() == list(range(300))
    still = info_of([0.0, 0.1, 5.0, 5.1, 5.2], 6.0)
    # At 1 to 4 s the frame of 0.1 s still stands: it is taken once.
    assert sample_fps(still, 1).tolist() == [0, 1, 2]


def test_sample_fps_keeps_to_its_bounds() -> None:
    assert len(sample_fps(TEN_SECONDS, 2, max_frames=16)) == 16
    assert (
        sample_fps(TEN_SECONDS, 2, max_frames=16).tolist()
        == sample_uniform(TEN_SECONDS, 16).tolist()
    )
    assert len(sample_fps(TEN_SECONDS, 0.1, min_frames=4)) == 4
    assert len(sample_fps(info_of([0.0, 0.1], 0.2), 1, min_frames=4)) == 2


@given(
    count=st.integers(1, 400),
    fps=st.floats(0.05, 100),
    cap=st.integers(1, 50),
    floor=st.integers(1, 50),
)
def test_samples_are_ascending_and_within_bounds(
    count: int, fps: float, cap: int, floor: int
) -> None:
    info = info_of(np.arange(count) / 24, count / 24)
    floor = min(floor, cap)
    for indices in (
        sample_fps(info, fps, max_frames=cap, min_frames=floor),
        sample_uniform(info, cap),
    ):
        assert indices.dtype == np.int64
        assert (np.diff(indices) > 0).all()
        assert indices[0] == 0
        assert indices[-1] < count
        assert min(floor, count) <= len(indices) <= cap


@pytest.mark.parametrize(
    "options",
    [{"fps": 0}, {"fps": float("nan")}, {"fps": 1, "min_frames": 0}, {"fps": 1, "max_frames": 0}],
)
def test_bad_rates_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        sample_fps(TEN_SECONDS, **options)


def test_bad_counts_are_refused() -> None:
    with pytest.raises(OptionError, match="num_frames"):
        sample_uniform(TEN_SECONDS, 0)
