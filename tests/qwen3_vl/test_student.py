"""A student of Qwen3-VL: where it starts, and that it ranks as the engine does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2Model, Qwen3Config, Qwen3Model

import flexselect
from flexselect.core.errors import UnsupportedModelError
from flexselect.inference.features import encode
from flexselect.inference.scoring import score, split_prompt
from flexselect.qwen3_vl.student import encode_states
from flexselect.tests.architectures.factories import FAMILIES, FRAMES_PER_SET, Video
from flexselect.tests.architectures.tiny.common import draw_weights
from flexselect.training.student import Lesson, Student, new_selector

[FAMILY] = [family for family in FAMILIES if family.name == "qwen3_vl"]
SMALL: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture
def architecture(tmp_path: Path) -> Any:
    FAMILY.model().save_pretrained(tmp_path / "teacher")
    FAMILY.processor().save_pretrained(tmp_path / "teacher")
    return flexselect.architecture_of(flexselect.load_model(tmp_path / "teacher", device="cpu"))


@pytest.mark.parametrize("start", ["text model", "sibling"])
def test_a_student_ranks_as_the_engine_does(architecture: Any, start: str, tmp_path: Path) -> None:
    folder = tmp_path / "student"
    if start == "sibling":
        FAMILY.model(seed=7, num_hidden_layers=3, hidden_size=32).save_pretrained(folder)
        FAMILY.processor().save_pretrained(folder)
    else:
        vocabulary = architecture.decoder.config.vocab_size
        config = Qwen3Config(vocab_size=vocabulary, head_dim=32, **SMALL)
        draw_weights(Qwen3Model(config), 3).save_pretrained(folder)
    selector = new_selector(architecture, folder, aggregation="max", layer=2)
    [request] = architecture.read(FAMILY.inputs([Video(5), "Where?"]))
    features = encode(architecture, request.pixels, selector, frames_per_chunk=2)
    assert features.selector is not None
    if start == "text model":
        # The model's own merger, as far as the text model is wide.
        torch.testing.assert_close(features.selector, features.model[:, :48], rtol=1e-5, atol=1e-5)
        assert selector.config.text_config.rope_parameters["mrope_section"] == [6, 5, 5]
    sets = split_prompt(request.prompt, selector, FRAMES_PER_SET)
    last = selector.num_layers - 1
    expected = score(
        request.prompt, sets, features.selector, selector, layer=last, aggregation="max"
    )
    with torch.no_grad():
        _, states = encode_states(architecture.model, request.pixels[0])
    lesson = Lesson(request.prompt, states, torch.arange(60).float())
    student = Student(selector, architecture, frames_per_set=FRAMES_PER_SET)
    found = torch.zeros_like(expected)
    for ranking in student([lesson]):
        # The target of a token is its number.
        for pred, target in zip(ranking.pred, ranking.target, strict=True):
            found[target.long()] = pred.detach()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_a_text_model_of_another_kind_or_width_is_refused(
    architecture: Any, tmp_path: Path
) -> None:
    vocabulary = architecture.decoder.config.vocab_size
    for model, message in (
        (Qwen2Model(Qwen2Config(vocab_size=vocabulary, **SMALL)), "starts from a Qwen3 text model"),
        (Qwen3Model(Qwen3Config(vocab_size=vocabulary, head_dim=24, **SMALL)), "multiple of 32"),
    ):
        model.save_pretrained(tmp_path / "text")
        with pytest.raises(UnsupportedModelError, match=message):
            new_selector(architecture, tmp_path / "text", aggregation="max", layer=2)
