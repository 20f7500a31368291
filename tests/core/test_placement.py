"""Where parts of a model go."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from flexselect.core.errors import OptionError
from flexselect.core.placement import Placement


class Small(nn.Module):
    """A stand-in for a transformers model: what accelerate asks of one."""

    _no_split_modules = ("Linear",)

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 3)
        self.body_two = nn.Linear(3, 3)
        self.head = nn.Linear(3, 2)
        self.register_buffer("table", torch.ones(2))
        self.config = type("Config", (), {"dtype": torch.float32})()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body_two(self.body(x)))


@pytest.mark.parametrize("device_map", [None, "cpu", torch.device("cpu"), {"": "cpu"}])
def test_one_device(device_map: Any) -> None:
    placement = Placement(Small(), device_map)
    assert placement.devices == {"": "cpu"}
    assert placement("body.weight") == "cpu"


def test_the_longest_module_name_decides_and_is_matched_whole() -> None:
    devices = {"": "cpu", "body": "meta", "head": "cpu", "head.weight": "meta"}
    placement = Placement(Small(), devices)
    found = {name: placement(name) for name, _ in Small().named_parameters()}
    assert found == {
        "body.weight": "meta",
        "body.bias": "meta",
        "body_two.weight": "cpu",
        "body_two.bias": "cpu",
        "head.weight": "meta",
        "head.bias": "cpu",
    }


def test_numbers_and_devices_are_spelled_out() -> None:
    placement = Placement(Small(), {"body": 1, "body_two": torch.device("cuda", 0), "head": "cpu"})
    assert placement.devices == {"body": "cuda:1", "body_two": "cuda:0", "head": "cpu"}


def test_auto_covers_every_parameter() -> None:
    model = Small()
    placement = Placement(model, "auto")
    assert all(placement(name) for name, _ in model.named_parameters())


def test_parts_without_a_device_are_named() -> None:
    with pytest.raises(OptionError, match=r"no device for body_two\.bias, body_two\.weight\."):
        Placement(Small(), {"body": "cpu", "head": "cpu"})


def test_the_disk_is_refused() -> None:
    with pytest.raises(OptionError, match="offload_folder"):
        Placement(Small(), {"body": "cpu", "body_two": "cpu", "head": "disk"})


@pytest.mark.parametrize("device_map", ["cpu", {"body": "cpu", "body_two": "cpu", "head": "cpu"}])
def test_spread_on_one_device_leaves_no_hooks(device_map: Any) -> None:
    model = Small()
    assert Placement(model, device_map).spread(model) is model
    assert not any(hasattr(part, "_hf_hook") for part in model.modules())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="spreading over devices needs a GPU")
def test_spread_over_two_devices_computes_the_same() -> None:
    model = Small()
    values = torch.randn(4, 3)
    expected = model(values)
    placement = Placement(model, {"body": "cuda:0", "body_two": "cpu", "head": "cuda:0"})
    for name, weight in model.named_parameters():
        weight.data = weight.data.to(placement(name))
    torch.testing.assert_close(placement.spread(model)(values).cpu(), expected)
