"""The tiny Lite selectors that come with the project: small, loadable, and of use."""

from __future__ import annotations

import json
from typing import Any

import pytest

import flexselect
from flexselect.inference.presets import preset_of
from flexselect.testbed.locate import FAMILIES, checkpoint_folder, selector_folder
from flexselect.training.accuracy import compare, needle_videos


@pytest.fixture(params=FAMILIES, scope="module")
def trained(request: pytest.FixtureRequest) -> tuple[str, Any, Any]:
    name = request.param
    model = flexselect.load_model(checkpoint_folder(name), dtype="float32", device="cpu")
    return name, model, flexselect.load_selector(selector_folder(name), model)


def test_it_says_what_it_learned_from(trained):
    name, model, selector = trained
    preset = preset_of(flexselect.architecture_of(model))
    assert selector.config.teacher_layer == preset.method["layer"]
    assert selector.aggregation == preset.method["aggregation"]
    assert selector.config.teacher_model == f"testbed/checkpoints/{name}"
    assert selector.config.base_model == f"testbed/students/{name}"
    assert (selector_folder(name) / "model.safetensors").stat().st_size < 2**20


def test_its_record_is_whole_and_it_is_as_good_as_its_teacher(trained):
    name, _, _ = trained
    summary = json.loads((selector_folder(name) / "summary.json").read_text())
    assert summary["spearman"] > 0.7
    # The aim is two points below training-free; of 240 questions one point is within chance.
    assert summary["accuracy_lite"] > summary["accuracy_training_free"] - 0.04
    assert summary["accuracy_training_free"] > 0.9
    assert summary["comparison"]["frames"] == 512
    assert summary["comparison"]["questions"] == 240


def test_it_finds_needles(trained, tmp_path):
    name, model, selector = trained
    processor = flexselect.load_processor(checkpoint_folder(name))
    videos = needle_videos(tmp_path, split="validation", frames=128, count=2, questions=3)
    found = compare(model, processor, selector, videos)
    assert found.questions == 6
    # A selector that knows nothing would keep a needle in one of four.
    assert found.lite_recall >= 5 / 6
    assert found.lite >= 5 / 6
