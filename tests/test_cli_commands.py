"""The commands ``flexselect models`` and ``flexselect convert``, and the options of ``ask``."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import typer
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

import flexselect
from flexselect.cli import app, ask
from flexselect.inference.methods import METHODS, Positions, Query
from flexselect.inference.policy import SAMPLING
from flexselect.inference.presets import FOLDER, load_presets
from flexselect.inference.registry import CHECKPOINTS, FAMILIES
from flexselect.inference.terminal import stamp
from flexselect.tests.architectures.factories import FAMILIES as UNDER_CONTRACT
from flexselect.tests.llava_video.conftest import tokenizer as tokenizer_fixture
from flexselect.tests.llava_video.test_convert import original
from flexselect.tests.paths import FIXTURES, SMALL_MEDIA, needs_fixtures

COMMAND = Path(sys.executable).with_name("flexselect")
VIDEO = SMALL_MEDIA / "h265_video.mp4"
tokenizer = tokenizer_fixture


def run(*arguments: Any) -> Result:
    """Run the command in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(result: Result, *words: str) -> None:
    """The command said why in one line, and ended with 1."""
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.stdout == ""
    [line] = [line for line in result.stderr.splitlines() if line.startswith("flexselect: ")]
    for word in words:
        assert word in line


# -- models --------------------------------------------------------------------------------------


def test_models_as_json() -> None:
    result = run("models", "--json")
    assert result.exit_code == 0
    rows = json.loads(result.stdout)
    assert {row["model"]: row["family"] for row in rows} == {
        name: family for name, (family, _) in FAMILIES.items()
    }
    kinds = {kind: row["model"] for row in rows for kind in row["model_types"]}
    assert kinds == CHECKPOINTS
    shown = {preset["name"]: preset for row in rows for preset in row["presets"]}
    assert set(shown) == {preset.name for preset in load_presets(FOLDER)}
    for preset in load_presets(FOLDER):
        said = dict(shown[preset.name])
        assert {name: said.pop(name) for name in ("match", "video", "source")} == {
            "match": preset.match,
            "video": preset.video,
            "source": preset.source,
        }
        assert said == {"name": preset.name, **preset.method}


def test_models_for_people() -> None:
    """In a process of its own, as its user runs it."""
    done = subprocess.run(
        [COMMAND, "models"], capture_output=True, text=True, check=True, timeout=120
    )
    lines = done.stdout.splitlines()
    for name, (family, _) in FAMILIES.items():
        assert any(line.startswith(f"{family}  {name}  model_type ") for line in lines)
    for preset in load_presets(FOLDER):
        [line] = [line for line in lines if line.split()[:1] == [preset.name] and "layer" in line]
        layer = preset.method.get("layer")
        assert ("% of depth" in line) == (layer is None)
        assert f"budget {preset.method['budget']:,}, max" in line
        assert layer is None or f"layer {layer}," in line
        assert all(f"{name} {value}" in line for name, value in preset.video.items())


# -- convert -------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path, tokenizer: Any) -> Path:
    """A tiny LLaVA-Video in its authors' layout, with its tokenizer."""
    original(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def test_convert(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    result = run("convert", source, target)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{target}\n"
    assert "convert" in result.stderr
    here = flexselect.load_model(target, device="cpu")
    there = flexselect.load_model(source, device="cpu")
    expected = there.state_dict()
    assert here.state_dict().keys() == expected.keys()
    for name, value in here.state_dict().items():
        assert torch.equal(value, expected[name]), name
    text = "<video>\nWhat?"
    video = torch.arange(2 * 3 * 8 * 8).view(2, 3, 8, 8).to(torch.uint8)
    ours, theirs = (
        flexselect.load_processor(folder)(text=text, videos=[video], return_tensors="pt")
        for folder in (target, source)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_convert_in_a_process_to_another_dtype(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    done = subprocess.run(
        [COMMAND, "convert", source, target, "--dtype", "bfloat16", "--quiet"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{target}\n"
    assert "━" not in done.stderr
    tensors = load_file(target / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_convert_replaces_only_when_told(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "keep.txt").write_text("mine")
    refused(run("convert", source, target), str(target), "--overwrite")
    refused(run("convert", source, target, "--overwrite"), "holds no checkpoint")
    assert [path.name for path in target.iterdir()] == ["keep.txt"]
    (target / "config.json").write_text("{}")
    assert run("convert", source, target, "--overwrite").exit_code == 0
    assert (target / "model.safetensors").is_file()
    assert not (target / "keep.txt").exists()


def test_convert_refuses(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    refused(run("convert", tmp_path / "nowhere", target), "nowhere is no folder")
    refused(run("convert", "someone/something", target), "and name the folder")
    refused(run("convert", source, target, "--dtype", "int8"), "dtype must be", "int8")
    stock = tmp_path / "stock"
    stock.mkdir()
    (stock / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    refused(run("convert", stock, target), "needs no conversion")
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    refused(run("convert", source, target), "model.safetensors")
    assert not target.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "stock"]


@needs_fixtures
def test_convert_a_golden_checkpoint(tmp_path: Path) -> None:
    folder = FIXTURES / "llava_video" / "a_single" / "model"
    result = run("convert", folder, tmp_path / "target", "--quiet")
    assert result.exit_code == 0, result.stderr
    model = flexselect.load_model(tmp_path / "target", device="cpu")
    expected = flexselect.load_model(folder, device="cpu").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


# -- ask: options and methods --------------------------------------------------------------------


def parameters() -> dict[str, Any]:
    command: Any = typer.main.get_command(app)
    return {parameter.name: parameter for parameter in command.commands["ask"].params}


def test_ask_has_an_option_for_every_knob_and_every_way_of_sampling() -> None:
    knobs = {name for method in METHODS.values() for name in inspect.signature(method).parameters}
    # The command is one process, with nobody to share sets with.
    knobs.remove("share_sets")
    options = set(parameters())
    assert knobs | set(SAMPLING) <= options
    assert set(inspect.signature(ask).parameters) == options - {"help"}


def test_choices_are_those_of_the_library() -> None:
    help_text = CliRunner().invoke(app, ["ask", "--help"], env={"COLUMNS": "120"}).stdout
    for choices in (tuple(METHODS), get_args(Query), get_args(Positions)):
        assert "|".join(choices) in "".join(help_text.split())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2.5-VL with its processor."""
    folder = tmp_path_factory.mktemp("model")
    family = next(family for family in UNDER_CONTRACT if family.name == "qwen2_5_vl")
    family.model().save_pretrained(folder)
    family.processor().save_pretrained(folder)
    return folder


def decided(model: Path, *options: Any) -> dict[str, Any]:
    """Ask about a small video, and return what decided the answer."""
    size = ["--min-pixels", 768, "--max-pixels", 1536, "--device", "cpu", "--max-new-tokens", 1]
    result = run("ask", VIDEO, "What?", "--model", model, *size, *options, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)["decided_by"]


def test_knobs_and_bounds_reach_the_answer(model: Path) -> None:
    drawn = ["--method", "random", "--budget", 32, "--frames", 10]
    assert decided(model, *drawn, "--seed", 3)["seed"] == 3
    assert decided(model, *drawn)["seed"] == 0
    ranked = ["--budget", 32, "--layer", 1, "--frames-per-set", 2, "--sets-per-batch", 1]
    bounds = ["--fps", 0.1, "--min-frames", 6, "--max-frames", 20]
    settings = decided(model, *ranked, *bounds)
    assert (settings["sets_per_batch"], settings["pictures"]) == (1, 6)
    assert settings["sampling"]["min_frames"] == 6


def test_a_missing_processor_costs_no_loading(model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    result = run("ask", VIDEO, "What?", "--model", tmp_path)
    refused(result, f"{tmp_path} holds no whole processor")


@pytest.mark.parametrize("option", ["--seed", "--sets-per-batch"])
def test_a_knob_of_another_method(option: str, tmp_path: Path) -> None:
    result = run("ask", "x.mp4", "?", "--model", tmp_path, "--method", "uniform", option, 1)
    refused(result, f"uniform has no knob {option.strip('-').replace('-', '_')}")


def test_a_lower_bound_needs_a_rate(tmp_path: Path) -> None:
    options = ["--frames", 4, "--min-frames", 2]
    refused(run("ask", "x.mp4", "?", "--model", tmp_path, *options), "leave out min_frames")


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0:00.0"),
        (9.04, "0:09.0"),
        (59.94, "0:59.9"),
        (59.96, "1:00.0"),
        (60, "1:00.0"),
        (3599.97, "1:00:00.0"),
        (3661.25, "1:01:01.2"),
        (7325.5, "2:02:05.5"),
    ],
)
def test_time_stamps(seconds: float, said: str) -> None:
    assert stamp(seconds) == said
