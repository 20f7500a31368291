"""The committed checkpoints: small, complete, loadable, and as good as their record says."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import flexselect
from flexselect.core.errors import CheckpointError, OptionError
from flexselect.testbed import locate
from flexselect.testbed.check import check_clips, family_inputs
from flexselect.testbed.models import family_of
from flexselect.testbed.questions import RETRIEVAL, compose, split_seed
from flexselect.testbed.recipe import default_recipe, student_recipe
from flexselect.testbed.videos import decode_video, draw_plot, encode_video


@pytest.mark.parametrize(
    ("find", "remedy"),
    [
        (locate.checkpoint_folder, "holds no checkpoint.*testbed.train --family internvl$"),
        (locate.student_folder, "holds no student.*testbed.train --family internvl --student"),
        (locate.selector_folder, "holds no Lite selector.*make train-selector MODEL=internvl"),
    ],
)
def test_an_unknown_family_and_what_is_missing_are_named(find, remedy, tmp_path, monkeypatch):
    with pytest.raises(OptionError, match="gpt"):
        find("gpt")
    monkeypatch.setattr(locate, "FOLDER", tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match=remedy):
        find("internvl")


def test_each_kind_of_model_has_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(locate, "FOLDER", tmp_path / "checkpoints")
    finders = (locate.checkpoint_folder, locate.student_folder, locate.selector_folder)
    for kind in ("checkpoints", "students", "selectors"):
        (tmp_path / kind / "internvl").mkdir(parents=True)
        (tmp_path / kind / "internvl" / "model.safetensors").touch()
    assert len({find("internvl") for find in finders}) == 3


@pytest.mark.parametrize("name", locate.FAMILIES)
def test_a_committed_checkpoint_is_small_and_stands_by_its_record(name):
    folder = locate.checkpoint_folder(name)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 4 * 2**20
    assert {v.dtype for v in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    record = json.loads((folder / "training.json").read_text())
    whole = record["test_clips_of_16_frames"]["whole"]
    assert min(whole[task]["accuracy"] for task in RETRIEVAL) >= 0.95
    for control in ("shuffled", "blind"):
        for row in record["test_clips_of_16_frames"][control].values():
            # Four standard deviations of guessing.
            spread = (row["chance"] * (1 - row["chance"]) / row["asked"]) ** 0.5
            assert row["accuracy"] <= row["chance"] + 4 * spread


@pytest.mark.parametrize("name", locate.FAMILIES)
def test_what_is_committed_was_trained_by_the_recipe_as_it_is(name):
    family = family_of(name)
    recipes = {locate.checkpoint_folder: default_recipe, locate.student_folder: student_recipe}
    for folder, recipe in recipes.items():
        record = json.loads((folder(name) / "training.json").read_text())
        assert record["recipe"] == repr(recipe(family))


@pytest.mark.parametrize("name", locate.FAMILIES)
def test_a_committed_student_has_the_tower_of_the_committed_checkpoint(name):
    family = family_of(name)
    folders = locate.checkpoint_folder(name), locate.student_folder(name)
    models = [AutoModelForImageTextToText.from_pretrained(folder) for folder in folders]
    own = {id(p) for p in family.projector(models[1]).parameters()}
    weights = dict(models[0].named_parameters())
    tower = {id(p) for part in family.tower(models[1]) for p in part.parameters()} - own
    assert tower
    for key, value in models[1].named_parameters():
        if id(value) in tower:
            assert torch.equal(value, weights[key]), key


@pytest.mark.parametrize("name", locate.FAMILIES)
def test_a_committed_checkpoint_generates_one_word_through_the_public_api(name):
    folder = locate.checkpoint_folder(name)
    model = flexselect.load_model(str(folder))
    family = family_of(name)
    right = 0
    with flexselect.Full()(model):
        for index in range(6):
            plot = compose(split_seed("validation", 100 + index), 8, [RETRIEVAL[index % 3]])
            pictures = decode_video(encode_video(draw_plot(plot)))
            inputs = family_inputs(family, pictures, plot.questions[0].text)
            del inputs["position_ids"]
            out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
            said = out[0, inputs["input_ids"].shape[1] :]
            text = family.tokenizer.decode(said, skip_special_tokens=True)
            right += text == plot.questions[0].answer
    assert right >= 5


@pytest.mark.parametrize("folder", ["core", "inference", *locate.FAMILIES])
def test_what_runs_real_models_does_not_know_of_the_testbed(folder):
    files = [*(locate.FOLDER.parents[1] / folder).rglob("*.py")]
    assert files
    assert not [path for path in files if "testbed" in path.read_text()]


@pytest.mark.parametrize("name", locate.FAMILIES)
def test_a_committed_checkpoint_answers_fresh_clips_and_needs_to_see_them(name):
    folder = locate.checkpoint_folder(name)
    family = family_of(name)
    family.processor = AutoProcessor.from_pretrained(folder)
    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]

    def accuracy(control):
        return check_clips(
            family, model, split="validation", count=10, tasks=RETRIEVAL, control=control
        ).accuracy()

    assert accuracy(None) >= 0.9
    assert accuracy("shuffled") < 0.4
    assert accuracy("blind") < 0.4
