"""The command ``flexselect ask``, as its user runs it: answers, exit codes, and what goes where."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

import flexselect
from flexselect import Selection
from flexselect.cli import app
from flexselect.inference import reading
from flexselect.tests.architectures.factories import FAMILIES
from flexselect.tests.paths import MEDIA, SMALL_MEDIA, needs_media

FAMILY = next(family for family in FAMILIES if family.name == "qwen2_5_vl")
COMMAND = Path(sys.executable).with_name("flexselect")
VIDEO = SMALL_MEDIA / "h265_video.mp4"
QUESTION = "What is shown?"
#: 10 pictures: five frames of 16 visual tokens.
SHORT = [
    *("--frames", "10", "--min-pixels", "768", "--max-pixels", "1536"),
    *("--max-new-tokens", "3", "--device", "cpu"),
]
#: The tokens of two frames may stay: 10 in each of three sets.
SELECT = ["--budget", "32", "--layer", "1", "--frames-per-set", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as it is published: model, processor, tokenizer; and a selector beside it."""
    folder = tmp_path_factory.mktemp("cli")
    model = FAMILY.model()
    model.save_pretrained(folder / "model")
    FAMILY.processor().save_pretrained(folder / "model")
    FAMILY.selector(model).save_pretrained(folder / "selector")
    return folder


def ask(folder: Path, *options: Any, video: Any = VIDEO, question: str = QUESTION) -> Result:
    """Run ``flexselect ask`` in this process."""
    arguments = ["ask", video, question, "--model", folder / "model", *SHORT, *options]
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def report_of(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def plain(text: str) -> str:
    """Text without terminal controls, its lines joined."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    return " ".join(text.replace("│", " ").split())


# -- answers -------------------------------------------------------------------------------------


def test_an_answer_for_people(folder: Path) -> None:
    result = ask(folder, *SELECT)
    said = plain(result.stdout)
    assert result.exit_code == 0
    assert "tokens 80 → 30 visual (38% kept)" in said
    for stage in ("decode", "encode", "rank", "gather", "prefill", "answer"):
        assert re.search(rf"\b{stage} \d+\.\d\d s", said), stage
    assert re.search(r"read from \d:\d\d\.\d - \d:\d\d\.\d \(\d+ tokens, relevance ", said)
    assert f"method flexselect, preset qwen2_5_vl, {folder / 'model'}" in said
    shown = plain(result.stderr)
    for stage in ("load", "decode", "encode", "rank", "answer"):
        assert re.search(rf"\b{stage} ━* ?\d+/", shown), stage
    assert "The answer was cut at --max-new-tokens." in shown


def test_quiet_shows_no_progress(folder: Path) -> None:
    result = ask(folder, *SELECT, "--quiet", "--max-new-tokens", "1")
    assert result.exit_code == 0
    assert "decode" not in result.stderr
    assert "tokens" in result.stdout


def test_one_json_object(folder: Path) -> None:
    report = report_of(ask(folder, *SELECT, "--json"))
    assert list(report) == [
        "answer",
        "cut",
        "question",
        "visual_tokens",
        "kept_tokens",
        "seconds",
        "moments",
        "decided_by",
    ]
    assert (report["question"], report["cut"]) == (QUESTION, True)
    assert (report["visual_tokens"], report["kept_tokens"]) == (80, 30)
    assert list(report["seconds"]) == ["decode", "encode", "rank", "gather", "prefill", "answer"]
    assert report["decided_by"]["budget"] == 32
    assert report["decided_by"]["sampling"]["frames"] == 10
    assert 0 < len(report["moments"]) <= 5
    for moment in report["moments"]:
        frames = {"first_frame", "last_frame"}
        assert set(moment) == {"start", "end", "score", "kept", "video", *frames}


def test_options_reach_method_and_sampling(folder: Path) -> None:
    report = report_of(
        ask(
            folder,
            *SELECT,
            *("--aggregation", "mean", "--query", "last", "--positions", "compact"),
            *("--frames", "8", "--frames-per-chunk", "1", "--moments", "1", "--dtype", "bfloat16"),
            *("--attn", "eager", "--json"),
        )
    )
    decided = report["decided_by"]
    assert {name: decided[name] for name in ("aggregation", "query", "positions", "layer")} == {
        "aggregation": "mean",
        "query": "last",
        "positions": "compact",
        "layer": 1,
    }
    assert decided["dtype"] == "bfloat16"
    assert (decided["pictures"], decided["frames"]) == (8, 4)
    assert len(report["moments"]) == 1


@pytest.mark.parametrize(
    ("options", "kept", "method"),
    [
        (["--method", "full"], 80, "full"),
        (["--method", "uniform", "--budget", "32"], 32, "uniform"),
        (["--method", "random", "--budget", "20"], 32, "random"),
        (["--budget", "80"], 80, "flexselect"),
    ],
)
def test_methods(folder: Path, options: list[str], kept: int, method: str) -> None:
    """None of these ranks, but all are read, and have moments."""
    result = ask(folder, *options)
    said = plain(result.stdout)
    assert result.exit_code == 0
    assert f"tokens 80 → {kept} visual" in said
    assert re.search(r"read from \d:\d\d\.\d - \d:\d\d\.\d \(\d+ tokens, relevance ", said)
    assert f"method {method}," in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--method", "full"], "read from the whole video: nothing was dropped method full,"),
        (["--method", "uniform", "--budget", "32"], "tokens that were not ranked method uniform,"),
    ],
)
def test_without_moments_it_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], said: str
) -> None:
    """As where sliding windows leave no layer to listen to."""
    monkeypatch.setattr(reading, "full_layers", lambda _: [])
    result = ask(folder, *options)
    assert result.exit_code == 0
    assert said in plain(result.stdout)


def test_a_saved_selection_loads(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "selection"
    report = report_of(
        ask(folder, "--budget", "32", "--selector", folder / "selector", "--save", path, "--json")
    )
    found = Selection.load(path)
    assert len(found.kept) == report["kept_tokens"] < found.num_visual == report["visual_tokens"]
    assert found.settings == report["decided_by"]
    assert found.settings["method"] == "flexselect-lite"
    assert found.settings["selector"] == str(folder / "selector")
    assert [vars(moment) for moment in found.moments()] == report["moments"]


def test_the_command_gives_what_the_library_gives(folder: Path) -> None:
    model = flexselect.load_model(folder / "model", device="cpu")
    processor = flexselect.load_processor(folder / "model")
    method = flexselect.FlexSelect(budget=32, layer=1, frames_per_set=2)
    sizes: Any = {"min_pixels": 768, "max_pixels": 1536}
    video = flexselect.open_video(model, processor, VIDEO, method=method, frames=10, **sizes)
    answer = video.ask(QUESTION, max_new_tokens=3)
    report = report_of(ask(folder, *SELECT, "--json"))
    assert report["answer"] == answer.text
    assert report["decided_by"] == answer.selection.settings


# -- help ----------------------------------------------------------------------------------------


def test_help_lists_every_option() -> None:
    command: Any = typer.main.get_command(app)
    said = plain(CliRunner().invoke(app, ["ask", "--help"], env={"COLUMNS": "120"}).stdout)
    parameters = command.commands["ask"].params
    assert len(parameters) > 20
    for parameter in parameters:
        assert parameter.help, parameter.name
        assert parameter.help in said, parameter.name
        if parameter.param_type_name == "option":
            assert f"{parameter.opts[0]} " in said, parameter.name


def test_without_a_command_the_commands_are_listed() -> None:
    result = CliRunner().invoke(app, [])
    assert "ask" in result.output


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"flexselect {flexselect.__version__}\n")


# -- bad input -----------------------------------------------------------------------------------


def refused(result: Result, *words: str) -> None:
    """The command said why in one line, and ended with 1."""
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("flexselect: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--budget", "0"], ["budget must be at least 1"]),
        (["--budget", "-5"], ["budget", "-5"]),
        (["--backend", "opencv"], ["backend must be one of pyav", "opencv"]),
        (["--frames", "0"], ["frames must be positive"]),
        (["--frames", "1"], ["frames must be at least 2"]),
        (["--fps", "1"], ["either fps or frames"]),
        (["--max-frames", "4"], ["leave out max_frames"]),
        (["--max-pixels", "10"], ["max_pixels (10) is below min_pixels (768)"]),
        (["--layer", "99"], ["layer must be", "from 0 to 3", "99"]),
        (["--aggregation", "median"], ["aggregation must be", "median"]),
        (["--method", "uniform", "--selector", "x"], ["uniform has no knob selector"]),
        (["--method", "full", "--budget", "8"], ["full has no knob budget"]),
        (["--selector", "nowhere"], ["nowhere is no folder"]),
        (["--dtype", "int8"], ["dtype must be", "int8"]),
        (["--device-map", "auto"], ["either device or device_map"]),
        (["--save", VIDEO / "below" / "a" / "file"], ["--save", "cannot write to", VIDEO.name]),
        (["--save", ""], ["--save", "Name a file"]),
    ],
    ids=lambda value: "".join(map(str, value))[:24] if str(value[0]).startswith("--") else "",
)
def test_options_out_of_range(folder: Path, options: list[Any], words: list[str]) -> None:
    refused(ask(folder, *options), *words)


@pytest.mark.parametrize("rate", ["0", "-1", "nan", "inf"])
def test_a_rate_that_is_none(folder: Path, rate: str) -> None:
    arguments = ["ask", str(VIDEO), QUESTION, "--model", str(folder / "model"), "--fps", rate]
    refused(CliRunner().invoke(app, arguments), "fps must be positive and finite")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--budget", "many"),
        ("--budget", "1.5"),
        ("--method", "best"),
        ("--positions", "dense"),
        ("--query", "first"),
        ("--fps", "fast"),
        ("--frames-per-chunk", "0"),
        ("--max-new-tokens", "0"),
        ("--moments", "0"),
        ("--bugdet", "5"),
    ],
)
def test_a_misused_option_is_named(folder: Path, option: str, value: str) -> None:
    result = ask(folder, option, value)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert option in plain(result.stderr)


def test_a_missing_question_is_named(folder: Path) -> None:
    result = CliRunner().invoke(app, ["ask", str(VIDEO), "--model", str(folder / "model")])
    assert result.exit_code == 2
    assert "question" in plain(result.stderr).lower()


@pytest.mark.parametrize("question", ["", "  "])
def test_an_empty_question(folder: Path, question: str) -> None:
    refused(ask(folder, question=question), "the question is empty")


def test_files_that_are_no_video(folder: Path, tmp_path: Path) -> None:
    refused(ask(folder, video=tmp_path / "absent.mp4"), "absent.mp4: no such file")
    refused(ask(folder, video=tmp_path), "found a directory")
    text = tmp_path / "notes.mp4"
    text.write_text("Not a video.\n" * 50)
    refused(ask(folder, video=text), "notes.mp4: not a readable video")


@pytest.mark.parametrize(
    ("options", "question"),
    [
        (["--budget", "0"], QUESTION),
        (["--fps", "2"], QUESTION),
        (["--save", VIDEO / "below"], QUESTION),
        ([], ""),
    ],
    ids=["budget", "sampling", "save", "question"],
)
def test_what_is_wrong_with_any_model_is_said_before_one_is_loaded(
    options: list[Any], question: str, tmp_path: Path
) -> None:
    result = ask(tmp_path / "no-model-here", *options, question=question)
    refused(result)
    assert "no-model-here" not in result.stderr
    assert "load" not in result.stderr


def edited(folder: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Copy a checkpoint, with links for all but its weights, and change those."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).symlink_to(file)
    weights = target / "model.safetensors"
    tensors = load_file(weights)
    change(tensors)
    weights.unlink()
    save_file(tensors, weights, metadata={"format": "pt"})
    return target


WEIGHT = "layers.1.mlp.up_proj.weight"


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(name for name in tensors if name.endswith(WEIGHT))]


def add(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if name.endswith(WEIGHT))
    tensors[name.replace("layers.1.", "layers.9.")] = tensors[name].clone()


def reshape(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if name.endswith(WEIGHT))
    tensors[name] = tensors[name][:-1].clone()


@pytest.mark.parametrize("change", [drop, add, reshape])
@pytest.mark.parametrize("what", ["model", "selector"])
def test_weights_that_do_not_fit(
    folder: Path, tmp_path: Path, what: str, change: Callable[[dict[str, torch.Tensor]], None]
) -> None:
    bad = edited(folder / what, tmp_path / what, change)
    name = WEIGHT.replace("layers.1.", "layers.9." if change is add else "layers.1.")
    if what == "model":
        refused(ask(tmp_path), name)
    else:
        refused(ask(folder, "--selector", bad), name)


def test_model_folders_that_are_none(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    refused(ask(tmp_path), "config.json does not exist")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps({"model_type": "bert"}))
    refused(ask(tmp_path), "type 'bert'", "qwen2_5_vl")
    config.write_text("{")
    refused(ask(tmp_path), "config.json cannot be read as JSON")
    for file in (folder / "model").iterdir():
        if file.name != "model.safetensors":
            (config.parent / file.name).write_bytes(file.read_bytes())
    refused(ask(tmp_path), "holds no .safetensors file")
    weights = (folder / "model" / "model.safetensors").read_bytes()
    (config.parent / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    refused(ask(tmp_path), "model.safetensors is damaged or incomplete")
    refused(ask(tmp_path / "nowhere"), "nowhere/model is no folder")


def test_a_model_that_would_be_fetched_offline(folder: Path) -> None:
    arguments = ["ask", str(VIDEO), QUESTION, "--model", "someone/something", *SHORT]
    refused(CliRunner().invoke(app, arguments), "someone/something is no folder here")


def test_a_model_for_a_selector(folder: Path) -> None:
    refused(ask(folder, "--selector", folder / "model"), "is no selector for Qwen2.5-VL")


@pytest.mark.parametrize("name", ["processor_config.json", "tokenizer.json"])
def test_a_checkpoint_without_its_processor(folder: Path, tmp_path: Path, name: str) -> None:
    edited(folder / "model", tmp_path / "model", lambda _: None)
    (tmp_path / "model" / name).unlink()
    refused(ask(tmp_path), str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--attn", "banana"),
        ("--device", "banana"),
        pytest.param(
            *("--device", "cuda"),
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_a_device_or_kernel_that_is_not_there(folder: Path, option: str, value: str) -> None:
    refused(ask(folder, option, value), option.strip("-"), value)


# -- processes -----------------------------------------------------------------------------------


def environment(cache: Path) -> dict[str, str]:
    """Nothing cached, nothing reachable."""
    nowhere = "http://127.0.0.1:9"
    return {
        **os.environ,
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": "1",
        "HTTPS_PROXY": nowhere,
        "HTTP_PROXY": nowhere,
        "OMP_NUM_THREADS": "1",
    }


@needs_media
def test_json_alone_on_stdout_and_warnings_on_stderr(folder: Path, tmp_path: Path) -> None:
    command = [
        *(COMMAND, "ask", MEDIA / "corrupted.mp4", QUESTION, "--model", folder / "model"),
        *(*SHORT, "--frames", "50", *SELECT, "--json", "--save", tmp_path / "selection"),
    ]
    done = subprocess.run(
        [str(part) for part in command],
        cwd=tmp_path,
        env=environment(tmp_path / "cache"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["decided_by"]["pictures"], report["decided_by"]["pictures_lost"]) == (49, 1)
    assert "1 of 50 requested frames could not be decoded" in plain(done.stderr)
    assert Selection.load(tmp_path / "selection").settings == report["decided_by"]
    # Nothing is left behind but what was asked for.
    assert sorted(path.name for path in tmp_path.glob("*.*")) == [
        "selection.json",
        "selection.safetensors",
    ]


def test_interrupted_at_a_terminal(folder: Path, tmp_path: Path) -> None:
    """The bars of an answer that would take minutes are live; Ctrl-C ends it in few words."""
    terminal, end = pty.openpty()
    command = [
        *(COMMAND, "ask", VIDEO, QUESTION, "--model", folder / "model"),
        *(*SHORT, "--max-new-tokens", "100000"),
    ]
    process = subprocess.Popen(
        [str(part) for part in command],
        env={**environment(tmp_path / "cache"), "TERM": "xterm", "COLUMNS": "100"},
        stdout=subprocess.PIPE,
        stderr=end,
        text=True,
        # Tests that run in the background of a shell hand on that they ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    os.close(end)
    try:
        shown = read_until(terminal, "answer")
        process.send_signal(signal.SIGINT)
        shown += read_until(terminal, None)
        said = process.communicate(timeout=60)[0]
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
    for stage in ("load", "decode", "encode", "answer"):
        assert stage in shown
    assert process.returncode not in (0, None)
    assert "Traceback" not in shown
    assert said == ""
    # The cursor that the bars hid is shown again.
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l") >= 0


def read_until(terminal: int, word: str | None) -> str:
    """Read what a process writes to its terminal until ``word`` comes, or it ends."""
    text = ""
    while word is None or word not in text:
        try:
            part = os.read(terminal, 4096)
        except OSError:  # what Linux says when the last writer has gone
            break
        if not part:
            break
        text += part.decode(errors="replace")
    return text
