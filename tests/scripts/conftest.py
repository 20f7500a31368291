"""A small case of the golden data that a test may damage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexselect.tests.scripts.golden import LITE, SELF, cases


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny models: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2.5-VL case with several sets, cut down to two of its runs."""
    source = next(
        folder
        for folder in cases("qwen2_5_vl")
        if any(".set1." in key for key in load_file(folder / "expected.safetensors"))
    )
    folder = tmp_path_factory.mktemp("golden") / "no name that means anything"
    shutil.copytree(source, folder)
    other = ("self.token_selection_mean.", "lite.token_selection.")
    expected = load_file(folder / "expected.safetensors")
    kept = {key: value for key, value in expected.items() if not key.startswith(other)}
    save_file(kept, folder / "expected.safetensors")
    meta = json.loads((folder / "meta.json").read_text())
    meta["runs"] = {name: meta["runs"][name] for name in (SELF, LITE)}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture
def case(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage; the checkpoints in it are shared."""
    folder = tmp_path / "case"
    folder.mkdir()
    for path in original.iterdir():
        if path.is_dir():
            (folder / path.name).symlink_to(path)
        else:
            shutil.copy(path, folder)
    return folder
