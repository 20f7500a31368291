"""The golden-data check passes on the golden data, and on nothing that differs from it.

A perturbed copy of a case must fail naming the quantity; otherwise the check proves nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flexselect.qwen2_5_vl.architecture import Qwen2_5_VL
from flexselect.scripts import check_fixture
from flexselect.tests.paths import FIXTURES, ROOT, needs_fixtures
from flexselect.tests.scripts.golden import (
    LITE,
    SELF,
    cases,
    edit,
    edit_meta,
    perturb,
    run,
)

pytestmark = [needs_fixtures, pytest.mark.usefixtures("one_thread")]


@pytest.mark.parametrize(
    "folder", cases() if FIXTURES.is_dir() else [], ids=lambda f: f"{f.parent.name}/{f.name}"
)
def test_every_case_agrees(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = run(capsys, folder)
    (report,) = found["cases"]
    assert (code, report["status"], report["mismatches"]) == (0, "agrees", []), report
    answers = [key for key in load_file(folder / "expected.safetensors") if key.endswith(".tokens")]
    assert report["quantities"]["tokens"]["compared"] >= len(answers)
    assert "no quantity of this name is known" not in report["skipped"]


def test_the_command_agrees_and_prints_every_quantity(case: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "check_fixture.py"), str(case)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=case.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    for quantity in ("scores", "selected", "inputs_embeds", "position_ids", "logits", "tokens"):
        assert f"\n  ok       {quantity} " in done.stdout, done.stdout
    assert "overwrote the caller's video_grid_thw" in done.stdout
    assert done.stdout.endswith("1 agrees: exit code 0\n")


#: One number of each quantity: file, tensor, quantity, and by how much the number is changed.
PERTURBED: list[tuple[str, str, str, float]] = [
    ("inputs", "vision_features", "vision_features", 2e-4),
    ("inputs", "vision_features_selector", "vision_features_selector", 2e-4),
    ("expected", "self.selector_inputs_embeds", "selector_inputs_embeds", 2e-4),
    ("expected", "lite.selector_inputs_embeds", "selector_inputs_embeds", -2e-4),
    ("expected", f"{SELF}.set1.scores", "scores", 4e-5),
    ("expected", f"{LITE}.set0.scores", "scores", -4e-5),
    ("expected", f"{SELF}.set0.frame_indices", "frame_indices", 1),
    ("expected", f"{LITE}.set1.mask", "mask", 1),
    ("expected", "set1.position_ids", "set_position_ids", 1),
    ("expected", f"{SELF}.selected", "selected", 1),
    ("expected", f"{SELF}.inputs_embeds", "inputs_embeds", 2e-4),
    ("expected", f"{LITE}.position_ids", "position_ids", 1),
    ("expected", f"{LITE}.decode_position_ids", "decode_position_ids", 1),
    ("expected", f"{SELF}.logits", "logits", 2e-4),
    ("expected", f"{LITE}.step_logits", "step_logits", 2e-4),
    ("expected", f"{LITE}.tokens", "tokens", 1),
    ("expected", "baseline.inputs_embeds", "inputs_embeds", 2e-4),
    ("expected", "baseline.position_ids", "position_ids", 1),
    ("expected", "baseline.decode_position_ids", "decode_position_ids", 1),
    ("expected", "baseline.rope_deltas", "rope_deltas", 1),
    ("expected", "baseline.logits", "logits", -2e-4),
    ("expected", "baseline.step_logits", "step_logits", 2e-4),
    ("expected", "baseline.tokens", "tokens", 1),
]


def test_every_wrong_number_is_found(case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file, key, _, change in PERTURBED:
        perturb(case, file, key, change)
    code, found = run(capsys, case)
    (report,) = found["cases"]
    assert (code, report["status"]) == (1, "differs")
    for _, key, quantity, _ in PERTURBED:
        lines = [line for line in report["mismatches"] if line.startswith(f"{quantity}: ")]
        assert any(f" {key}: " in line for line in lines), (quantity, key, report["mismatches"])
        assert not report["quantities"][quantity]["ok"]
    wrong = {key for _, key, _, _ in PERTURBED}
    for line in report["mismatches"]:
        assert any(f" {key}: " in line for key in wrong), line


@pytest.mark.parametrize(("file", "key", "quantity", "change"), PERTURBED[4::6])
def test_one_wrong_number_is_enough(
    case: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    key: str,
    quantity: str,
    change: float,
) -> None:
    perturb(case, file, key, change)
    assert check_fixture.main([str(case)]) == 1
    out = capsys.readouterr().out
    assert f"  DIFFERS  {quantity} " in out
    assert f"  DIFFERS  {quantity}: {key}: " in out
    assert out.count("DIFFERS") == 2
    assert out.endswith("1 differs: exit code 1\n")


def test_rounding_is_no_mismatch(case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file, key, _, change in PERTURBED:
        if abs(change) < 1:
            perturb(case, file, key, change / 4)
    code, found = run(capsys, case)
    assert (code, found["cases"][0]["mismatches"]) == (0, [])
    assert found["cases"][0]["quantities"]["scores"]["worst"] > 5e-6


def test_another_layout_is_found(case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = (
        "num_frames",
        "total_vision_tokens",
        "tokens_per_frame",
        "prefix_len",
        "suffix_len",
        "num_sets",
    )
    meta = json.loads((case / "meta.json").read_text())
    edit_meta(case, **{name: meta[name] + 1 for name in names})
    code, found = run(capsys, case)
    (report,) = found["cases"]
    assert code == 1
    for name in names:
        assert any(line.startswith(f"layout: meta.json: {name}: ") for line in report["mismatches"])


@pytest.mark.parametrize(
    ("key", "change"),
    [
        (f"{SELF}.set0.scores", lambda scores: scores[:-1]),
        (f"{SELF}.set0.scores", lambda scores: scores.index_fill(0, torch.tensor(3), torch.nan)),
        (f"{SELF}.set0.scores", lambda scores: scores.index_fill(0, torch.tensor(3), torch.inf)),
        (f"{LITE}.selected", lambda selected: selected[:-1]),
    ],
    ids=["shape", "not a number", "infinite", "one kept less"],
)
def test_what_is_no_difference_of_numbers_is_found(
    case: Path,
    capsys: pytest.CaptureFixture[str],
    key: str,
    change: Callable[[Tensor], Tensor],
) -> None:
    edit(case, "expected", lambda tensors: tensors.update({key: change(tensors[key])}))
    code, found = run(capsys, case)
    assert code == 1
    (line,) = found["cases"][0]["mismatches"]
    assert f" {key}: " in line
    quantity = key.rpartition(".")[2]
    assert found["cases"][0]["quantities"][quantity]["worst"] is None


def test_a_set_too_many_is_found(case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    number = json.loads((case / "meta.json").read_text())["num_sets"]

    def add(tensors: dict[str, Tensor]) -> None:
        for name in ("scores", "mask", "frame_indices"):
            tensors[f"{SELF}.set{number}.{name}"] = tensors[f"{SELF}.set0.{name}"].clone()

    edit(case, "expected", add)
    code, found = run(capsys, case)
    assert code == 1
    assert [line.split(":")[0] for line in found["cases"][0]["mismatches"]] == ["sets"]


def test_a_program_that_ranks_otherwise_is_found(
    case: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def neighbours(frames: int, frames_per_set: int) -> list[Tensor]:
        return list(torch.arange(frames).split(frames_per_set))

    monkeypatch.setattr("flexselect.inference.scoring.frame_sets", neighbours)
    code, found = run(capsys, case)
    (report,) = found["cases"]
    assert code == 1
    assert {"frame_indices", "scores", "selected", "inputs_embeds", "position_ids"} <= {
        name for name, entry in report["quantities"].items() if not entry["ok"]
    }
    assert report["quantities"]["vision_features"]["ok"]
    assert not any("baseline" in line for line in report["mismatches"])


def test_a_program_that_writes_to_the_callers_tensors_is_found(
    case: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Qwen2_5_VL.read

    def overwrite(self: Qwen2_5_VL, inputs: Any) -> Any:
        requests = read(self, inputs)
        inputs["second_per_grid_ts"].mul_(1.0).add_(0.5)
        return requests

    monkeypatch.setattr(Qwen2_5_VL, "read", overwrite)
    code, found = run(capsys, case)
    assert code == 1
    lines = found["cases"][0]["mismatches"]
    assert any(line.startswith("caller_inputs: second_per_grid_ts: ") for line in lines)


def test_a_tensor_nobody_compares_is_named(case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(case, "expected", lambda tensors: tensors.update({"self.unheard_of": torch.ones(1)}))
    assert check_fixture.main([str(case)]) == 0
    line = "  skipped  expected.safetensors self.unheard_of: no quantity of this name is known\n"
    assert line in capsys.readouterr().out


def test_scores_are_compared_where_the_budget_just_holds_everything(
    case: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reference scores then, and keeps all of every set; we keep all without scoring."""
    meta = json.loads((case / "meta.json").read_text())
    total = meta["total_vision_tokens"]
    edit_meta(case, tkn_budget=total)

    def keep_all(tensors: dict[str, Tensor]) -> None:
        for name in (SELF, LITE):
            tensors[f"{name}.selected"] = torch.arange(total)
            for key in tensors:
                if key.startswith(f"{name}.set") and key.endswith(".mask"):
                    tensors[key] = torch.ones_like(tensors[key])
                elif key.startswith("baseline.") and not key.endswith("rope_deltas"):
                    answer = key.removeprefix("baseline.")
                    tensors[f"{name}.{answer}"] = tensors[key].clone()

    edit(case, "expected", keep_all)
    code, found = run(capsys, case)
    assert (code, found["cases"][0]["mismatches"]) == (0, [])
    assert found["cases"][0]["quantities"]["scores"]["compared"] == 2 * meta["num_sets"]

    perturb(case, "expected", f"{SELF}.set1.scores", 4e-5)
    code, found = run(capsys, case)
    assert code == 1
    assert [line.split(":")[0] for line in found["cases"][0]["mismatches"]] == ["scores"]
