"""Recipes: every committed one is whole, and what is unknown or out of range is named."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from flexselect.core.errors import OptionError
from flexselect.training.recipe import FOLDER, Recipe, read_recipe, recipe_for

FAMILIES = ("qwen2_5_vl", "llava_video", "internvl")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tiny", [False, True])
def test_every_family_has_both_recipes(family, tiny):
    recipe = read_recipe(recipe_for(family, tiny))
    assert recipe.family == family
    assert (recipe.teacher is None) == (recipe.student is None) == tiny
    assert (recipe.videos is None) != tiny


@pytest.mark.parametrize("family", FAMILIES)
def test_the_real_recipes_are_the_references(family):
    recipe = read_recipe(recipe_for(family, tiny=False))
    expected = {
        "learning_rate": 1e-5,
        "warmup": 0.03,
        "weight_decay": 0,
        "bf16": True,
        "samples_per_device": 1,
        "devices": 8,
        "clip": 100,
        "frames": 64,
        "epochs": 3 if family == "qwen2_5_vl" else 1,
        "loss": {"spearman": 1.0},
        "temperature": 1e-4,
        "log_scores": False,
        # One layer in training and inference: the preset's, not the 19 of the reference's trees.
        "layer": None,
        "frames_per_set": None,
    }
    assert {name: getattr(recipe, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learning_rte": 1e-3}, "learning_rte"),
        ({"epochs": 0}, "epochs"),
        ({"betas": [0.9]}, "betas"),
        ({"loss": {"spearmen": 1.0}}, "loss"),
        ({"loss": {}}, "loss"),
        ({"loss": {"spearman": 0}}, "loss"),
        ({"learning_rate": float("inf")}, "learning_rate"),
        ({"clip": float("nan")}, "clip"),
        ({"family": "qwen"}, "family must be qwen2_5_vl"),
        ({"bf16": "yes"}, "bf16"),
        ({"warmup": 1}, "warmup"),
        ({"samples_per_device": True}, "samples_per_device"),
        ({"query": "first"}, "query"),
        ({"family": "gpt"}, "gpt"),
        ({"source": " "}, "source"),
        ({"top_fraction": 1.5}, "top_fraction"),
        ({"loss": {"listnet": 1.0}}, "log_scores: true"),
    ],
)
def test_what_is_wrong_in_a_recipe_is_named_with_its_file(changes, named, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"family": "internvl", "source": "mine", **changes}))
    with pytest.raises(OptionError, match=named) as error:
        read_recipe(path)
    assert "mine.yaml" in str(error.value)


def test_changes_take_the_place_of_what_the_file_says_and_are_checked():
    path = recipe_for("qwen2_5_vl", tiny=False)
    recipe = read_recipe(path, epochs=0.5, student=None, layer=7)
    assert (recipe.epochs, recipe.layer) == (0.5, 7)
    assert recipe.student == "Qwen/Qwen2-0.5B-Instruct"
    with pytest.raises(OptionError, match="learning_rate"):
        read_recipe(path, learning_rate=-1)


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(OptionError, match=r"none\.yaml"):
        read_recipe(tmp_path / "none.yaml")
    for content in ("- a list", "family: [", "family: internvl"):
        (tmp_path / "bad.yaml").write_text(content)
        with pytest.raises(OptionError, match=r"bad\.yaml"):
            read_recipe(tmp_path / "bad.yaml")


def test_a_recipe_knows_every_key_of_the_committed_ones():
    known = {field.name for field in dataclasses.fields(Recipe)}
    for path in FOLDER.glob("*.yaml"):
        content = yaml.safe_load(path.read_text())
        assert path.stem == "sizes" or set(content) <= known
