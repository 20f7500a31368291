"""The dry run: real parameters, tokens and shares of memory, without a byte of weights."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from flexselect.inference.registry import architecture_of
from flexselect.tests.paths import FIXTURES, needs_fixtures
from flexselect.training.dry_run import Sizes, measure, memory, meta_model, meta_student, report
from flexselect.training.recipe import Recipe, read_recipe, recipe_for

#: family: (key list of the model, of its published selector, visual tokens of 64 pictures)
FAMILIES = {
    "qwen2_5_vl": ("qwen2_5_vl_7b", "selector_qwen2_5_vl_0.5b", 32 * 299),
    "llava_video": ("llava_video_7b_qwen2", "selector_llava_qwen2_0.5b", 64 * 210),
    "internvl": ("internvl2_5_8b", "selector_internvl_qwen2_0.5b_vocab151674", 64 * 258),
}


def _built(family: str) -> tuple[Recipe, Sizes]:
    recipe = read_recipe(recipe_for(family, tiny=False))
    architecture = architecture_of(meta_model(str(recipe.teacher)))
    student = meta_student(architecture, str(recipe.student), recipe, 20, 64)
    assert all(parameter.is_meta for parameter in student.parameters())
    return recipe, measure(architecture, student, recipe)


def _count(name: str, *, without: tuple[str, ...] = ()) -> int:
    shapes = json.loads((FIXTURES / "keymaps" / f"{name}.json").read_text())
    counted = (key for key in shapes if not any(part in key for part in without))
    return sum(math.prod(shapes[key]) for key in counted)


@needs_fixtures
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_published_checkpoints(family):
    teacher, student, visual = FAMILIES[family]
    _, sizes = _built(family)
    # Heads that are tied, layers that are never read and statistics are stored or not.
    assert sizes.teacher == pytest.approx(_count(teacher), rel=0.02)
    assert sizes.student == pytest.approx(_count(student, without=("lm_head", "output")), rel=0.02)
    assert sizes.visual == visual


def test_stages_share_what_they_say():
    recipe = dataclasses.replace(read_recipe(recipe_for("qwen2_5_vl", tiny=False)), devices=4)
    architecture = architecture_of(meta_model(str(recipe.teacher)))
    student = meta_student(architecture, str(recipe.student), recipe, 20, 64)
    sizes = Sizes(teacher=0, student=1000, trained=1000, visual=0, tokens=0)
    rows = {
        name: parts[1:4] for name, parts in memory(sizes, recipe, architecture, student).items()
    }
    assert rows["DDP"] == (4000, 4000, 8000)
    assert rows["ZeRO-1"] == (2000, 2000, 3000)
    assert rows["ZeRO-2"] == (2000, 500, 3000)
    assert rows["ZeRO-3"] == (500, 500, 3000)
    assert rows["FSDP"] == (1000, 1000, 2000)


def test_the_report_counts_steps():
    recipe = read_recipe(recipe_for("internvl", tiny=False), devices=2, epochs=2.0)
    recipe = dataclasses.replace(recipe, accumulation=3, samples=1256)
    lines = "\n".join(report(recipe, None, None, None))
    assert "2 GPUs x 1 x 3 = 6 samples" in lines
    assert f"steps             {1000 * 2 // 6:,}" in lines
