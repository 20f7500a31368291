"""Fixtures of the testbed's tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture
def media() -> Path:
    """Folder of real videos and V-NIAH needle images."""
    root = Path(__file__).resolve().parents[2]
    folder = Path(os.environ.get("FLEXSELECT_SHARED", root.parent / "shared")) / "media"
    if not folder.is_dir():
        pytest.skip(f"no real media at {folder}; set FLEXSELECT_SHARED")
    return folder
