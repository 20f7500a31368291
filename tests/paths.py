"""Where test data lies, and marks that skip a test whose data is not on this machine.

`FLEXSELECT_SHARED` names a folder with ``fixtures/`` (golden data) and ``media/`` (real videos and
needle images); by default it is the folder ``shared`` beside the repository.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("FLEXSELECT_SHARED") or ROOT.parent / "shared").resolve()
FIXTURES = SHARED / "fixtures"
MEDIA = SHARED / "media"

#: Small videos of the repository itself: always there, see its README.
SMALL_MEDIA = ROOT / "tests" / "media"

needs_fixtures = pytest.mark.skipif(
    not FIXTURES.is_dir(), reason=f"no golden data at {FIXTURES}; set FLEXSELECT_SHARED"
)
needs_media = pytest.mark.skipif(
    not MEDIA.is_dir(), reason=f"no real videos at {MEDIA}; set FLEXSELECT_SHARED"
)
