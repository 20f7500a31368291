"""A student: where it starts, what of it learns, that it ranks as the engine does, and its file."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2Model

import flexselect
from flexselect.core.errors import CheckpointError, UnsupportedModelError
from flexselect.inference.features import encode
from flexselect.inference.scoring import score, split_prompt
from flexselect.tests.architectures.factories import FAMILIES, FRAMES_PER_SET, Family, Video
from flexselect.tests.architectures.tiny.common import draw_weights
from flexselect.training.student import (
    Lesson,
    Student,
    differs,
    family_of,
    idle_parameters,
    new_selector,
    save_selector,
)

LAYER = 2
TRAINED = [f for f in FAMILIES if f.name in ("qwen2_5_vl", "llava_video", "internvl")]


@pytest.fixture(params=TRAINED, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@cache
def _teacher(family: Family, folder: Path) -> Any:
    """A teacher from its own folder, as a run loads it."""
    family.model().save_pretrained(folder)
    family.processor().save_pretrained(folder)
    return flexselect.load_model(folder, device="cpu").requires_grad_(False)


@pytest.fixture
def architecture(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Any:
    base = tmp_path_factory.getbasetemp()
    return flexselect.architecture_of(_teacher(family, base / f"teacher-{family.name}"))


@pytest.fixture
def sibling(family: Family, tmp_path: Path) -> Path:
    """A small model of the family, of other sizes than the teacher."""
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    small = family.model(seed=7, num_hidden_layers=3, **sizes)
    small.save_pretrained(tmp_path / "sibling")
    family.processor().save_pretrained(tmp_path / "sibling")
    return tmp_path / "sibling"


def _start(architecture: Any, start: Path) -> Any:
    return new_selector(architecture, start, aggregation="max", layer=LAYER)


def _lesson(family: Family, architecture: Any, seed: int = 0, question: str = "?") -> Lesson:
    [request] = architecture.read(family.inputs([Video(5, seed), question]))
    with torch.no_grad():
        _, states = family_of(architecture).encode_states(architecture.model, request.pixels[0])
    draw = torch.Generator().manual_seed(seed)
    scores = torch.rand(request.prompt.num_visual, generator=draw)
    return Lesson(request.prompt, states, scores)


def _student(selector: Any, architecture: Any, **options: Any) -> Student:
    return Student(selector, architecture, frames_per_set=FRAMES_PER_SET, **options)


def test_a_student_ranks_as_the_engine_does(family, architecture, sibling):
    selector = _start(architecture, sibling)
    [request] = architecture.read(family.inputs([Video(5, 0), "Where?"]))
    features = encode(architecture, request.pixels, selector, frames_per_chunk=2)
    prompt = selector.localise(request.prompt)
    sets = split_prompt(prompt, selector, FRAMES_PER_SET)
    expected = score(
        prompt, sets, features.selector, selector, layer=selector.num_layers - 1, aggregation="max"
    )
    lesson = _lesson(family, architecture, question="Where?")
    found = torch.zeros_like(expected)
    target = torch.zeros_like(expected)
    for ranking in _student(selector, architecture)([lesson]):
        for pred, wanted in zip(ranking.pred, ranking.target, strict=True):
            [part] = [s for s in sets if torch.equal(lesson.scores[s.members], wanted)]
            found[part.members] = pred.detach()
            target[part.members] = wanted
    assert torch.equal(target, lesson.scores)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_lessons_in_one_batch_are_ranked_as_each_alone_and_weigh_the_same(
    family, architecture, sibling
):
    student = _student(_start(architecture, sibling), architecture)
    asked = ((0, "a"), (1, "b"), (2, "ab"))
    lessons = [_lesson(family, architecture, seed, question) for seed, question in asked]

    def ranked(some: list[Lesson]) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
        return [
            (pred.detach(), target, float(weight))
            for r in student(some)
            for pred, target, weight in zip(r.pred, r.target, r.weight, strict=True)
        ]

    together = ranked(lessons)
    alone = [part for lesson in lessons for part in ranked([lesson])]
    assert len(together) == len(alone) == 6
    for pred, target, weight in alone:
        [(again, share)] = [(p, w) for p, t, w in together if torch.equal(t, target)]
        torch.testing.assert_close(again, pred, rtol=1e-4, atol=1e-6)
        assert share == pytest.approx(weight / 3)
    assert sum(weight for *_, weight in together) == pytest.approx(1)


def test_gradients_reach_everything_that_is_trained_and_nothing_else(family, architecture, sibling):
    student = _student(_start(architecture, sibling), architecture, train_projector=True)
    lesson = _lesson(family, architecture)
    sum((r.pred * r.target).sum() for r in student([lesson])).backward()
    selector = student.selector
    idle = {id(parameter) for parameter in idle_parameters(selector)}
    for name, parameter in selector.named_parameters():
        if id(parameter) in idle:
            assert parameter.grad is None, name
            assert not parameter.requires_grad, name
        else:
            assert parameter.grad is not None, name
            # A key's bias moves every score of a query alike; rounding is all that is left of it.
            assert "k_proj.bias" in name or bool(parameter.grad.abs().sum() > 0), name
    assert all(parameter.grad is None for parameter in architecture.model.parameters())


def test_the_projector_is_frozen_where_the_reference_freezes_it(family, architecture, sibling):
    student = _student(_start(architecture, sibling), architecture)
    trained = any(p.requires_grad for p in student.selector.projector.parameters())
    assert trained == (family.name != "qwen2_5_vl")


def test_a_sibling_gives_its_language_model_and_projector(family, architecture, sibling):
    selector = _start(architecture, sibling)
    small = flexselect.load_model(sibling, device="cpu")
    ours, theirs = selector.language_model.state_dict(), small.model.language_model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    [request] = architecture.read(family.inputs([Video(2, 3), "?"]))
    # The tower of the model it serves, behind the sibling's own projector.
    with torch.no_grad():
        tower = _tower(family, architecture.model)
        _tower(family, small).load_state_dict(tower.state_dict(), strict=False)
        expected, _ = flexselect.architecture_of(small).encode(request.pixels[0], None)
        _, found = architecture.encode(request.pixels[0], selector)
    torch.testing.assert_close(found, expected)


def _tower(family: Family, model: Any) -> Any:
    if family.name != "qwen2_5_vl":
        return model.model.vision_tower
    parts = model.model.visual
    return SimpleNamespace(
        state_dict=lambda: {k: v for k, v in parts.state_dict().items() if "merger" not in k},
        load_state_dict=parts.load_state_dict,
    )


def test_a_saved_selector_loads_and_ranks_the_same(family, architecture, sibling, tmp_path):
    selector = _start(architecture, sibling)
    with torch.no_grad():
        for parameter in selector.parameters():
            parameter.add_(0.01)
    save_selector(selector, tmp_path / "out", dtype=torch.bfloat16, tokens_from=None)
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    assert stored["dtype"] == "bfloat16"
    loaded = flexselect.load_selector(tmp_path / "out", architecture.model)
    for name, value in selector.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.bfloat16().float()), name
    assert loaded.config.teacher_layer == LAYER
    assert loaded.config.aggregation == loaded.aggregation == "max"
    assert loaded.config.base_model == str(sibling)
    assert loaded.config.teacher_model == architecture.model.name_or_path
    ours = copy.deepcopy(selector).bfloat16().float()
    ours.language_model.rotary_emb = selector.language_model.rotary_emb
    lesson = _lesson(family, architecture)
    rankings = [_student(one, architecture)([lesson]) for one in (ours, loaded)]
    for mine, theirs in zip(*rankings, strict=True):
        torch.testing.assert_close(mine.pred, theirs.pred)


def _text_model(folder: Path, vocabulary: int, heads: int = 1, **more: Any) -> Path:
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=16 * heads,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=1,
        max_position_embeddings=512,
        **more,
    )
    draw_weights(Qwen2Model(config), 3).save_pretrained(folder)
    return folder


def test_a_text_model_starts_a_student(family, architecture, tmp_path):
    vocabulary = architecture.decoder.config.vocab_size
    text = _text_model(tmp_path / "text", vocabulary, heads=2)
    selector = _start(architecture, text)
    stored = Qwen2Model.from_pretrained(text).state_dict()
    assert all(torch.equal(selector.language_model.state_dict()[k], v) for k, v in stored.items())
    rankings = _student(selector, architecture)([_lesson(family, architecture)])
    assert all(bool(r.pred.isfinite().all()) and bool((r.pred > 0).any()) for r in rankings)


def test_qwen_cuts_the_models_merger_and_turns_to_yarn(tmp_path, tmp_path_factory):
    [family] = [f for f in TRAINED if f.name == "qwen2_5_vl"]
    folder = tmp_path_factory.getbasetemp() / f"teacher-{family.name}"
    architecture = flexselect.architecture_of(_teacher(family, folder))
    vocabulary = architecture.decoder.config.vocab_size
    selector = _start(architecture, _text_model(tmp_path / "text", vocabulary, heads=2))
    [request] = architecture.read(family.inputs([Video(3, 1), "?"]))
    with torch.no_grad():
        features, own = architecture.encode(request.pixels[0], selector)
    torch.testing.assert_close(own, features[:, : selector.hidden_size])
    rope = selector.config.text_config.rope_parameters
    assert rope["rope_type"] == "yarn"
    assert (rope["factor"], rope["beta_fast"], rope["beta_slow"]) == (4, 32, 1)
    assert rope["mrope_section"] == [2, 3, 3]
    assert rope["original_max_position_embeddings"] == 512
    stretched = selector.language_model.rotary_emb.attention_scaling
    assert stretched == pytest.approx(1.1386, abs=1e-4)


def test_a_tokenizer_that_cannot_be_read_is_no_tokenizer_that_agrees(family, architecture, sibling):
    assert not differs(sibling, Path(architecture.model.name_or_path))
    for broken in ("{", "null", '{"version": "1.0", "model": {}}'):
        (sibling / "tokenizer.json").write_text(broken)
        with pytest.raises(CheckpointError, match=r"tokenizer in .*sibling cannot be read"):
            differs(sibling, Path(architecture.model.name_or_path))


def test_a_student_of_another_family_or_tower_is_named(family, architecture, tmp_path):
    other = next(f for f in TRAINED if f.name != family.name)
    other.model().save_pretrained(tmp_path / "other")
    with pytest.raises(UnsupportedModelError, match=other.name):
        _start(architecture, tmp_path / "other")
