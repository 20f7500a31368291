"""Heat maps, timelines and embeddings: what is chosen, what is drawn, and the page of them."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

import flexselect
from flexselect import Uniform
from flexselect.cli import app
from flexselect.core.errors import OptionError
from flexselect.testbed.videos import NeedleVideo
from flexselect.visualization.embeddings import project
from flexselect.visualization.heatmaps import draw_layers, draw_timeline, heat_over
from flexselect.visualization.layers import Look, look
from flexselect.visualization.stills import Still, read_stills

from .conftest import open_with


@pytest.fixture(scope="module")
def seen(opened: flexselect.Video, needle_video: NeedleVideo) -> Look:
    return look(opened, needle_video.questions[0].text, [0, 3])


def test_a_look_agrees_with_the_answer(
    seen: Look, opened: flexselect.Video, answered: flexselect.Answer
) -> None:
    """The method's own layer is always there, with the scores and the tokens an answer has."""
    assert sorted(seen.scores) == sorted({0, 3, seen.layer})
    assert answered.selection.scores is not None
    assert torch.equal(seen.scores[seen.layer], answered.selection.scores)
    assert torch.equal(seen.selection.kept, answered.selection.kept)
    frames = seen.frame_relevance(seen.layer)
    assert torch.equal(frames, answered.selection.frame_scores())


def test_the_needle_is_known_for_its_own_question_only(
    seen: Look, opened: flexselect.Video, needle_video: NeedleVideo
) -> None:
    assert seen.needle is not None
    [spot] = needle_video.questions[0].needles
    frame = spot.frames[0] // 2
    assert frame in seen.best_frames(1)
    assert frame in seen.best_frames(5)
    scores = seen.scores[3]
    rank = seen.needle_rank(3)
    assert rank is not None
    assert sorted(scores.tolist(), reverse=True)[rank - 1] == float(scores[seen.needle].max())
    other = look(opened, "What is on the pink hat?", [0], states=False)
    assert other.needle is None
    assert other.needle_rank(0) is None
    assert other.states == {}


def test_frames_to_look_at_are_relevant_and_apart(seen: Look) -> None:
    alone = Look(
        seen.video, "", seen.selection, seen.layer, seen.scores, seen.points, seen.states, None
    )
    chosen = alone.best_frames(4)
    relevance = alone.frame_relevance(seen.layer)
    assert int(relevance.argmax()) in chosen
    assert len(chosen) == 4
    assert chosen == sorted(chosen)
    times = seen.video.times
    assert bool((times[chosen].diff() >= (times[-1] - times[0]) / 12).all())
    # Asked for all, all come, neighbours too.
    assert alone.best_frames(32) == list(range(32))


def test_points_hold_the_needle_and_kept_ones_and_their_own_states(seen: Look) -> None:
    assert seen.needle is not None
    points = set(seen.points.tolist())
    assert set(seen.needle.nonzero()[:, 0].tolist()) <= points
    assert set(seen.selection.kept.tolist()) & points
    # At layer 0 a token's state is what the tower made of it, one row a token here.
    assert torch.equal(seen.states[0], seen.video.features.model[seen.points].float())


def test_heat_colours_the_cell_it_belongs_to() -> None:
    picture = Still(np.full((40, 80, 3), 128, dtype=np.uint8), 0.0)
    heat = np.zeros((2, 4))
    heat[1, 2] = 1.0
    drawn = heat_over(picture, heat, 80).astype(int)
    bright = drawn.sum(-1) > drawn.sum(-1).min()
    assert drawn.shape == (40, 80, 3)
    expected = np.zeros((40, 80), dtype=bool)
    expected[20:, 40:60] = True
    assert np.array_equal(bright, expected)


def test_a_row_a_layer_and_the_frames_above(seen: Look) -> None:
    stills = read_stills(seen.video, seen.best_frames(3))
    figure = draw_layers(seen, stills, [0, 3])
    panels = figure.get_axes()
    assert len(panels) == 3 * 3
    assert [axes.get_ylabel().split("\n")[0] for axes in panels[3::3]] == ["layer 0", "layer 3"]
    assert f"{seen.needle_rank(3):,} of 128" in panels[6].get_ylabel()


def test_the_timeline_has_a_step_a_frame(seen: Look) -> None:
    [upper, lower] = draw_timeline(seen, 3).get_axes()
    heights = upper.patches[0].get_data().values
    np.testing.assert_allclose(heights, seen.frame_relevance(3).numpy())
    shares = lower.patches[0].get_data().values
    np.testing.assert_allclose(shares, seen.selection.kept_per_frame().numpy() / 4)
    assert upper.get_xlim()[1] == pytest.approx(seen.video.record["duration"])


@pytest.mark.parametrize("kind", ["pca", "tsne"])
def test_projections_keep_groups_apart_and_repeat(kind: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(40, 16, generator=draw)
    states[20:] += 12
    places = project(states, kind)
    assert places.shape == (40, 2)
    assert np.array_equal(places, project(states, kind))
    middles = places[:20].mean(0), places[20:].mean(0)
    own = np.linalg.norm(places[:20] - middles[0], axis=1)
    other = np.linalg.norm(places[:20] - middles[1], axis=1)
    assert (own < other).all()


def show(video: Path, question: str, *options: Any) -> Result:
    arguments = ["show", video, question, "--frames", 16, "--budget", 8, "--quiet", *options]
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_writes_pictures_and_one_page(
    tmp_path: Path, needle_video: NeedleVideo
) -> None:
    out = tmp_path / "seen"
    # Markup to a browser, and to matplotlib a formula that it cannot read.
    question = needle_video.questions[0].text + r" <b>& $\for$"
    result = show(needle_video.path, question, "--layers", "0,2", "--out", out, "--pictures", 2)
    assert result.exit_code == 0, result.stderr
    names = ["overlays", "layers", "timeline", "pca", "tsne"]
    assert result.stdout.split() == [*(str(out / f"{n}.png") for n in names), f"{out}/index.html"]
    page = (out / "index.html").read_text()
    inside = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="([^"]+)"', page)
    assert [base64.b64decode(data) for data, _ in inside] == [
        (out / f"{name}.png").read_bytes() for name in names
    ]
    for name in names:
        pixels = np.asarray(Image.open(out / f"{name}.png").convert("L"))
        assert (pixels != pixels[0, 0]).mean() > 0.02, name
    assert "&lt;b&gt;&amp;" in page
    assert "<b>" not in page
    assert "<script" not in page
    # The preset's layer, which is 4, is compared too.
    assert "layers 0, 2, 4" in page


def test_one_layer_is_enough(tmp_path: Path, needle_video: NeedleVideo) -> None:
    options = ["--layer", 3, "--layers", "3", "--no-embeddings", "--out", tmp_path / "seen"]
    assert show(needle_video.path, "What?", *options).exit_code == 0
    made = {path.name for path in (tmp_path / "seen").iterdir()}
    assert made == {"overlays.png", "timeline.png", "index.html"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--layers", "0,9"], "layer must be a whole number from 0 to 5"),
        (["--layers", "first"], "--layers must be whole numbers"),
        (["--budget", "0"], "budget must be at least 1"),
    ],
)
def test_what_cannot_be_shown_is_said(
    tmp_path: Path, needle_video: NeedleVideo, options: list[str], said: str
) -> None:
    result = show(needle_video.path, "What?", *options, "--out", tmp_path / "seen")
    assert result.exit_code == 1
    assert said in result.stderr
    assert not (tmp_path / "seen").exists()


def test_what_needs_no_model_is_said_before_one_is_loaded(
    tmp_path: Path, needle_video: NeedleVideo
) -> None:
    blocked = needle_video.path / "seen"
    for options, said in (
        (["--out", blocked], f"--out {blocked}: cannot write to {needle_video.path}"),
        (["--layers", "0,,2"], "--layers must be whole numbers"),
    ):
        result = show(needle_video.path, "What?", "--model", tmp_path / "none", *options)
        assert result.exit_code == 1
        assert said in result.stderr


def test_a_method_that_does_not_rank_has_nothing_to_show(needle_video: NeedleVideo) -> None:
    video = open_with("qwen2_5_vl", needle_video.path, Uniform(budget=16))
    with pytest.raises(OptionError, match="'uniform' ranks nothing"):
        look(video, "What?")
