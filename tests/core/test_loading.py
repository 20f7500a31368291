"""What loading has in common; that checkpoints must fit is tested for every family beside."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from flexselect.core.checkpoint import Checkpoint
from flexselect.core.errors import CheckpointError, UnsupportedModelError
from flexselect.core.loading import (
    check_class,
    check_sizes,
    fill_selector,
    keep_key,
    load_pretrained,
    stored_dtype,
)


def store(folder: Path, **tensors: torch.Tensor) -> Path:
    save_file(tensors, folder / "model.safetensors")
    return folder


class Stock:
    """Reports what a transformers class does."""

    asked: dict[str, Any]

    @classmethod
    def from_pretrained(cls, folder: Path, **options: Any) -> Any:
        cls.asked = options
        names = Checkpoint(folder).blank
        return "the model", {
            "missing_keys": set() if "weight" in names else {"weight"},
            "unexpected_keys": set(names) - {"weight"},
            "mismatched_keys": [("weight", (1,), (2,))] if "short" in names else [],
            "error_msgs": "",
        }


def test_a_whole_checkpoint(tmp_path: Path) -> None:
    store(tmp_path, weight=torch.ones(2))
    assert load_pretrained(Stock, tmp_path, None, "cpu", "sdpa") == "the model"
    wanted = {"dtype": "auto", "device_map": "cpu", "attn_implementation": "sdpa"}
    assert wanted.items() <= Stock.asked.items()
    load_pretrained(Stock, tmp_path, torch.bfloat16, "cpu", None)
    assert Stock.asked["dtype"] is torch.bfloat16


def test_every_kind_of_misfit_is_named(tmp_path: Path) -> None:
    store(tmp_path, other=torch.ones(2), short=torch.ones(1))
    with pytest.raises(CheckpointError, match=r"does not fit Stock") as error:
        load_pretrained(Stock, tmp_path, None, "cpu", None)
    for part in ("missing_keys: weight", "unexpected_keys: other, short", "mismatched_keys"):
        assert part in str(error.value)


def test_a_damaged_file_is_named_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_pretrained(SimpleNamespace(), tmp_path, None, "cpu", None)


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"a": torch.ones(1), "b": torch.ones(2)}, torch.float32),
        ({"a": torch.ones(1).bfloat16(), "b": torch.ones(2).long()}, torch.bfloat16),
        ({"a": torch.ones(1).bfloat16(), "b": torch.ones(2)}, None),
        ({"b": torch.ones(2).long()}, None),
    ],
)
def test_stored_dtype(tmp_path: Path, tensors: dict[str, Any], expected: Any) -> None:
    assert stored_dtype(Checkpoint(store(tmp_path, **tensors))) is expected


def test_a_selector_takes_the_models_dtype(tmp_path: Path) -> None:
    with torch.device("meta"):
        selector = nn.Linear(2, 2, bias=False)
    model = SimpleNamespace(dtype=torch.bfloat16, device=torch.device("cpu"))
    store(tmp_path, weight=torch.eye(2))
    filled = fill_selector(selector, tmp_path, keep_key, model, "mine")
    assert filled is selector
    assert not filled.training
    assert torch.equal(filled.weight, torch.eye(2, dtype=torch.bfloat16))
    assert filled.name_or_path == "mine"


def test_class_and_sizes() -> None:
    check_class(nn.Linear(2, 2), nn.Linear)
    with pytest.raises(UnsupportedModelError, match=r"ReLU does not fit this model.*class Linear"):
        check_class(nn.ReLU(), nn.Linear)
    selector = SimpleNamespace(name_or_path="mine")
    check_sizes(selector, {"width": (3, 3)})
    with pytest.raises(UnsupportedModelError, match=r"mine does not fit .* height 3, .* has 4"):
        check_sizes(selector, {"width": (3, 3), "height": (3, 4)})
