"""Checkpoints and selectors on disk: what was saved loads again, and nothing that does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import flexselect
from flexselect import CheckpointError, OptionError, UnsupportedModelError

from .factories import Family, Video

QUESTION = "What is it?"


@pytest.fixture
def checkpoint(family: Family, model: Any, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def selector_folder(family: Family, model: Any, tmp_path: Path) -> Path:
    family.selector(model).save_pretrained(tmp_path / "selector")
    return tmp_path / "selector"


def edit(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    [file] = folder.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def matrix(tensors: dict[str, Tensor]) -> str:
    """A weight of the second decoder layer, whatever the family calls it."""
    return next(n for n in sorted(tensors) if "layers.1." in n and "mlp" in n and "bias" not in n)


def drop(tensors: dict[str, Tensor]) -> None:
    del tensors[matrix(tensors)]


def add(tensors: dict[str, Tensor]) -> None:
    tensors[matrix(tensors).replace("layers.1.", "layers.91.")] = torch.zeros(2)


def reshape(tensors: dict[str, Tensor]) -> None:
    name = matrix(tensors)
    tensors[name] = tensors[name][:-1].clone()


def test_checkpoint_round_trip(family: Family, model: Any, checkpoint: Path) -> None:
    loaded = flexselect.load_model(checkpoint, device="cpu")
    assert type(loaded) is type(model)
    assert not loaded.training
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight)
    assert flexselect.load_model(checkpoint, dtype="bfloat16", device="cpu").dtype == torch.bfloat16


def test_processor_round_trip(family: Family, checkpoint: Path) -> None:
    family.processor().save_pretrained(checkpoint)
    loaded = flexselect.load_processor(checkpoint)
    assert type(loaded) is type(family.processor())
    chat = [("user", [Video(2), QUESTION])]
    messages = [
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": QUESTION}]}
    ]
    templated = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert templated == family.templated(chat)


@pytest.mark.parametrize("change", [drop, add, reshape])
def test_weights_that_do_not_match(
    family: Family, checkpoint: Path, change: Callable[[dict[str, Tensor]], None]
) -> None:
    edit(checkpoint, change)
    with pytest.raises(CheckpointError, match=r"layers\.9?1\."):
        flexselect.load_model(checkpoint, device="cpu")


def test_damaged_and_missing_weights(family: Family, checkpoint: Path) -> None:
    [file] = checkpoint.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=file.name):
        flexselect.load_model(checkpoint, device="cpu")
    file.unlink()
    with pytest.raises(CheckpointError, match=str(checkpoint)):
        flexselect.load_model(checkpoint, device="cpu")


def test_checkpoint_of_an_unknown_kind(family: Family, checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UnsupportedModelError, match=family.name):
        flexselect.load_model(checkpoint, device="cpu")
    with pytest.raises(UnsupportedModelError, match="bert"):
        flexselect.load_processor(checkpoint)
    (checkpoint / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        flexselect.load_model(checkpoint, device="cpu")


def test_options_of_loading(family: Family, checkpoint: Path) -> None:
    with pytest.raises(OptionError, match="dtype must be"):
        flexselect.load_model(checkpoint, dtype="int8")
    with pytest.raises(OptionError, match="dtype must be"):
        flexselect.load_model(checkpoint, dtype="half of it")
    with pytest.raises(OptionError, match="either device or device_map"):
        flexselect.load_model(checkpoint, device="cpu", device_map="auto")
    with pytest.raises(CheckpointError, match="no folder"):
        flexselect.load_model(checkpoint / "nowhere")


def test_selector_round_trip(family: Family, model: Any, selector_folder: Path) -> None:
    inputs = family.inputs([Video(7), QUESTION])
    found = []
    for selector in (family.selector(model), selector_folder, str(selector_folder)):
        flexselect.apply(model, budget=24, selector=selector, frames_per_set=3)
        model.generate(**inputs, max_new_tokens=1)
        found.append(model.flexselect.selections[0])
        flexselect.remove(model)
    assert found[0].settings["selector"] == "in memory"
    for other in found[1:]:
        assert torch.equal(other.scores, found[0].scores)
        assert other.settings["selector"] == str(selector_folder)
        json.dumps(other.settings)


def test_selector_says_how_it_aggregates(family: Family, model: Any, tmp_path: Path) -> None:
    family.selector(model, aggregation="mean").save_pretrained(tmp_path)
    flexselect.apply(model, budget=24, selector=tmp_path)
    assert model.flexselect.method.aggregation == "mean"
    flexselect.remove(model)
    flexselect.apply(model, budget=24, selector=tmp_path, aggregation="max")
    assert model.flexselect.method.aggregation == "max"


@pytest.mark.parametrize("change", [drop, add, reshape])
def test_selector_weights_that_do_not_match(
    family: Family,
    model: Any,
    selector_folder: Path,
    change: Callable[[dict[str, Tensor]], None],
) -> None:
    edit(selector_folder, change)
    with pytest.raises(CheckpointError, match=r"layers\.9?1\."):
        flexselect.apply(model, budget=24, selector=selector_folder)
    assert not flexselect.is_applied(model)


def test_selector_of_another_family(family: Family, model: Any, selector_folder: Path) -> None:
    config = json.loads((selector_folder / "config.json").read_text())
    config |= {"model_type": "flexselect_other", "architectures": ["OtherSelector"]}
    (selector_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="OtherSelector"):
        flexselect.apply(model, budget=24, selector=selector_folder)
    assert not flexselect.is_applied(model)


def test_selector_of_another_size(family: Family, model: Any, tmp_path: Path) -> None:
    other = family.selector_of_another_size(model)
    other.save_pretrained(tmp_path)
    for selector in (tmp_path, other):
        with pytest.raises(UnsupportedModelError, match="does not fit"):
            flexselect.apply(model, budget=24, selector=selector)
        assert not flexselect.is_applied(model)


@pytest.mark.parametrize("selector", [3, object(), nn.Linear(2, 2)])
def test_selector_that_is_none(family: Family, model: Any, selector: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="selector must be"):
        flexselect.apply(model, budget=24, selector=selector)
    assert not flexselect.is_applied(model)


def test_selector_that_is_a_model(family: Family, model: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="selector must be"):
        flexselect.apply(model, budget=24, selector=family.model())


def test_selector_object_of_another_family(family: Family, model: Any) -> None:
    class OtherSelector:
        num_layers, aggregation, hidden_size = 2, "max", 48
        localise = embed = positions = states = project = print

    with pytest.raises(UnsupportedModelError, match="OtherSelector does not fit"):
        flexselect.apply(model, budget=24, selector=OtherSelector())


def test_selector_nowhere(family: Family, model: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        flexselect.apply(model, budget=24, selector=tmp_path / "nowhere")
