"""Real, rotated, damaged, cut and impostor files, read by every backend that is installed."""

import importlib
import logging
import os
import wave
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from flexselect.core.errors import OptionError, VideoError
from flexselect.inference.video import probe, read_frames, sample_uniform

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("FLEXSELECT_SHARED", ROOT.parent / "shared"))
BACKENDS = ["decord", "torchcodec"]


def media(name: str) -> Path:
    """A real video: a small one lies beside the tests, a large one with the shared data."""
    for folder in (ROOT / "tests" / "media", SHARED / "media"):
        if (folder / name).exists():
            return folder / name
    pytest.skip(f"no {name} in tests/media or {SHARED}/media; set FLEXSELECT_SHARED")


def needs(backend: str) -> None:
    """Skip where an optional backend cannot run."""
    module = {"decord": "decord", "torchcodec": "torchcodec.decoders"}[backend]
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        pytest.skip(f"{backend} is not usable here: {str(error).strip().splitlines()[0]}")


def remuxed(source: Path, target: Path, **options: str) -> Path:
    """Copy the best video stream, without decoding, into another container."""
    with av.open(str(source)) as reader, av.open(str(target), "w", options=options) as writer:
        stream: Any = reader.streams.best("video")
        copy: Any = writer.add_stream_from_template(stream)
        for packet in reader.demux(stream):
            if packet.dts is not None:
                packet.stream = copy
                writer.mux(packet)
    return target


def cut(path: Path, share: float) -> Path:
    """Keep only the first `share` of the bytes."""
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


# name: frames, fps, width, height, rotation, codec; each as two other readers report it.
FACTS = {
    "nasa_13013.mp4": (390, 29.97, 480, 270, 0, "h264"),
    "flipping_a_pancake.mkv": (310, 30.0, 426, 240, 0, "h264"),
    "h265_video.mp4": (10, 10.0, 128, 128, 0, "hevc"),
    "unordered.mov": (4, 32.0, 50, 50, 0, "h264"),
    "video_90.mov": (3, 30.0, 320, 568, 270, "h264"),
}


@pytest.mark.parametrize("name", FACTS)
def test_probe_reads_what_the_file_holds(name: str) -> None:
    frames, fps, width, height, rotation, codec = FACTS[name]
    info = probe(media(name))
    assert info.num_frames == frames
    assert info.fps == pytest.approx(fps, rel=1e-3)
    assert info.duration == pytest.approx(frames / fps, rel=1e-3)
    assert (info.width, info.height, info.rotation) == (width, height, rotation)
    assert (info.codec, info.missing) == (codec, 0)
    np.testing.assert_allclose(info.timestamps, np.arange(frames) / info.fps, atol=1e-3)


@pytest.mark.parametrize("name", FACTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_agree(name: str, backend: str) -> None:
    info = probe(media(name))
    needs(backend)
    indices = sample_uniform(info, 12)
    if (name, backend) == ("h265_video.mp4", "decord"):
        with pytest.raises(VideoError, match="open groups"):
            next(read_frames(info, indices, backend=backend))
        return
    ours, theirs = (
        torch.cat([part.frames for part in read_frames(info, indices, backend=each, chunk=5)])
        for each in ("pyav", backend)
    )
    assert ours.shape == theirs.shape == (len(indices), 3, info.height, info.width)
    # Backends that each carry their own FFmpeg may round differently.
    torch.testing.assert_close(theirs, ours, rtol=0, atol=4)


@pytest.mark.parametrize("name", FACTS)
def test_a_single_frame_equals_the_same_frame_of_a_full_pass(name: str) -> None:
    info = probe(media(name))
    everything = torch.cat([part.frames for part in read_frames(info, range(info.num_frames))])
    for index in sample_uniform(info, 7).tolist():
        (part,) = read_frames(info, [index])
        assert part.indices.tolist() == [index]
        assert torch.equal(part.frames[0], everything[index])


def test_rotated_frames_stand_upright() -> None:
    info = probe(media("video_90.mov"))
    (part,) = read_frames(info, [0])
    with av.open(str(info.path)) as container:
        stored = next(container.decode(video=0)).to_ndarray(
            format="rgb24", src_colorspace=1, dst_colorspace=5
        )
    # The display matrix asks for a quarter turn clockwise: the left edge becomes the top.
    expected = torch.from_numpy(np.rot90(stored, -1).copy()).permute(2, 0, 1)
    torch.testing.assert_close(part.frames[0], expected, rtol=0, atol=2)


def test_a_damaged_stream_yields_what_decodes(caplog: pytest.LogCaptureFixture) -> None:
    path = media("corrupted.mp4")
    info = probe(path)
    assert info.num_frames == 50
    stream = read_frames(info, range(50), chunk=7)
    with pytest.raises(VideoError, match="finish the loop"):
        _ = stream.report
    parts = list(stream)
    got = np.concatenate([part.indices for part in parts]).tolist()
    # The packet of one frame is damaged; both its neighbours and all that follows are kept.
    assert got == [index for index in range(50) if index != 30]
    report = stream.report
    assert (report.requested, report.decoded, report.lost.tolist()) == (50, 49, [30])
    assert "1 of 50" in report.message
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert [record.getMessage() for record in warnings] == [report.message]
    assert str(path) in report.message


def test_a_damaged_stream_costs_a_sparse_request_no_more(
    caplog: pytest.LogCaptureFixture,
) -> None:
    info = probe(media("corrupted.mp4"))
    whole = torch.cat([part.frames for part in read_frames(info, range(50))])
    caplog.clear()
    stream = read_frames(info, [5, 29, 30, 49])
    (part,) = stream
    assert part.indices.tolist() == [5, 29, 49]
    assert stream.report.lost.tolist() == [30]
    # Frame 30 is missing from the full pass too, so 49 is one place further up in it.
    assert torch.equal(part.frames, whole[[5, 29, 48]])
    assert "1 of 4" in caplog.text


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_backends_refuse_a_damaged_stream(backend: str) -> None:
    info = probe(media("corrupted.mp4"))
    needs(backend)
    with pytest.raises(VideoError, match=f"{backend} cannot decode.*backend='pyav'"):
        list(read_frames(info, range(50), backend=backend))


@pytest.mark.parametrize(
    ("name", "options"), [("cut.mp4", {"movflags": "faststart"}), ("cut.mkv", {})]
)
def test_a_file_cut_short_is_used_as_far_as_it_goes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, options: dict[str, str]
) -> None:
    path = cut(remuxed(media("nasa_13013.mp4"), tmp_path / name, **options), 0.5)
    info = probe(path)
    assert 150 < info.num_frames < 300
    # The header of an mp4 counts its frames; that of an mkv only implies how many there were.
    assert info.num_frames + info.missing == pytest.approx(390, abs=2)
    assert "cut short" in caplog.text
    assert str(info.missing) in caplog.text
    (part,) = read_frames(info, sample_uniform(info, 16)[:-1])
    assert len(part.frames) == 15
    original = probe(media("nasa_13013.mp4"))
    (same,) = read_frames(original, part.indices)
    assert torch.equal(part.frames, same.frames)


def test_a_file_that_lost_its_header_is_no_video(tmp_path: Path) -> None:
    # Camera and encoder write the header of an mp4 last, where a broken download loses it.
    path = cut(remuxed(media("nasa_13013.mp4"), tmp_path / "tail.mp4"), 0.5)
    with pytest.raises(VideoError, match=r"tail\.mp4: not a readable video.*cut short"):
        probe(path)


def scrambled(source: Path, target: Path, keep: slice) -> Path:
    """Overwrite the payload of all packets but those of `keep` with ones."""
    with av.open(str(source)) as container:
        packets: list[Any] = [packet for packet in container.demux(video=0) if packet.size]
        places = [(packet.pos, packet.size) for packet in packets]
    data = bytearray(source.read_bytes())
    spared = set(places[keep])
    for place, size in places:
        if (place, size) not in spared:
            data[place : place + size] = b"\xff" * size
    target.write_bytes(data)
    return target


def test_a_video_of_which_nothing_decodes(tmp_path: Path) -> None:
    path = scrambled(media("h265_video.mp4"), tmp_path / "noise.mp4", slice(0))
    with pytest.raises(VideoError, match=r"noise\.mp4: none of its 10 frames decodes"):
        probe(path)


def test_a_request_of_which_nothing_decodes(tmp_path: Path) -> None:
    path = scrambled(media("video_90.mov"), tmp_path / "start.mov", slice(1))
    stream = read_frames(path, [1, 2])
    with pytest.raises(VideoError, match="2 of 2 requested frames"):
        next(stream)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"absent\.mp4: no such file"):
        read_frames(tmp_path / "absent.mp4", [0])


def test_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="directory"):
        probe(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [("empty.mp4", b""), ("text.mp4", b"no video here\n" * 50), ("text.txt", b"ANSI art?\n" * 50)],
)
def test_not_a_video(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(VideoError, match=r"not a (readable )?video"):
        probe(tmp_path / name)


@pytest.mark.parametrize("name", ["picture.png", "picture.jpg", "picture_named.mp4"])
def test_a_picture_is_not_a_video(tmp_path: Path, name: str) -> None:
    Image.new("RGB", (32, 32), "red").save(
        tmp_path / name, format="JPEG" if "jpg" in name else "PNG"
    )
    with pytest.raises(VideoError, match="not a video"):
        probe(tmp_path / name)


def test_sound_is_not_a_video(tmp_path: Path) -> None:
    path = tmp_path / "tone.wav"
    with wave.open(str(path), "wb") as sound:
        sound.setparams((1, 2, 8000, 800, "NONE", ""))
        sound.writeframes(bytes(1600))
    with pytest.raises(VideoError, match="no video stream"):
        probe(path)


def test_frames_without_timestamps(tmp_path: Path) -> None:
    path = remuxed(media("nasa_13013.mp4"), tmp_path / "raw.h264")
    with pytest.raises(VideoError, match="no timestamps"):
        probe(path)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_missing_backend_names_its_extra(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(OptionError, match=rf"pip install flexselect\[{backend}\]"):
        read_frames(media("video_90.mov"), [0], backend=backend)
