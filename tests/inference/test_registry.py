"""The registry: every entry leads to a family, and a family is imported only when asked for."""

from __future__ import annotations

import inspect
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from torch import nn
from transformers.utils import is_flash_attn_2_available

from flexselect.core.architecture import Architecture
from flexselect.core.errors import CheckpointError, OptionError, UnsupportedModelError
from flexselect.inference.registry import (
    CHECKPOINTS,
    FAMILIES,
    architecture_of,
    family_named,
    family_of,
    load_model,
    load_processor,
)
from flexselect.tests.architectures.factories import FAMILIES as UNDER_CONTRACT


@pytest.mark.parametrize("class_name", FAMILIES)
def test_every_class_has_a_whole_architecture(class_name: str) -> None:
    family, name = FAMILIES[class_name]
    model = type(class_name, (nn.Module,), {})()
    architecture = architecture_of(model)
    assert isinstance(architecture, Architecture)
    assert type(architecture).__name__ == name
    assert architecture.family == family
    assert architecture.model is model
    assert not inspect.isabstract(type(architecture))


def test_every_family_is_under_contract() -> None:
    assert {family.name for family in UNDER_CONTRACT} == {family for family, _ in FAMILIES.values()}


def test_checkpoints_lead_to_supported_classes() -> None:
    assert set(CHECKPOINTS.values()) == set(FAMILIES)


def test_a_checkpoint_says_its_family_without_weights(tmp_path: Path) -> None:
    for kind, class_name in CHECKPOINTS.items():
        (tmp_path / "config.json").write_text(f'{{"model_type": "{kind}"}}')
        assert family_of(tmp_path) == FAMILIES[class_name][0]
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UnsupportedModelError, match="bert"):
        family_of(tmp_path)


def test_subclasses_of_a_supported_class_are_supported() -> None:
    class_name = "Qwen2_5_VLForConditionalGeneration"
    base = type(class_name, (nn.Module,), {})
    assert architecture_of(type("Mine", (base,), {})()).family == "qwen2_5_vl"


def test_unsupported_models_are_told_the_supported_ones() -> None:
    with pytest.raises(UnsupportedModelError) as error:
        architecture_of(nn.Linear(1, 1))
    assert str(error.value).startswith("Linear is not supported.")
    assert all(name in str(error.value) for name in FAMILIES)


class Wrapper(nn.Module):
    """Holds a model somewhere inside, as adapters and parallel wrappers do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base = nn.ModuleDict({"model": model})


@pytest.mark.parametrize("wrap", [torch.compile, Wrapper], ids=["compiled", "wrapped"])
def test_a_wrapper_is_told_to_stand_aside(wrap: Any) -> None:
    name = "InternVLForConditionalGeneration"
    wrapper = wrap(type(name, (nn.Module,), {})())
    message = rf"^{type(wrapper).__name__} is a wrapper around a {name}\. .* before it is compiled"
    with pytest.raises(UnsupportedModelError, match=message):
        architecture_of(wrapper)


@pytest.mark.parametrize("thing", [None, "a/path", {}, object])
def test_things_that_are_no_model(thing: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="is not supported"):
        architecture_of(thing)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint."""
    folder = tmp_path_factory.mktemp("checkpoint")
    family = next(family for family in UNDER_CONTRACT if family.name == "qwen2_5_vl")
    family.model().save_pretrained(folder)
    family.processor().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["int8", "float33", "Tensor", "nn", torch.int64, 16, None])
def test_dtypes_that_are_none(dtype: Any, folder: Path) -> None:
    with pytest.raises(OptionError, match="dtype must be"):
        load_model(folder, dtype=dtype, device="cpu")


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}, torch.device("cpu")])
def test_places_that_are_there(device_map: Any, folder: Path) -> None:
    model = load_model(folder, device_map=device_map)
    assert not any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "banana"}, "device must be 'cpu', 'cuda' or 'cuda:1', got 'banana'"),
        ({"device": "meta"}, "device must be 'cpu'.*got 'meta'"),
        ({"device": "cuda:99"}, r"device 'cuda:99' is not there: torch sees \d+ cuda device"),
        ({"device": "cpu:3"}, "device 'cpu:3' is not there: torch sees 1 cpu"),
        ({"device_map": "foo"}, "device_map must be one of 'auto', .* got 'foo'"),
        ({"device_map": "cuda:99"}, "device_map 'cuda:99' is not there"),
        ({"device_map": ["cpu"]}, "device_map must be .*a mapping to devices"),
        ({"device_map": {"": "foo"}}, r"device_map\[''\] must be 'cpu', 'disk' or .*'foo'"),
        ({"device_map": {"": "cuda:99"}}, r"device_map\[''\] 'cuda:99' is not there"),
        ({"device": "cpu", "device_map": "auto"}, "either device or device_map"),
        ({"attn_implementation": "foo"}, "attn_implementation must be one of .*sdpa.*'foo'"),
        ({"attn_implementation": "someone/kernel"}, "attn_implementation must be one of"),
        ({"attn_implementation": "flex_attention"}, "'flex_attention' cannot be used for this"),
        pytest.param(
            {"attn_implementation": "flash_attention_2"},
            "'flash_attention_2' cannot be used for this model here: .*take 'sdpa'",
            marks=pytest.mark.skipif(is_flash_attn_2_available(), reason="it is installed"),
        ),
    ],
    ids=str,
)
def test_places_and_kernels_that_are_not_there(
    options: dict[str, Any], message: str, folder: Path
) -> None:
    with pytest.raises(OptionError, match=message):
        load_model(
            folder, **({"device": "cpu"} if "attn_implementation" in options else {}), **options
        )


def test_an_error_about_something_else_passes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("a defect")

    architecture = "flexselect.qwen2_5_vl.architecture.Qwen2_5_VL.load_model"
    monkeypatch.setattr(architecture, broken)
    for kernel in (None, "sdpa"):
        with pytest.raises(ValueError, match=r"^a defect$"):
            load_model(folder, device="cpu", attn_implementation=kernel)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("processor_config.json", None),
        ("processor_config.json", "{"),
        ("tokenizer.json", None),
        ("tokenizer.json", "{"),
        ("tokenizer.json", "{}"),
    ],
)
def test_a_checkpoint_without_a_whole_processor(
    folder: Path, tmp_path: Path, name: str, content: str | None
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / name).unlink()
    if content is not None:
        (copy / name).write_text(content)
    with pytest.raises(CheckpointError) as error:
        load_processor(copy)
    said = str(error.value)
    assert said.startswith(f"{copy} holds no whole processor")
    assert "\n" not in said
    assert name in said


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (LocalEntryNotFoundError("two\nlines"), "download it on a machine with network and name"),
        (ConnectionError("two\nlines"), "download it on a machine with network and name"),
        (HFValidationError("two\nlines"), "Check the id; .*hf auth login"),
    ],
)
def test_what_the_hub_does_not_give(
    raised: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(CheckpointError, match=f"^someone/something is no folder here.*{said}") as e:
        load_processor("someone/something")
    assert "lines" not in str(e.value)


def test_the_hub_offline() -> None:
    """As the whole suite runs: the hub's own error, not one made up here."""
    with pytest.raises(CheckpointError, match=r"cannot be reached.*and name the folder"):
        load_processor("someone/something")


def test_a_family_is_imported_only_when_its_model_comes() -> None:
    families = sorted({family for family, _ in FAMILIES.values()})
    code = (
        "import sys, flexselect\n"
        f"families = {families}\n"
        "loaded = lambda: [f for f in families if f'flexselect.{f}.architecture' in sys.modules]\n"
        "assert loaded() == [], loaded()\n"
        "class Qwen2_5_VLForConditionalGeneration: pass\n"
        "flexselect.architecture_of(Qwen2_5_VLForConditionalGeneration())\n"
        "assert loaded() == ['qwen2_5_vl'], loaded()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("qwen", "qwen2_5_vl"),
        ("qwen3", "qwen3_vl"),
        ("llava", "llava_video"),
        ("internvl", "internvl"),
    ],
)
def test_families_have_short_names(name: str, family: str) -> None:
    assert family_named(name) == family_named(family) == family


def test_an_unknown_family_is_an_error() -> None:
    with pytest.raises(OptionError, match=r"'gpt'.*llava_video"):
        family_named("gpt")
