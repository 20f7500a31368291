"""What the README says was measured is what the results file of the study holds."""

from __future__ import annotations

import json
import re

import pytest

from flexselect.tests.paths import ROOT

RESULTS = ROOT / "docs" / "testbed.json"


@pytest.mark.skipif(not RESULTS.is_file(), reason="the study's results are not in this tree")
def test_the_readmes_figures_are_the_studys() -> None:
    found = json.loads(RESULTS.read_text())["qwen2_5_vl"]
    section = (
        (ROOT / "README.md").read_text().split("## What the testbed shows")[1].split("\n## ")[0]
    )
    rows = re.findall(r"^\| (.+?) \| [\d,]+ \| \**(\.\d\d)\** \|$", section, re.M)
    assert len(rows) == 6
    for method, share in rows:
        cell = found[f"test/512/retrieval/{method}"]
        measured = cell["right"] / cell["asked"]
        # More questions may have been asked since; then the last digit may differ.
        assert abs(float(share) - measured) < 0.02, f"{method}: {measured:.2f} in docs/testbed.json"
