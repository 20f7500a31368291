"""The report: what it says and shows, that nothing foreign runs in it, what a browser sees."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import flexselect
from flexselect import FlexSelect, Full, Uniform
from flexselect.cli import app
from flexselect.inference.terminal import stamp
from flexselect.inference.video import read_frames
from flexselect.testbed.videos import NeedleVideo
from flexselect.visualization.needles import needle_tokens
from flexselect.visualization.overlays import area_path, kept_overlay, strip_paths
from flexselect.visualization.report import write_report
from flexselect.visualization.stills import on_grid, read_stills
from flexselect.visualization.timeline import Pin, timeline

from .conftest import BUDGET, open_with

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium on this machine (apt-get install chromium)"
)

#: Words that would be markup, script or an attribute's end if they were not escaped.
EVIL = """What </title><script>alert(1)</script> is "on" the 'red' <img src=x onerror=alert(2)>?"""


class Page(HTMLParser):
    """What a page holds: tags with their attributes, and its text without style and script."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self._inside = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts.append(data)
        elif self._inside != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def report(
    tmp_path: Path, opened: flexselect.Video, answered: flexselect.Answer, needle_video: NeedleVideo
) -> Path:
    question = needle_video.questions[0]
    return write_report(
        tmp_path / "report.html",
        opened,
        question.text,
        answered,
        expected="nothing like it",
        right=False,
        needle=needle_tokens(opened, question),
    )


def test_it_says_what_was_asked_answered_and_read(
    report: Path, opened: flexselect.Video, answered: flexselect.Answer, needle_video: NeedleVideo
) -> None:
    page = Page(report)
    text = page.text
    for words in (
        needle_video.questions[0].text,
        f"Answer {answered.text}",
        "Wrong. Expected: nothing like it",
        f"{BUDGET} of 128",
        "read the prompt (to the first token)",
        "Where the answer is",
    ):
        assert words in text
    buttons = [button["data-at"] for button in page.named("button") if button["class"] == "go"]
    assert buttons == [f"{moment.start:.3f}" for moment in answered.selection.moments(6)]
    for moment in answered.selection.moments(6):
        assert f"{stamp(moment.start)} – {stamp(moment.end)}" in text
    for name, value in answered.selection.settings.items():
        if isinstance(value, str):
            assert f"{name} {value}" in text, name
    # Any stage that took time is named with it.
    for seconds in {**opened.seconds, **answered.seconds}.values():
        assert f"{seconds:.2f} s" in text


def test_it_needs_nothing_but_itself_and_the_video(report: Path, needle_video: NeedleVideo) -> None:
    page = Page(report)
    for _, attributes in page.tags:
        for name in ("src", "href", "poster", "srcset", "data", "action"):
            value = attributes.get(name)
            if value is not None and not value.startswith("data:"):
                # Beside the page, or where it lies now.
                assert (report.parent / unquote(value)).resolve().name == needle_video.path.name
    assert "http" not in page.source.replace("http-equiv", "").replace("http://www.w3.org/", "")
    assert "url(" not in page.source
    assert "@import" not in page.source
    [first, _] = [source["src"] for source in page.named("source")]
    assert first is not None
    assert (report.parent / unquote(first)).resolve() == needle_video.path.resolve()


def test_every_picture_is_described_and_every_control_named(report: Path) -> None:
    page = Page(report)
    assert page.named("html")[0]["lang"] == "en"
    assert page.named("img")
    assert all(image["alt"] for image in page.named("img"))
    # The parser lowers names: SVG's role and label are what a reader of the page hears.
    spoken = [svg for svg in page.named("svg") if svg.get("aria-hidden") != "true"]
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in spoken)
    assert all(button.get("aria-label") for button in page.named("button"))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_nothing_of_a_question_answer_or_path_is_ever_run(
    tmp_path: Path, needle_video: NeedleVideo
) -> None:
    name = "a <b> \"q\" & 'x' #1?.mp4"
    film = tmp_path / name
    shutil.copy(needle_video.path, film)
    video = open_with("qwen2_5_vl", film)
    answer = replace(video.ask(EVIL), text=EVIL)
    page = Page(write_report(tmp_path / "r.html", video, EVIL, answer, expected=EVIL, note=EVIL))
    assert page.text.count(EVIL) >= 4
    assert name in page.text
    # The only script is ours, and the page's own policy allows no other.
    [script] = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    [policy] = [m["content"] for m in page.named("meta") if m.get("http-equiv")]
    assert policy is not None
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    for tag, attributes in page.tags:
        assert tag not in ("b", "base", "iframe", "object", "embed", "link") or (
            tag == "link" and attributes["href"] == "data:,"
        )
        assert not [key for key in attributes if key.startswith("on")]
    assert all((image["src"] or "").startswith("data:image/") for image in page.named("img"))
    places = {unquote(source["src"] or "") for source in page.named("source")}
    assert places == {name}


def cells_of(path: str) -> set[tuple[int, int]]:
    """Read (row, column) of the cells that a path of bars covers."""
    found = set()
    for column, row, width in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\d+z", path):
        found |= {(int(row), int(column) + i) for i in range(int(width))}
    return found


def test_what_was_dropped_is_dark_and_what_was_kept_is_framed() -> None:
    kept = np.array([[True, True, False, False], [False, True, False, True]])
    [dropped, rim] = re.findall(r'd="([^"]*)"', kept_overlay(kept))
    assert cells_of(dropped) == {(int(r), int(c)) for r, c in np.argwhere(~kept)}
    length = 0
    for x, y, way, end in re.findall(r"M(\d+) (\d+)([HV])(\d+)", rim):
        length += int(end) - int(x if way == "H" else y)
    # Three cells in an L have a border of eight sides, the single one of four.
    assert length == 12


def test_time_runs_evenly_and_heights_are_relevance() -> None:
    assert area_path([0.5, 1.0], [0, 250, 1000]) == "M0.00 1V0.5000H250.00V0.0000H1000.00V1z"
    strip = strip_paths([0.0, 1.0, 1.0, 0.25], [0, 100, 200, 300, 1000])
    assert 'd="M100.00 0H300.00V1H100.00z" fill-opacity="1.00"' in strip
    assert 'd="M300.00 0H1000.00V1H300.00z"' in strip
    assert strip.count("<path") == 2


def test_pins_that_would_lie_on_each_other_stand_in_rows() -> None:
    pins = [Pin(i, seconds, "m") for i, seconds in enumerate((50.0, 51.0, 80.0, 52.0))]
    html = timeline([0.0, 50.0], 100.0, [1.0, 0.5], [0.1, 0.2], pins=pins)
    assert re.findall(r"--row:(\d)", html) == ["0", "1", "0", "2"]
    assert "--rows:3" in html


def test_stills_are_the_first_picture_of_their_frame(
    opened: flexselect.Video, needle_video: NeedleVideo
) -> None:
    stills = read_stills(opened, [7, 2, 7])
    assert sorted(stills) == [2, 7]
    for frame, still in stills.items():
        [part] = read_frames(needle_video.path, [2 * frame])
        assert np.array_equal(still.pixels, part.frames[0].permute(1, 2, 0).numpy())
        assert still.seconds == float(opened.times[frame])


def test_tags_are_left_out_of_pictures(opened_with_tags: flexselect.Video) -> None:
    frames = opened_with_tags.clip.frames
    grid = opened_with_tags.engine.architecture.grid(opened_with_tags.clip)
    values = torch.arange(frames * 6)
    laid = on_grid(values, grid, frames)
    assert laid.shape == (frames, 2, 2)
    assert laid[3].tolist() == [[19, 20], [21, 22]]


@pytest.mark.parametrize("method", [Uniform(budget=BUDGET), Full()], ids=lambda m: m.name)
def test_a_method_that_ranks_nothing_has_a_report_too(
    tmp_path: Path, needle_video: NeedleVideo, method: Any
) -> None:
    video = open_with("qwen2_5_vl", needle_video.path, method)
    answer = video.ask("What number is on the red star?")
    page = Page(write_report(tmp_path / "report.html", video, "What?", answer))
    assert "frames are not ranked before. A number plays" in page.text
    assert "Relevance is here what the model looked at when it read all that was kept" in page.text
    assert "in its set of frames" not in page.text
    buttons = [button["data-at"] for button in page.named("button") if button["class"] == "go"]
    assert buttons == [f"{moment.start:.3f}" for moment in answer.selection.moments(6)] != []
    kept = len(answer.selection.kept)
    assert f"{kept} of 128" in page.text
    assert page.named("img")


def test_a_report_says_what_its_moments_are_ranked_by(
    tmp_path: Path, needle_video: NeedleVideo
) -> None:
    video = open_with("qwen2_5_vl", needle_video.path, FlexSelect(budget=BUDGET))
    answer = video.ask("What number is on the red star?")
    silent = replace(answer, selection=replace(answer.selection, reading=None))
    both, scores = (
        Page(write_report(tmp_path / f"{name}.html", video, "What?", found)).text
        for name, found in (("both", answer), ("scores", silent))
    )
    assert "both in its set of frames and when the model read all that was kept" in both
    assert "The most relevant stretches" in scores
    assert "read all that was kept" not in scores


def test_without_scores_or_reading_a_report_has_no_moments(
    tmp_path: Path, needle_video: NeedleVideo
) -> None:
    video = open_with("qwen2_5_vl", needle_video.path, Uniform(budget=BUDGET))
    answer = video.ask("What number is on the red star?")
    answer = replace(answer, selection=replace(answer.selection, reading=None))
    page = Page(write_report(tmp_path / "report.html", video, "What?", answer))
    assert "frames are not ranked before." in page.text
    assert "Some of the frames of which something was kept" in page.text
    assert not [button for button in page.named("button") if "data-at" in button]
    assert f"{BUDGET} of 128" in page.text
    assert page.named("img")


def test_pictures_are_those_that_the_reading_names(
    tmp_path: Path, opened: flexselect.Video, answered: flexselect.Answer
) -> None:
    """Moments follow the reading, the timeline and the heat over the pictures the scores."""
    selection = answered.selection
    last = int(selection.frame[selection.kept[-1]])
    reading = torch.full((len(selection.kept),), 0.01)
    reading[-1] = 1.0
    pages = []
    for changed in (selection, replace(selection, reading=reading)):
        path = write_report(
            tmp_path / "r.html", opened, "What?", replace(answered, selection=changed)
        )
        pages.append(Page(path))
    buttons = [button for button in pages[1].named("button") if button["class"] == "go"]
    assert buttons[0]["data-at"] == f"{float(opened.times[last]):.3f}"
    labels = [
        [svg["aria-label"] for svg in page.named("svg") if svg.get("class") == "area"]
        for page in pages
    ]
    assert labels[0] == labels[1] != []


def test_ask_writes_a_report(tmp_path: Path, needle_video: NeedleVideo) -> None:
    path = tmp_path / "new" / "out.html"
    question = needle_video.questions[0].text
    arguments = ["ask", needle_video.path, question, "--frames", 16, "--budget", 8]
    result = CliRunner().invoke(app, [*map(str, arguments), "--quiet", "--report", str(path)])
    assert result.exit_code == 0, result.stderr
    assert f"report: {path}" in result.stdout
    page = Page(path)
    assert question in page.text
    # Who answered, where no model was named.
    assert "No --model was named" in page.text
    blocked = needle_video.path / "out.html"
    result = CliRunner().invoke(app, [*map(str, arguments), "--report", str(blocked)])
    assert result.exit_code == 1
    assert f"--report {blocked}: cannot write" in result.stderr
    result = CliRunner().invoke(app, [*map(str, arguments), "--report", str(tmp_path)])
    assert result.exit_code == 1
    assert f"--report {tmp_path} is a folder" in result.stderr
    assert "What" not in result.stdout


@needs_browser
@pytest.mark.parametrize("width", [500, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it_without_complaint(
    report: Path, tmp_path: Path, width: int, scheme: str
) -> None:
    shot = tmp_path / "shot.png"
    assert BROWSER is not None
    options = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    command = [
        *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
        *("--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", *options),
        *(f"--window-size={width},1600", f"--screenshot={shot}", report.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert pixels.shape == (1600, width, 3)
    # The page is light or dark as asked, and full of pictures and words.
    ground = pixels[2, 2].mean()
    assert ground > 200 if scheme == "light" else ground < 60
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 500
    assert (np.abs(pixels - pixels[2, 2]).sum(-1) > 30).mean() > 0.2


@needs_browser
def test_even_a_script_that_slipped_in_is_not_run(report: Path, tmp_path: Path) -> None:
    """Both halves matter: without the policy it would run, so the policy is what stops it."""
    foreign = "<script>document.body.dataset.foreign = 'ran'</script>"
    page = report.read_text(encoding="utf-8").replace("</main>", foreign + "</main>")
    open_page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    ran = []
    for name, source in (("closed", page), ("open", open_page)):
        path = tmp_path / f"{name}.html"
        path.write_text(source, encoding="utf-8")
        assert BROWSER is not None
        command = [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
            *(f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
        assert "The moments it was read from" in done.stdout
        ran.append('data-foreign="ran"' in done.stdout)
    assert ran == [False, True]
