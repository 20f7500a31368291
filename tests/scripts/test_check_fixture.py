"""The golden-data check passes on the golden data, and on nothing that differs from it.

A perturbed copy of a case must fail naming the quantity; otherwise the check proves nothing.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flexselect.qwen2_5_vl.architecture import Qwen2_5_VL
from flexselect.scripts import check_fixture, fixture_families
from flexselect.scripts.fixture_families import FAMILIES
from flexselect.tests.paths import FIXTURES, ROOT, needs_fixtures

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


@pytest.fixture(autouse=True)
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


@needs_fixtures
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


@needs_fixtures
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


def perturb(folder: Path, file: str, key: str, change: float) -> None:
    """Change the last number of a tensor."""

    def change_last(tensors: dict[str, Tensor]) -> None:
        last = tensors[key].view(-1)[-1:]
        if last.dtype == torch.bool:
            last.logical_not_()
        else:
            last.add_(change)

    edit(folder, file, change_last)


@needs_fixtures
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


@needs_fixtures
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


@needs_fixtures
def test_rounding_is_no_mismatch(case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file, key, _, change in PERTURBED:
        if abs(change) < 1:
            perturb(case, file, key, change / 4)
    code, found = run(capsys, case)
    assert (code, found["cases"][0]["mismatches"]) == (0, [])
    assert found["cases"][0]["quantities"]["scores"]["worst"] > 5e-6


@needs_fixtures
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


@needs_fixtures
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


@needs_fixtures
def test_a_set_too_many_is_found(case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    number = json.loads((case / "meta.json").read_text())["num_sets"]

    def add(tensors: dict[str, Tensor]) -> None:
        for name in ("scores", "mask", "frame_indices"):
            tensors[f"{SELF}.set{number}.{name}"] = tensors[f"{SELF}.set0.{name}"].clone()

    edit(case, "expected", add)
    code, found = run(capsys, case)
    assert code == 1
    assert [line.split(":")[0] for line in found["cases"][0]["mismatches"]] == ["sets"]


@needs_fixtures
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


@needs_fixtures
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


@needs_fixtures
def test_a_tensor_nobody_compares_is_named(case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(case, "expected", lambda tensors: tensors.update({"self.unheard_of": torch.ones(1)}))
    assert check_fixture.main([str(case)]) == 0
    line = "  skipped  expected.safetensors self.unheard_of: no quantity of this name is known\n"
    assert line in capsys.readouterr().out


@needs_fixtures
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


@needs_fixtures
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


@needs_fixtures
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


@needs_fixtures
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
