"""The small videos of the repository are what their README says they are."""

from __future__ import annotations

import re

import av

from flexselect.tests.paths import SMALL_MEDIA


def test_every_video_is_named_with_its_licence() -> None:
    rows = re.findall(r"^\| `(.+?)` \|.*\| (.+) \|$", (SMALL_MEDIA / "README.md").read_text(), re.M)
    assert {name for name, _ in rows} == {p.name for p in SMALL_MEDIA.iterdir()} - {"README.md"}
    assert {licence for _, licence in rows} == {"Apache-2.0", "BSD-3-Clause"}


def test_videos_are_what_they_claim() -> None:
    with av.open(SMALL_MEDIA / "h265_video.mp4") as file:
        frames = list(file.decode(video=0))
        assert file.streams.video[0].codec_context.name == "hevc"
        assert len(frames) == 10
    with av.open(SMALL_MEDIA / "unordered.mov") as file:
        times = [packet.pts for packet in file.demux(video=0) if packet.pts is not None]
        assert len(times) == 4
        assert times != sorted(times)
    with av.open(SMALL_MEDIA / "video_90.mov") as file:
        frames = list(file.decode(video=0))
        assert [(f.width, f.height, abs(f.rotation)) for f in frames] == [(568, 320, 90)] * 3
