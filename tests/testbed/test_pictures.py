"""V-NIAH: the needle picture fills exactly the frame that the sidecar names."""

import json

import numpy as np
import pytest

from flexselect.core.errors import OptionError
from flexselect.testbed.make import main
from flexselect.testbed.pictures import make_picture_video, read_pictures
from flexselect.testbed.videos import decode_video, read_sidecar


def test_only_rows_with_an_image_are_used(media):
    pictures = read_pictures(media / "needles")
    assert {p.path.name for p in pictures} == {
        "ucsd.jpeg",
        "sora_balloon.png",
        "selenium_green.jpg",
    }
    assert all(p.prompt == p.prompt.strip() and p.answer for p in pictures)


def test_the_needle_differs_from_the_haystack_in_its_frame_only(media, tmp_path):
    pictures = read_pictures(media / "needles")
    haystack = media / "nasa_13013.mp4"
    made, other = (
        make_picture_video(
            tmp_path / f"{i}.mp4", haystack, pictures[0], split="test", index=i, frames=24
        )
        for i in (0, 2)
    )
    (spot,), (elsewhere,) = (v.questions[0].needles[0].frames for v in (made, other))
    assert spot != elsewhere
    difference = np.abs(
        decode_video(made.path).astype(int) - decode_video(other.path).astype(int)
    ).mean(axis=(1, 2, 3))
    assert sorted(np.argsort(difference)[-2:].tolist()) == sorted((spot, elsewhere))
    assert np.sort(difference)[-2] > 5 * np.sort(difference)[-3]
    assert made.questions[0].cells_seen(range(24)).tolist() == [[spot, -1, -1]]
    assert read_sidecar(made.path) == made


def test_the_command_builds_and_resumes_the_real_picture_set(media, tmp_path):
    command = ["--split", "test", "--frames", "8", "--count", "4", "--out", str(tmp_path)]
    command += ["--pictures", str(media / "needles")]
    assert main(command) == 2
    assert main([*command, "--haystack", str(media / "nasa_13013.mp4")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    assert rows[0]["question"] == rows[3]["question"]
    assert main([*command, "--haystack", str(media / "h265_video.mp4")]) == 2


def test_missing_images_and_short_haystacks_are_refused(media, tmp_path):
    with pytest.raises(OptionError, match="does not exist"):
        read_pictures(tmp_path)
    (tmp_path / "dataset.json").write_text('[{"path": "a.png", "prompt": "?", "answer": "x"}]')
    with pytest.raises(OptionError, match="none of its 1 images"):
        read_pictures(tmp_path)
    (tmp_path / "dataset.json").write_text('[{"file": "a.png"}]')
    with pytest.raises(OptionError, match="path, prompt, answer"):
        read_pictures(tmp_path)
    picture = read_pictures(media / "needles")[0]
    with pytest.raises(OptionError, match="has 10"):
        make_picture_video(
            tmp_path / "v.mp4",
            media / "h265_video.mp4",
            picture,
            split="test",
            index=0,
            frames=99,
        )
