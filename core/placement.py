"""Where the parts of a model go: a device map spelled out, and a filled model spread by it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map
from torch import nn

from .checkpoint import some
from .errors import OptionError

DeviceMap = str | int | torch.device | Mapping[str, str | int | torch.device]


class Placement:
    """The device of every parameter of a model.

    Parameters
    ----------
    model : a transformers model, its parameters may be on the meta device.
    device_map : a device, ``"auto"``, or module name to device, as in ``from_pretrained``; None
        for the CPU.

    Attributes
    ----------
    devices : module name to device, spelled out; ``""`` stands for the whole model.

    Raises
    ------
    OptionError
        A part of the model has no device, or does not fit the memory.
    """

    def __init__(self, model: Any, device_map: DeviceMap | None) -> None:
        devices: dict[str, Any]
        if device_map == "auto":
            devices = infer_auto_device_map(
                model,
                no_split_module_classes=sorted(model._no_split_modules or ()),
                dtype=model.config.dtype,
            )
        elif device_map is None:
            devices = {"": "cpu"}
        elif isinstance(device_map, str | int | torch.device):
            devices = {"": device_map}
        else:
            devices = dict(device_map)
        if "disk" in devices.values():
            raise OptionError(
                "The model does not fit the memory of this machine's devices. Convert the "
                "checkpoint and load the result with from_pretrained and an offload_folder."
            )
        names = [name for name, _ in model.named_parameters()]
        uncovered = sorted(name for name in names if not _covering(name, devices))
        if uncovered:
            raise OptionError(
                f"device_map has no device for {some(uncovered)}. Add an entry for their modules."
            )
        # accelerate compares devices by name and takes any other spelling of the CPU for a GPU.
        self.devices = {module: str(torch.device(device)) for module, device in devices.items()}

    def __call__(self, name: str) -> str:
        """Return the device of the parameter ``name``."""
        return self.devices[max(_covering(name, self.devices), key=len)]

    def spread(self, model: Any) -> Any:
        """Move what is elsewhere, such as buffers, and connect parts on different devices."""
        devices = set(self.devices.values())
        if len(devices) == 1:
            return model.to(devices.pop())
        if devices == {self.devices.get(""), "meta"}:
            return self._spread_around(model)
        return dispatch_model(model, self.devices)

    def _spread_around(self, model: Any) -> Any:
        """Move a model to its one device, around the modules that stay without values."""
        unread = [module for module, device in self.devices.items() if device == "meta"]
        aside = {name: model.get_submodule(name) for name in unread}
        for name in unread:
            model.set_submodule(name, nn.Module())
        model.to(self.devices[""])
        for name, module in aside.items():
            model.set_submodule(name, module.to("meta"))
        return model


def _covering(name: str, devices: Mapping[str, Any]) -> list[str]:
    return [module for module in devices if not module or f"{name}.".startswith(f"{module}.")]
