"""The teacher online is the training-free method; the stored one says the same or says why not."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flexselect.core.errors import CheckpointError, OptionError
from flexselect.core.spearman import selector_loss
from flexselect.inference.features import encode
from flexselect.inference.methods import FlexSelect
from flexselect.inference.registry import architecture_of
from flexselect.inference.session import open_video
from flexselect.testbed.make import make_videos
from flexselect.tests.training.tiny import FRAMES, families, tiny
from flexselect.training.examples import Example, read_examples
from flexselect.training.rank import rank
from flexselect.training.samples import Sample, SampleSet
from flexselect.training.store import SETTINGS
from flexselect.training.teacher import OnlineTeacher, StoredTeacher, identity


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> list[Example]:
    folder = tmp_path_factory.mktemp("films")
    make_videos(folder, split="train", frames=64, count=3, questions=2)
    return read_examples(folder)


def samples_of(
    examples: list[Example], family: str, frames: int = FRAMES
) -> list[tuple[Sample, torch.Tensor]]:
    architecture, processor = tiny(family)
    found = []
    samples = SampleSet(examples, architecture, processor, {"frames": frames})
    for index in range(len(samples)):
        sample = samples[index]
        assert isinstance(sample, Sample)
        found.append((sample, encode(architecture, [sample.pixels]).model))
    return found


@families
@pytest.mark.parametrize("frames", [FRAMES, 48], ids=["one set", "several sets"])
def test_the_teacher_is_the_training_free_method(
    family: str, frames: int, examples: list[Example]
) -> None:
    architecture, processor = tiny(family)
    teacher = OnlineTeacher(architecture)
    sample, features = samples_of(examples[:1], family, frames)[0]
    method = FlexSelect(budget=4)
    video = open_video(
        architecture.model, processor, sample.example.video, method=method, frames=frames
    )
    answer = video.ask(sample.example.question, max_new_tokens=1)
    assert answer.selection.scores is not None
    scores = teacher.scores(sample, features)
    assert scores.dtype == torch.float32
    assert not scores.requires_grad
    torch.testing.assert_close(scores, answer.selection.scores, rtol=1e-4, atol=1e-8)


class Forbidden(nn.Module):
    def forward(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("a layer above the reference layer ran")


def test_only_layers_below_the_reference_layer_run(examples: list[Example]) -> None:
    architecture, _ = tiny("internvl")
    sample, features = samples_of(examples[:1], "internvl")[0]
    expected = OnlineTeacher(architecture, layer=3).scores(sample, features)
    headless = architecture_of(copy.deepcopy(architecture.model))
    for index in range(4, 6):
        headless.decoder.layers[index] = Forbidden()
    headless.decoder.layers[3].mlp = Forbidden()
    headless.decoder.layers[3].self_attn.o_proj = Forbidden()
    assert torch.equal(OnlineTeacher(headless, layer=3).scores(sample, features), expected)


def test_knobs_decide_the_scores(examples: list[Example]) -> None:
    architecture, _ = tiny("internvl")
    sample, features = samples_of(examples[:1], "internvl")[0]
    changes: list[dict[str, Any]] = [
        {},
        {"layer": 2},
        {"aggregation": "mean"},
        {"query": "last"},
        {"frames_per_set": 8},
    ]
    knobs = [{"query": "all", **change} for change in changes]
    found = [OnlineTeacher(architecture, **k).scores(sample, features) for k in knobs]
    for index, scores in enumerate(found):
        for other in found[:index]:
            assert not torch.allclose(scores, other, rtol=1e-3)
    for wrong in ({"layer": 6}, {"aggregation": "min"}, {"query": "none"}, {"frames_per_set": 0}):
        with pytest.raises(OptionError, match=next(iter(wrong))):
            OnlineTeacher(architecture, **wrong)


@families
def test_stored_scores_teach_the_same(family: str, examples: list[Example], tmp_path: Path) -> None:
    architecture, processor = tiny(family)
    report = rank(
        architecture.model, processor, examples, tmp_path, sampling={"frames": FRAMES}, layer=3
    )
    assert report.complete
    assert report.ranked == len(examples)
    online = OnlineTeacher(architecture, layer=3)
    stored = StoredTeacher(tmp_path)
    stored.check(architecture, layer=3, aggregation="max", frames_per_set=online.frames_per_set)
    assert (stored.layer, stored.aggregation, stored.query) == (3, "max", online.query)
    assert stored.usable(examples) == examples
    torch.manual_seed(0)
    for sample, features in samples_of(examples, family):
        ours, theirs = online.scores(sample, features), stored.scores(sample)
        assert torch.equal(
            ours.unique(return_inverse=True)[1], theirs.unique(return_inverse=True)[1]
        )
        # Below a billionth of the greatest, values run out of bits in float16; ranks do not.
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-12 * float(ours.max()))
        # A student's loss and its gradient are therefore the same to the last bit.
        student = torch.rand(len(ours), requires_grad=True)
        losses = [
            selector_loss(student, s, terms={"spearman": 1, "top_recall": 1})
            for s in (ours, theirs)
        ]
        assert torch.equal(*losses)
        gradients = [torch.autograd.grad(loss, student)[0] for loss in losses]
        assert torch.equal(*gradients)


@pytest.fixture(scope="module")
def store(examples: list[Example], tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture, processor = tiny("internvl")
    folder = tmp_path_factory.mktemp("store")
    gone = Example("gone-1", Path("gone.mp4"), "What?")
    rank(
        architecture.model,
        processor,
        [*examples[:2], gone],
        folder,
        sampling={"frames": FRAMES},
    )
    return folder


def test_a_sample_that_is_not_there_is_named(
    store: Path, examples: list[Example], caplog: pytest.LogCaptureFixture
) -> None:
    teacher = StoredTeacher(store)
    third, unknown = examples[2].id, examples[4].id
    damaged = Example("gone-1", Path("gone.mp4"), "What?")
    with caplog.at_level(logging.WARNING, "flexselect"):
        assert teacher.usable([*examples[:2], damaged]) == examples[:2]
    assert "1 samples were damaged" in caplog.text
    with pytest.raises(CheckpointError, match=f"no scores of 4 of 6 samples, such as {third}"):
        teacher.usable(examples)
    sample, features = samples_of(examples[4:5], "internvl")[0]
    with pytest.raises(CheckpointError, match=f"no scores of the sample {unknown}"):
        teacher.scores(sample, features)
    gone = replace(sample, example=replace(sample.example, id="gone-1"))
    with pytest.raises(CheckpointError, match=r"gone-1, which was damaged.*gone\.mp4"):
        teacher.scores(gone, features)


def test_scores_of_other_frames_or_another_prompt_are_refused(
    store: Path, examples: list[Example]
) -> None:
    teacher = StoredTeacher(store)
    longer, _ = samples_of(examples[:1], "internvl", 2 * FRAMES)[0]
    with pytest.raises(CheckpointError, match=rf"{examples[0].id}.*of 16 frames.*has 32"):
        teacher.scores(longer)
    reworded = replace(examples[0], question="What else?")
    sample, _ = samples_of([reworded], "internvl")[0]
    with pytest.raises(CheckpointError, match=f"{examples[0].id}.*of another prompt"):
        teacher.scores(sample)


def test_scores_for_something_else_are_refused(store: Path) -> None:
    architecture, _ = tiny("internvl")
    teacher = StoredTeacher(store)
    teacher.check(architecture, sampling={"frames": FRAMES}, dtype="float32")
    for wrong in ({"layer": 1}, {"aggregation": "mean"}, {"sampling": {"frames": 8}}):
        with pytest.raises(CheckpointError, match=f"for something else: {next(iter(wrong))}"):
            teacher.check(architecture, **wrong)
    other = copy.deepcopy(architecture.model)
    with torch.no_grad():
        other.model.language_model.layers[1].input_layernorm.weight[3] += 0.5
    with pytest.raises(CheckpointError, match="for something else: weights"):
        teacher.check(architecture_of(other))
    with pytest.raises(CheckpointError, match=r"settings\.json"):
        StoredTeacher(store / "nowhere")
    assert (store / SETTINGS).exists()


def test_a_model_is_itself_in_any_dtype_and_place() -> None:
    architecture, _ = tiny("internvl")
    moved = copy.deepcopy(architecture.model).to(torch.bfloat16)
    moved.config._name_or_path = "elsewhere"
    assert identity(architecture_of(moved)) == identity(architecture)
    assert identity(tiny("qwen2_5_vl")[0]) != identity(architecture)
