"""A tiny model, its processor as loaded from disk, a selector beside it, and an opened film."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import flexselect

from .films import (
    FAMILY,
    PICTURES,
    Watch,
    film,
    open_clip,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("session")


@pytest.fixture(scope="module")
def clip(folder: Path) -> Path:
    return film(folder / "clip.mp4", PICTURES)


@pytest.fixture(scope="module")
def stock() -> Any:
    """The model as it is; never applied to, never changed."""
    return FAMILY.model()


@pytest.fixture
def model(stock: Any) -> Any:
    return copy.deepcopy(stock)


@pytest.fixture(scope="module")
def processor(folder: Path) -> Any:
    """A processor that was saved and loaded, as a user's is."""
    stock = FAMILY.model()
    stock.save_pretrained(folder / "model")
    FAMILY.processor().save_pretrained(folder / "model")
    return flexselect.load_processor(folder / "model")


@pytest.fixture(scope="module")
def selector_folder(folder: Path, stock: Any) -> Path:
    FAMILY.selector(stock).save_pretrained(folder / "selector")
    return folder / "selector"


@pytest.fixture(scope="module")
def opened(stock: Any, processor: Any, clip: Path) -> flexselect.Video:
    return open_clip(stock, processor, clip)


@pytest.fixture
def watch(stock: Any) -> Iterator[Watch]:
    watch = Watch(stock)
    yield watch
    watch.handle.remove()
