"""Every command in README and docs is proven: run as it stands, run on less, or by a named test.

`PROOFS` is the one table of it. Whoever adds a command to a page adds its proof here, unless the
page says that it needs the hub or a GPU; `test_commands.py` parses all of them.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from PIL import Image

import flexselect
from flexselect.tests.architectures import test_prompts
from flexselect.tests.architectures.factories import FAMILIES
from flexselect.tests.docs.test_commands import PAGES, commands
from flexselect.tests.paths import ROOT, SMALL_MEDIA


@dataclass(frozen=True)
class Run:
    """The command is run here, as a process of its own.

    Attributes
    ----------
    line : what is run in its place: the same with other sizes; as it stands where that is empty.
    after : command of the table that makes what this one needs.
    leaves : a file it must leave.
    says : what it must print.
    house : run in a small repository of its own, because it is about the code around it.
    """

    line: str = ""
    after: str = ""
    leaves: str = ""
    says: str = ""
    house: bool = False


@dataclass(frozen=True)
class By:
    """Other tests run the command, or the function behind it on less."""

    tests: tuple[str, ...]


def by(*tests: str) -> By:
    return By(tests)


README = "tests/docs/test_readme_runs.py::test_the_first_commands_of_the_readme"
HERE = "tests/docs/test_commands_run.py::"
ARCHITECTURES = "tests/architectures/test_prompts.py::test_prompts_are_as_recorded"
BENCH = "tests/scripts/test_bench.py::"
HOUSE = "tests/house/test_commands.py::"
STUDY = "tests/testbed/test_study.py::"
RECALL = "tests/visualization/test_recall.py::"
RANK = "tests/training/test_rank.py::"

VIDEO = "python -m flexselect.testbed.make --split test --frames 512 --count 1 --out videos"
ASKED = 'videos/test-0512-00000.mp4 "What number is on the orange hexagon?"'
TWO_METHODS = "make eval METHODS=uniform,flexselect LIMIT=12"
TINY_EVAL = "make eval METHODS=uniform,flexselect LIMIT=1"

PROOFS: dict[str, Run | By] = {
    # Setting up and developing: what these call is replaced by stand-ins, or the code is small.
    "make install": by(HOUSE + "test_install_is_done_once"),
    "make test": by(HOUSE + "test_test_means_lint_and_all_tests"),
    "make docs": by("tests/docs/test_site.py::test_nothing_is_loaded_from_elsewhere"),
    'make pytest ARGS="tests/core -x"': Run(house=True, says="1 passed"),
    "make format": Run(house=True, says="1 file reformatted"),
    "make lint": Run(house=True, after="make format", says="Success: no issues found"),
    # Questions about a video.
    "flexselect models": by(README),
    "python -m flexselect.testbed.make --split test --frames 256 --count 1 --out videos": by(
        README
    ),
    'flexselect ask videos/test-0256-00000.mp4 "What number is on the magenta hexagon?"': by(
        README
    ),
    VIDEO: Run(leaves="videos/test-0512-00000.json"),
    f"flexselect ask {ASKED} --report answer.html": Run(
        after=VIDEO, leaves="answer.html", says="9\n"
    ),
    f"flexselect ask {ASKED} --family qwen": by(
        "tests/test_cli_testbed.py::"
        "test_without_a_model_the_tiny_one_finds_the_answer_and_its_moment"
    ),
    f"flexselect show {ASKED} --pictures 8 --out seen": by(
        "tests/visualization/test_show.py::test_the_command_writes_pictures_and_one_page"
    ),
    # Comparing methods, and why an answer was wrong.
    "make eval": Run(TINY_EVAL, leaves="results/eval/qwen2_5_vl/latest/table.md"),
    TWO_METHODS: Run(TINY_EVAL, leaves="results/eval/qwen2_5_vl/latest/uniform/samples.jsonl"),
    "flexselect reports results/eval/qwen2_5_vl/latest": Run(
        after=TWO_METHODS, leaves="results/eval/qwen2_5_vl/latest/reports/index.html"
    ),
    "make eval MODEL=internvl": Run(
        "make eval MODEL=internvl FRAMES=16 LIMIT=1",
        leaves="results/eval/internvl/latest/table.md",
    ),
    # Which layer to read.
    "make recall": by(RECALL + "test_the_command_writes_curves_that_agree_and_recommends"),
    "make recall MODEL=qwen": by(
        RECALL + "test_the_command_writes_curves_that_agree_and_recommends"
    ),
    "make recall MODEL=internvl": Run(
        "make recall MODEL=internvl COUNT=1 FRAMES=64", leaves="build/recall/internvl/recall.png"
    ),
    "make recall CKPT=folder VIDEOS=folder NEEDLES=folder": by(
        RECALL + "test_pictures_hidden_in_real_videos_are_measured"
    ),
    # Training a selector.
    "make train-selector MODEL=qwen": Run(
        "make train-selector MODEL=qwen ARGS='--recipe small.yaml'",
        leaves="outputs/selector/qwen2_5_vl/summary.json",
    ),
    "make train-selector MODEL=qwen GPUS=8 ARGS=--dry-run": by(
        "tests/training/test_command.py::test_the_dry_run_needs_no_weights"
    ),
    "flexselect rank … --out scores --shard 1/4": by(
        RANK + "test_shards_and_workers_change_nothing", RANK + "test_the_command_is_honest"
    ),
    # Time and memory.
    "make bench MODEL=qwen": Run(
        "make bench MODEL=qwen FRAMES=20 ARGS='--repeats 1 --new-tokens 2'",
        leaves="outputs/bench/micro-cpu.md",
    ),
    "make bench MODEL=llava SHAPE=small": by(
        BENCH + "test_small_models_of_every_family", BENCH + "test_the_whole_benchmark"
    ),
    'make bench MODEL=qwen SHAPE=small FRAMES="64 512" ARGS=--check': by(
        BENCH + "test_bars_say_what_was_found", BENCH + "test_a_missed_bar_is_an_exit_code"
    ),
    # Another family.
    "cp -r qwen2_5_vl new_family": by(HERE + "test_a_copied_family_works_under_its_new_name"),
    'FLEXSELECT_WRITE_GOLDEN=1 make pytest ARGS="tests/architectures/test_prompts.py'
    ' -k new_family"': by(HERE + "test_golden_prompts_are_written_and_fail_on_purpose"),
    'make pytest ARGS="tests/architectures -k new_family"': by(ARCHITECTURES),
    "make fixtures FIXTURES=folder": by(
        HOUSE + "test_fixtures_are_checked_in_the_folder_named",
        "tests/scripts/test_check_fixture.py::test_the_command_agrees_and_prints_every_quantity",
    ),
    # The testbed itself.
    "python -m flexselect.testbed.make --split test --frames 512 --count 100 --out videos": Run(
        VIDEO, leaves="videos/questions.jsonl"
    ),
    "python -m flexselect.testbed.make --split test --frames 64 --count 30 --out vniah"
    " --pictures needles --haystack talk.mp4": Run(
        "python -m flexselect.testbed.make --split test --frames 8 --count 1 --out vniah"
        " --pictures needles --haystack talk.mp4",
        leaves="vniah/test-0008-00000.mp4",
    ),
    "python -m flexselect.testbed.train --family qwen2_5_vl": by(
        "tests/testbed/test_train.py::test_a_miniature_learns_to_read_videos_from_scratch"
    ),
    "python -m flexselect.scripts.testbed_study --part knobs": by(
        STUDY + "test_the_command_looks_at_layers_and_knobs_of_validation_videos"
    ),
    "python -m flexselect.scripts.testbed_study --part table": by(
        STUDY + "test_a_stopped_study_goes_on_and_counts_every_video_once"
    ),
    "python -m flexselect.testbed.train --family internvl --seed 1": by(
        "tests/testbed/test_train.py"
        "::test_only_the_first_seed_goes_where_the_projects_own_checkpoints_lie"
    ),
    "python -m flexselect.scripts.testbed_study --part table --family internvl"
    " --model outputs/testbed-internvl-1/checkpoint": by(
        STUDY + "test_a_checkpoint_of_another_seed_is_listed_by_it_with_retrieval_alone"
    ),
    "python -m flexselect.scripts.testbed_study --report docs/testbed.md": by(
        STUDY + "test_the_command_writes_the_report_of_what_is_there"
    ),
}

#: Settings that say how much is done, not what.
SIZES = {"ARGS", "COUNT", "FRAMES", "LIMIT", "METHODS", "--count", "--frames"}
#: As `make train-selector` does it, with fewer of everything.
FEWER = {"videos": 3, "questions": 2, "frames": 32, "epochs": 1, "samples_per_device": 2}
FEWER |= {"hold_out": 2, "evaluate_every": 1, "test_videos": 1, "test_frames": 64}
#: `python` for `make bench`: the sizes of the parts are constants, and those of a real model.
PYTHON = f"""#!{sys.executable}
import runpy, sys
from flexselect.scripts import bench_micro
bench_micro.VISUAL, bench_micro.HIDDEN, bench_micro.HEADS, bench_micro.KV_HEADS = 200, 64, 4, 2
bench_micro.HEAD_DIM, bench_micro.FRAMES, bench_micro.BUDGET = 16, 130, 300
for name in [name for name in bench_micro.PARTS if "Spearman" in name]:
    bench_micro.PARTS[name] = bench_micro.measure_spearman(64)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def plain(line: str) -> str:
    """Return a command without its comment and its spare spaces."""
    return " ".join(re.split(r"\s+# ", line)[0].split())


COMMANDS = {plain(line) for path in PAGES for line, marked in commands(path) if not marked}
RUNS = {command: proof for command, proof in PROOFS.items() if isinstance(proof, Run)}
NAMED = {test for proof in PROOFS.values() if isinstance(proof, By) for test in proof.tests}


def test_every_command_has_a_proof_and_every_proof_a_command() -> None:
    unproven = sorted(COMMANDS - set(PROOFS))
    assert not unproven, "say in PROOFS how these are proven, or mark them on their page"
    assert not sorted(set(PROOFS) - COMMANDS), "no page has these, or all mark them"
    assert {proof.after for proof in RUNS.values()} - {""} <= set(RUNS)


@pytest.mark.parametrize("name", sorted(NAMED))
def test_tests_that_are_named_exist(name: str) -> None:
    path, function = name.split("::")
    found = ast.parse((ROOT / path).read_text()).body
    assert function in {node.name for node in found if isinstance(node, ast.FunctionDef)}


def what(line: str) -> list[str]:
    """Return the words of a command that say what it does, without how much of it."""
    # Qwen is the family where none is named.
    left, words = [], [word for word in shlex.split(line) if word != "MODEL=qwen"]
    while words:
        word = words.pop(0)
        if word.startswith("--") and word in SIZES:
            words.pop(0)
        elif word.split("=")[0] not in SIZES:
            left.append(word)
    return left


@pytest.mark.parametrize("command", [command for command, proof in RUNS.items() if proof.line])
def test_what_is_run_instead_differs_in_size_only(command: str) -> None:
    assert what(command) == what(RUNS[command].line)


@pytest.fixture(scope="module")
def perform(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, str]]:
    """Return what runs a command of the table, once, and gives its folder and what it printed."""
    outside, house = tmp_path_factory.mktemp("outside"), tmp_path_factory.mktemp("house")
    furnish(outside)
    build(house)
    done: dict[str, str] = {}

    def perform(command: str) -> tuple[Path, str]:
        proof = RUNS[command]
        if proof.after:
            perform(proof.after)
        line, folder = proof.line or command, house if proof.house else outside
        if line not in done:
            done[line] = execute(line, folder)
        return folder, done[line]

    return perform


def furnish(folder: Path) -> None:
    """Put what commands read into a folder, so that outputs stay out of the repository."""
    for name in ("Makefile", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "bin").mkdir()
    (folder / "bin" / "flexselect").symlink_to(Path(sys.executable).parent / "flexselect")
    (folder / "bin" / "python").write_text(PYTHON)
    (folder / "bin" / "python").chmod(0o755)
    recipe = yaml.safe_load((ROOT / "shared_configs/training/qwen2_5_vl-tiny.yaml").read_text())
    assert FEWER.keys() <= recipe.keys()
    (folder / "small.yaml").write_text(yaml.safe_dump({**recipe, **FEWER}))
    shutil.copy(SMALL_MEDIA / "h265_video.mp4", folder / "talk.mp4")
    (folder / "needles").mkdir()
    Image.new("RGB", (60, 40), "red").save(folder / "needles" / "red.png")
    listing = [{"path": "red.png", "prompt": "Which colour is it?", "answer": "red"}]
    (folder / "needles" / "dataset.json").write_text(json.dumps(listing))


def build(house: Path) -> None:
    """Make a repository with one module and one test, which is not in the house format."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, house)
    (house / ".venv" / "src").mkdir(parents=True)
    (house / ".venv" / "src" / "flexselect").symlink_to(house)
    (house / "tests" / "core").mkdir(parents=True)
    (house / "__init__.py").write_text('"""A house."""\nNAMES = {"a":1}\n')
    (house / "tests" / "core" / "test_one.py").write_text("def test_one() -> None:\n    assert 1\n")


def execute(line: str, folder: Path) -> str:
    """Run a command with this interpreter's programs, and return what it printed."""
    program, *arguments = shlex.split(line)
    programs = Path(sys.executable).parent
    if program == "make":
        if not shutil.which("make"):
            pytest.skip("no make on this machine")
        own = folder / "bin" if (folder / "bin").exists() else programs
        # Nothing is installed, and .venv is taken to be there.
        command = ["make", "-o", "install", f"BIN={own}", *arguments]
    else:
        command = [str(programs / program), *arguments]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    environment |= {"COLUMNS": "200", "FLEXSELECT_CACHE": str(folder / "cache")}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.parametrize("command", RUNS)
def test_commands_run(command: str, perform: Callable[[str], tuple[Path, str]]) -> None:
    proof = RUNS[command]
    folder, printed = perform(command)
    assert proof.says in printed
    assert (folder / proof.leaves).exists()


def test_a_copied_family_works_under_its_new_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "qwen2_5_vl", tmp_path / "qwen2_5_vl", ignore=ignored)
    subprocess.run(["cp", "-r", "qwen2_5_vl", "new_family"], cwd=tmp_path, check=True)
    monkeypatch.setattr(flexselect, "__path__", [*flexselect.__path__, str(tmp_path)])
    modules = [path.stem for path in (tmp_path / "new_family").glob("[a-z]*.py")]
    assert "architecture" in modules
    try:
        for module in modules:
            found = importlib.import_module(f"flexselect.new_family.{module}")
            assert str(found.__file__).startswith(str(tmp_path))
        # Nothing of it comes from the folder that it is a copy of.
        own = importlib.import_module("flexselect.new_family.architecture")
        assert not [name for name in vars(own).values() if "flexselect.qwen2_5_vl" in str(name)]
    finally:
        for name in [name for name in sys.modules if name.startswith("flexselect.new_family")]:
            del sys.modules[name]


def test_golden_prompts_are_written_and_fail_on_purpose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = next(family for family in FAMILIES if family.name == "internvl")
    recorded = (test_prompts.GOLDEN / "internvl.txt").read_text()
    monkeypatch.setattr(test_prompts, "GOLDEN", tmp_path)
    monkeypatch.setenv("FLEXSELECT_WRITE_GOLDEN", "1")
    with pytest.raises(pytest.fail.Exception, match="run again"):
        test_prompts.test_prompts_are_as_recorded(family, family.model())
    assert (tmp_path / "internvl.txt").read_text() == recorded
