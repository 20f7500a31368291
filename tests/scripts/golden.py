"""Cases of the golden data, and damaged copies of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flexselect.scripts import check_fixture
from flexselect.scripts.fixture_families import FAMILIES
from flexselect.tests.paths import FIXTURES

#: The runs that are left of the case that tests damage.
SELF, LITE = "self.token_selection", "lite.token_selection_mean"

Edit = Callable[[dict[str, Tensor]], object]


def cases(arch: str | None = None) -> list[Path]:
    """Folders of the golden data with a case of a known family."""
    found = []
    for file in sorted(FIXTURES.rglob("meta.json")):
        meta = json.loads(file.read_text())
        if isinstance(meta, dict) and meta["arch"] in ([arch] if arch else FAMILIES):
            found.append(file.parent)
    return found


def edit(folder: Path, name: str, change: Edit) -> None:
    """Rewrite a file of tensors."""
    file = folder / f"{name}.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({key: value.contiguous() for key, value in tensors.items()}, file)


def edit_meta(folder: Path, **changes: Any) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, **changes}))


def run(capsys: pytest.CaptureFixture[str], *folders: Path) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON of one call."""
    code = check_fixture.main([*map(str, folders), "--json"])
    return code, json.loads(capsys.readouterr().out)


def perturb(folder: Path, file: str, key: str, change: float) -> None:
    """Change the last number of a tensor."""

    def change_last(tensors: dict[str, Tensor]) -> None:
        last = tensors[key].view(-1)[-1:]
        if last.dtype == torch.bool:
            last.logical_not_()
        else:
            last.add_(change)

    edit(folder, file, change_last)
