"""V-NIAH: the needle picture fills exactly the frame that the sidecar names."""

import json

import numpy as np
import pytest
from PIL import Image

from flexselect.core.errors import OptionError, VideoError
from flexselect.testbed.make import main
from flexselect.testbed.pictures import make_picture_video, read_pictures
from flexselect.testbed.questions import compose
from flexselect.testbed.videos import decode_video, draw_plot, read_sidecar, write_video


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


@pytest.fixture
def drawn(tmp_path):
    """Folder of three needle pictures of noise, and the rendered video to hide them in."""
    folder = tmp_path / "drawn"
    folder.mkdir()
    for number in range(3):
        write_noise(folder / f"{number}.png", number)
    listing = [
        {"path": f"{number}.png", "prompt": f"Which noise is {number}? ", "answer": str(number)}
        for number in range(3)
    ]
    (folder / "dataset.json").write_text(json.dumps(listing))
    write_video(folder / "talk.mp4", draw_plot(compose(0, 6, ["number"])), fps=2)
    return folder


def write_noise(path, seed):
    pixels = np.random.RandomState(seed).randint(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def command(drawn, out, count=4):
    """Arguments that hide the drawn pictures."""
    options = ["--split", "test", "--frames", "8", "--count", str(count), "--out", str(out)]
    return [*options, "--pictures", str(drawn), "--haystack", str(drawn / "talk.mp4")]


def test_the_command_builds_and_resumes_the_picture_set(drawn, tmp_path):
    out = tmp_path / "out"
    assert main(command(drawn, out)[:-2]) == 2
    assert main(command(drawn, out)) == 0
    rows = [json.loads(line) for line in (out / "questions.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in rows] == ["0", "1", "2", "0"]
    assert rows[0]["question"] == rows[3]["question"] == "Which noise is 0?"
    before = {path: path.stat().st_mtime_ns for path in out.glob("test-*")}
    assert main([*command(drawn, out, count=2), "--first", "3"]) == 0
    assert before.items() < {path: path.stat().st_mtime_ns for path in out.glob("test-*")}.items()
    rows = [json.loads(line) for line in (out / "questions.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in rows] == ["0", "1", "2", "0", "1"]


def change_haystack(drawn):
    write_video(drawn / "talk.mp4", draw_plot(compose(1, 6, ["number"])), fps=2)


def change_row(key):
    def change(drawn):
        rows = json.loads((drawn / "dataset.json").read_text())
        rows[0][key] = "other"
        (drawn / "dataset.json").write_text(json.dumps(rows))

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (change_haystack, "(haystack_sha256 differ)"),
        (lambda drawn: write_noise(drawn / "0.png", 9), "(picture_sha256 differ)"),
        (change_row("prompt"), "(prompt differ)"),
        (change_row("answer"), "(answer differ)"),
    ],
)
def test_what_was_made_from_other_content_is_not_taken_for_done(
    drawn, tmp_path, caplog, change, said
):
    out = tmp_path / "out"
    assert main(command(drawn, out, count=1)) == 0
    assert main(command(drawn, out, count=1)) == 0
    change(drawn)
    assert main(command(drawn, out, count=1)) == 2
    assert said in caplog.text
    assert "delete the old video" in caplog.text
    for path in out.glob("test-*"):
        path.unlink()
    assert main(command(drawn, out, count=1)) == 0


def test_options_of_rendered_scenes_are_refused_beside_pictures(drawn, tmp_path, caplog):
    options = ["--tasks", "number", "--hold", "2"]
    assert main([*command(drawn, tmp_path / "out"), *options]) == 2
    assert "--tasks, --hold cannot go with --pictures" in caplog.text
    caplog.clear()
    assert main([*command(drawn, tmp_path / "out"), "--questions", "1"]) == 2
    assert "--questions cannot go with --pictures" in caplog.text
    assert not (tmp_path / "out").exists()


def test_missing_images_and_short_haystacks_are_refused(drawn, tmp_path):
    with pytest.raises(OptionError, match=r"dataset\.json cannot be read \(No such file"):
        read_pictures(tmp_path)
    (tmp_path / "dataset.json").write_text('[{"path": "a.png", "prompt": "?", "answer": "x"}]')
    with pytest.raises(OptionError, match="none of its 1 images"):
        read_pictures(tmp_path)
    for content in (b'[{"file": "a.png"}]', b'[{"path": "a", "prompt": 1, "answer": ""}]', b"\xff"):
        (tmp_path / "dataset.json").write_bytes(content)
        with pytest.raises(OptionError, match="path, prompt, answer"):
            read_pictures(tmp_path)
    picture, *_ = read_pictures(drawn)
    options = {"split": "test", "index": 0, "frames": 99}
    with pytest.raises(OptionError, match="has 12"):
        make_picture_video(tmp_path / "v.mp4", drawn / "talk.mp4", picture, **options)
    for haystack in (drawn / "absent.mp4", drawn):
        with pytest.raises(VideoError, match=f"{haystack} cannot be read"):
            make_picture_video(tmp_path / "v.mp4", haystack, picture, **options)
