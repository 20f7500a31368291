"""A folder that cannot be checked is an error, named, and no success."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from flexselect.scripts import check_fixture
from flexselect.tests.paths import needs_fixtures
from flexselect.tests.scripts.golden import (
    SELF,
    edit,
    edit_meta,
    run,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def empty_checkpoint(folder: Path) -> None:
    folder.unlink()
    folder.mkdir()
    (folder / "config.json").write_text("{}")


def drop(folder: Path, prefix: str) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(prefix)]:
            del tensors[key]

    edit(folder, "expected", change)


#: What is damaged, how, and what the error must say.
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut JSON": (lambda case: truncate(case / "meta.json"), "meta.json is not JSON"),
    "not text": (
        lambda case: (case / "meta.json").write_bytes(b'{"arch": "\xff\xfe"}'),
        "meta.json is not JSON",
    ),
    "another format": (
        lambda case: (case / "meta.json").write_text('["no case"]'),
        "meta.json describes no case",
    ),
    "unknown family": (lambda case: edit_meta(case, arch="llava_image"), "arch is 'llava_image'"),
    "budget": (
        lambda case: edit_meta(case, tkn_budget="84"),
        "tkn_budget must be a whole number, got '84'",
    ),
    "run without tensors": (
        lambda case: edit_meta(case, runs={"self.token_selection_argmax": {}}),
        "runs without tensors: self.token_selection_argmax",
    ),
    "no run": (lambda case: drop(case, ""), "expected.safetensors has no run"),
    "selector": (lambda case: (case / "selector").unlink(), "selector/ is missing"),
    "model": (lambda case: (case / "model").unlink(), "model/ is missing"),
    "checkpoint": (lambda case: empty_checkpoint(case / "model"), "/model holds a model of type"),
    "no inputs": (
        lambda case: (case / "inputs.safetensors").unlink(),
        "inputs.safetensors cannot be read",
    ),
    "cut tensors": (
        lambda case: truncate(case / "expected.safetensors"),
        "expected.safetensors cannot be read",
    ),
    "one tensor": (
        lambda case: drop(case, f"{SELF}.logits"),
        f"expected.safetensors has no tensor {SELF}.logits",
    ),
    "sets": (lambda case: drop(case, f"{SELF}.set"), f"has no sets of {SELF}"),
    "a set between": (lambda case: drop(case, f"{SELF}.set1."), "has only the sets [0, "),
}


@needs_fixtures
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_case_is_an_error_that_names_the_damage(
    case: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    damage, message = DAMAGES[kind]
    damage(case)
    assert check_fixture.main([str(case)]) == 2
    captured = capsys.readouterr()
    (line,) = [line for line in captured.out.splitlines() if line.startswith("  error: ")]
    assert message in line
    assert "Traceback" not in captured.err
    assert captured.out.endswith("1 not checked: exit code 2\n")


@needs_fixtures
def test_other_folders_are_checked_beside_a_damaged_one(
    case: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also: cases are found at any depth, through links, and a link back does not trap."""
    below = tmp_path / "some" / "where"
    below.mkdir(parents=True)
    (below / "good").symlink_to(case)
    (below / "loop").symlink_to(tmp_path / "some")
    (below / "bad").mkdir()
    (below / "bad" / "meta.json").write_text("{")
    (below / "loss").mkdir()
    (below / "loss" / "meta.json").write_text("[]")
    (below / "loss" / "spearman.safetensors").touch()
    code, found = run(capsys, tmp_path / "some", tmp_path / "nowhere")
    assert code == 2
    status = {Path(report["folder"]).name: report["status"] for report in found["cases"]}
    assert status == {
        "good": "agrees",
        "bad": "not checked",
        "loss": "skipped",
        "nowhere": "not checked",
    }
    assert "is no folder" in found["cases"][-1]["error"]


def test_a_crash_of_the_library_is_no_success(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(folder: Path) -> Any:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(check_fixture, "read_case", crash)
    (tmp_path / "meta.json").touch()
    assert check_fixture.main([str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert "broke off with RuntimeError: out of luck" in captured.out
    assert "Traceback" in captured.err


def test_nothing_checked_is_no_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_fixture.main([str(tmp_path)]) == 2
    assert "has no folder with a meta.json" in capsys.readouterr().out
    (tmp_path / "meta.json").write_text("[]")
    (tmp_path / "spearman.safetensors").touch()
    assert check_fixture.main([str(tmp_path)]) == 2
    assert "skipped" in capsys.readouterr().out
