"""Which method answers: given, applied, by preset, or with a Lite selector."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import flexselect
from flexselect import FlexSelect, FlexSelectError, OptionError
from flexselect.inference.engine import Engine

from .films import (
    FAMILY,
    KNOBS,
    QUESTION,
    RATE,
    SIZE,
    open_clip,
)


def test_without_a_method_the_preset_decides(stock: Any, processor: Any, clip: Path) -> None:
    video = flexselect.open_video(stock, processor, clip, **SIZE)
    settings = video.ask(QUESTION, max_new_tokens=1).selection.settings
    assert (settings["method"], settings["preset"]) == ("flexselect", "qwen2_5_vl")
    assert (settings["budget"], settings["layer"]) == (7040, 2)
    # Two pictures a second of six seconds.
    assert (settings["pictures"], settings["sampling"]["fps"]) == (12, 2)


def test_an_applied_method_is_used_and_may_be_removed(
    model: Any, processor: Any, clip: Path, opened: flexselect.Video
) -> None:
    flexselect.apply(model, **KNOBS)
    video = flexselect.open_video(model, processor, clip, fps=RATE, **SIZE)
    assert video.engine is model.flexselect.engine
    expected = opened.ask(QUESTION, max_new_tokens=4)
    for _ in range(2):
        answer = video.ask(QUESTION, max_new_tokens=4)
        assert torch.equal(answer.ids, expected.ids)
        assert torch.equal(answer.selection.kept, expected.selection.kept)
        flexselect.remove(model)


def test_a_given_method_comes_before_the_applied_one(
    model: Any, processor: Any, clip: Path
) -> None:
    flexselect.apply(model, **KNOBS)
    video = open_clip(model, processor, clip, method=flexselect.Uniform(budget=40))
    answer = video.ask(QUESTION, max_new_tokens=2)
    assert answer.selection.settings["method"] == "uniform"
    assert answer.selection.kept_per_frame().tolist() == [0, 0, 0, 20, 0, 0, 0, 0, 0, 20, 0, 0]
    assert answer.selection.scores is None
    assert model.flexselect.method.budget == KNOBS["budget"]
    assert model.flexselect.selections == []


def test_random_draws_its_budget(stock: Any, processor: Any, clip: Path) -> None:
    answers = [
        open_clip(stock, processor, clip, method=flexselect.Random(budget=40, seed=seed)).ask("?")
        for seed in (0, 0, 1)
    ]
    same, again, other = (answer.selection.kept.tolist() for answer in answers)
    assert same == again != other
    assert len(set(same)) == len(set(other)) == 40


def test_a_lite_selector_by_its_path(
    stock: Any, processor: Any, clip: Path, selector_folder: Path, tmp_path: Path
) -> None:
    """Saved, loaded, and saved again, as for the hub: always the same scores."""
    loaded = flexselect.architecture_of(stock).load_selector(str(selector_folder))
    loaded.save_pretrained(tmp_path / "again")
    found = []
    for selector in (FAMILY.selector(stock), selector_folder, tmp_path / "again"):
        method = FlexSelect(budget=24, selector=selector, frames_per_set=4)
        video = open_clip(stock, processor, clip, method=method, frames_per_chunk=5)
        found.append(video.ask(QUESTION, max_new_tokens=4))
    assert [answer.selection.settings["selector"] for answer in found] == [
        "in memory",
        str(selector_folder),
        str(tmp_path / "again"),
    ]
    for answer in found:
        assert answer.selection.settings["method"] == "flexselect-lite"
        assert len(answer.selection.kept) < answer.selection.num_visual
        assert answer.selection.scores is not None
        assert found[0].selection.scores is not None
        assert torch.equal(answer.selection.scores, found[0].selection.scores)
        assert torch.equal(answer.ids, found[0].ids)
        assert answer.moments


def test_a_video_opened_without_the_selector_says_so(
    stock: Any, opened: flexselect.Video, selector_folder: Path
) -> None:
    lite = Engine(stock, FlexSelect(budget=24, selector=selector_folder))
    with pytest.raises(FlexSelectError, match=r"without the selector\. Open it again"):
        replace(opened, engine=lite).ask(QUESTION)


@pytest.mark.parametrize("method", ["uniform", FlexSelect])
def test_a_method_that_is_none(stock: Any, processor: Any, clip: Path, method: Any) -> None:
    with pytest.raises(OptionError, match="method"):
        flexselect.open_video(stock, processor, clip, method=method)
