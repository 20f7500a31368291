"""Where the reference is wrong, the check knows it and compares everything else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flexselect.scripts import fixture_families
from flexselect.tests.paths import needs_fixtures
from flexselect.tests.scripts.golden import (
    SELF,
    cases,
    edit_meta,
    perturb,
    run,
)

pytestmark = [needs_fixtures, pytest.mark.usefixtures("one_thread")]


def internvl_case(tmp_path: Path, suits: Callable[[dict[str, Any]], bool]) -> Path:
    """A copy of the first InternVL case whose meta.json suits."""
    source = next(
        folder
        for folder in cases("internvl2_5")
        if suits(json.loads((folder / "meta.json").read_text()))
    )
    return shutil.copytree(source, tmp_path / "case")


def has_shift(meta: dict[str, Any]) -> bool:
    return any(facts["offset_selector_minus_teacher"] for facts in meta["runs"].values())


def has_memory(meta: dict[str, Any]) -> bool:
    return meta["max_position_embeddings"] < meta["total_vision_tokens"] and meta["num_sets"] > 1


def test_the_shifted_gather_is_compared_as_shifted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = internvl_case(tmp_path, has_shift)
    code, found = run(capsys, case)
    assert code == 0
    (shifted,) = [
        runs for reason, runs in found["cases"][0]["known"].items() if "cut the frames" in reason
    ]
    meta = json.loads((case / "meta.json").read_text())
    assert set(shifted) == {
        name for name, facts in meta["runs"].items() if facts["offset_selector_minus_teacher"]
    }

    for name in shifted:
        meta["runs"][name]["offset_selector_minus_teacher"] = 0
    edit_meta(case, **meta)
    code, found = run(capsys, case)
    (report,) = found["cases"]
    assert code == 1
    wrong = {name for name, entry in report["quantities"].items() if not entry["ok"]}
    assert {"inputs_embeds", "logits"} <= wrong
    assert not wrong & {"scores", "selected", "mask", "selector_inputs_embeds", "position_ids"}
    assert {line.split(": ")[1].rpartition(".")[0] for line in report["mismatches"]} == set(shifted)


def test_what_the_rope_does_not_remember_is_still_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = internvl_case(tmp_path, has_memory)
    last = json.loads((case / "meta.json").read_text())["num_sets"] - 1
    perturb(case, "expected", f"{SELF}.set{last}.scores", 4e-5)
    code, found = run(capsys, case)
    (report,) = found["cases"]
    assert code == 0
    assert f"{SELF}.set{last}.scores" in report["skipped"]["see what is known of this run"]
    assert report["quantities"]["scores"]["compared"] >= last

    for key in ("set0.scores", "inputs_embeds", "logits"):
        perturb(case, "expected", f"{SELF}.{key}", 2e-4)
    code, found = run(capsys, case)
    assert code == 1
    assert [line.split(": ")[1] for line in sorted(found["cases"][0]["mismatches"])] == [
        f"{SELF}.inputs_embeds",
        f"{SELF}.logits",
        f"{SELF}.set0.scores",
    ]

    monkeypatch.setattr(fixture_families, "_remembered", lambda config, lengths: set())
    code, found = run(capsys, case)
    assert any(f"{SELF}.set{last}.scores" in line for line in found["cases"][0]["mismatches"])


def test_attention_that_sees_ahead_is_what_makes_the_eager_runs_agree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = internvl_case(tmp_path, lambda meta: meta["num_sets"] > 1 and not has_memory(meta))
    monkeypatch.setattr(fixture_families.InternVLFixtures, "_sees_ahead", lambda self, run: False)
    code, found = run(capsys, case)
    assert code == 1
    lines = found["cases"][0]["mismatches"]
    assert all(line.split(": ")[1].startswith("lite_internlm2_eager.") for line in lines)
    assert any(line.startswith("scores: ") for line in lines)


def test_a_rope_remembers_only_what_is_longer_than_it_was_trained_for() -> None:
    dynamic = SimpleNamespace(rope_parameters={"rope_type": "dynamic"}, max_position_embeddings=48)
    assert fixture_families._remembered(dynamic, [66, 66, 60, 69, 50]) == {2, 4}
    assert fixture_families._remembered(dynamic, [48, 40, 30]) == set()
    assert fixture_families._remembered(dynamic, [49, 30]) == {1}
    plain = SimpleNamespace(rope_parameters={"rope_type": "default"}, max_position_embeddings=48)
    assert fixture_families._remembered(plain, [66, 60]) == set()
