"""What a resumed run needs besides weights: optimiser and schedule, as safetensors and JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..core.errors import CheckpointError

_FILE = "optimizer.safetensors"


def save_optimizer(optimizer: Any, scheduler: Any, folder: Path) -> None:
    """Write the tensors of an optimiser, and the plain values of its groups and the schedule."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for index, slots in state["state"].items():
        for key, value in slots.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value.contiguous()
            else:
                values[f"{index}.{key}"] = value
    plain = {
        "groups": state["param_groups"],
        "values": values,
        "scheduler": {k: v for k, v in scheduler.state_dict().items() if _is_plain(v)},
    }
    save_file(tensors, folder / _FILE, metadata={"plain": json.dumps(plain)})


def load_optimizer(optimizer: Any, scheduler: Any, folder: Path) -> None:
    """Read what `save_optimizer` wrote.

    Raises
    ------
    CheckpointError
        The file is missing.
    """
    path = folder / _FILE
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing: the run was trained in another way (DeepSpeed or FSDP). Resume it "
            "with the same configuration, or start anew in another folder."
        )
    slots: dict[int, dict[str, Any]] = {}
    with safe_open(path, "pt") as file:
        plain = json.loads(file.metadata()["plain"])
        for name in file.keys():  # noqa: SIM118 - not a dict
            index, key = name.split(".", 1)
            slots.setdefault(int(index), {})[key] = file.get_tensor(name)
    for name, value in plain["values"].items():
        index, key = name.split(".", 1)
        slots.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": slots, "param_groups": plain["groups"]})
    scheduler.load_state_dict(plain["scheduler"])


def _is_plain(value: Any) -> bool:
    """Whether JSON holds a value; the schedule's functions are made anew."""
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
