"""The registry: every entry leads to a family, and a family is imported only when asked for."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flexselect.core.architecture import Architecture
from flexselect.core.errors import OptionError, UnsupportedModelError
from flexselect.inference.registry import CHECKPOINTS, FAMILIES, architecture_of, load_model
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


def test_subclasses_of_a_supported_class_are_supported() -> None:
    class_name = "Qwen2_5_VLForConditionalGeneration"
    base = type(class_name, (nn.Module,), {})
    assert architecture_of(type("Mine", (base,), {})()).family == "qwen2_5_vl"


def test_unsupported_models_are_told_the_supported_ones() -> None:
    with pytest.raises(UnsupportedModelError) as error:
        architecture_of(nn.Linear(1, 1))
    assert str(error.value).startswith("Linear is not supported.")
    assert all(name in str(error.value) for name in FAMILIES)


@pytest.mark.parametrize("dtype", ["int8", "float33", "Tensor", "nn", torch.int64, 16, None])
def test_dtypes_that_are_none(dtype: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    with pytest.raises(OptionError, match="dtype must be"):
        load_model(tmp_path, dtype=dtype, device="cpu")


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
