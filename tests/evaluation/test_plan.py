"""Which run is continued, which is not, and what is written down of it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from flexselect.core.errors import CheckpointError, FlexSelectError, OptionError
from flexselect.evaluation import defaults, identity
from flexselect.evaluation.defaults import ALL, BENCHMARKS, NEEDLES, make_plan
from flexselect.evaluation.plan import (
    RECORD,
    SUMMARY,
    Plan,
    choose_folder,
    hold,
    load_plan,
    point_latest,
    read_json,
    write_json,
)
from flexselect.inference.registry import FAMILIES
from flexselect.testbed.locate import checkpoint_folder
from flexselect.tests.paths import ROOT

TINY = str(checkpoint_folder("qwen2_5_vl"))


@pytest.fixture
def plan() -> Plan:
    methods = {"uniform": {"method": "uniform", "budget": 8}}
    return Plan("qwen2_5_vl", TINY, methods, ["needle_16"], include=[], limit=3)


def test_an_interrupted_run_is_continued_until_it_is_finished(tmp_path: Path, plan: Plan):
    first, continued = choose_folder(tmp_path, plan, fresh=False)
    assert not continued
    assert choose_folder(tmp_path, plan, fresh=False) == (first, True)
    # How many processes work on it decides nothing.
    assert choose_folder(tmp_path, replace(plan, processes=8), fresh=False) == (first, True)
    write_json(first / SUMMARY, [])
    second, continued = choose_folder(tmp_path, plan, fresh=False)
    assert not continued
    assert second != first


@pytest.mark.parametrize(
    "change",
    [
        {"limit": 4},
        {"tasks": ["needle_512"]},
        {"methods": {"uniform": {"method": "uniform", "budget": 9}}},
        {"missing": {"flexselect-lite": "no selector"}},
        {"shared": {"frames": 8}},
    ],
)
def test_other_settings_begin_anew(tmp_path: Path, plan: Plan, change):
    first, _ = choose_folder(tmp_path, plan, fresh=False)
    other, continued = choose_folder(tmp_path, replace(plan, **change), fresh=False)
    assert not continued
    assert other != first


def test_fresh_begins_anew(tmp_path: Path, plan: Plan):
    first, _ = choose_folder(tmp_path, plan, fresh=False)
    other, continued = choose_folder(tmp_path, plan, fresh=True)
    assert not continued
    assert other != first


def test_another_checkpoint_in_the_same_place_begins_anew(tmp_path: Path, plan: Plan):
    from flexselect.evaluation.identity import checkpoint_digest

    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(bytes(9 << 20))
    plan = replace(plan, checkpoint=str(model))
    first, _ = choose_folder(tmp_path / "runs", plan, fresh=False)
    # A change in the middle of a large file, of the same length.
    with (model / "model.safetensors").open("r+b") as file:
        file.seek((9 << 20) // 2 + 5)
        file.write(b"x")
    checkpoint_digest.cache_clear()
    assert choose_folder(tmp_path / "runs", plan, fresh=False)[0] != first


def test_other_tasks_in_the_same_folder_begin_anew_and_the_same_written_again_do_not(
    tmp_path: Path, plan: Plan
):
    folder = tmp_path / "tasks"
    folder.mkdir()
    plan = replace(plan, include=[str(folder)])
    (folder / "talks.yaml").write_text("task: talks")
    (folder / "scores.py").write_text("right = 1")
    first, _ = choose_folder(tmp_path / "runs", plan, fresh=False)
    os.utime(folder / "talks.yaml", ns=(1, 1))
    assert choose_folder(tmp_path / "runs", plan, fresh=False) == (first, True)
    (folder / "scores.py").write_text("right = 0")
    assert choose_folder(tmp_path / "runs", plan, fresh=False)[0] != first


def test_what_answers_come_from_is_part_of_the_code():
    folders = {folder.split("/")[0] for folder in identity.ANSWERING}
    assert {family for family, _ in FAMILIES.values()} <= folders
    assert {"core", "inference", "evaluation", "shared_configs"} <= folders
    assert all((ROOT / folder).is_dir() for folder in identity.ANSWERING)


def test_a_run_that_is_going_on_is_left_alone(tmp_path: Path, plan: Plan):
    folder, _ = choose_folder(tmp_path, plan, fresh=False)
    code = (
        "import fcntl, sys; file = open(sys.argv[1] + '/.lock', 'w')\n"
        "fcntl.flock(file, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    with pytest.raises(FlexSelectError, match="another process"):
        hold(folder)
    assert choose_folder(tmp_path, plan, fresh=False)[0] != folder
    other.kill()
    other.wait()
    # A killed process holds nothing.
    os.close(hold(folder))


def test_a_plan_is_read_as_it_was_written(tmp_path: Path, plan: Plan):
    folder, _ = choose_folder(tmp_path, plan, fresh=False)
    assert load_plan(folder) == plan
    record = read_json(folder / RECORD)
    assert record["decides"]["versions"]["torch"]
    with pytest.raises(OptionError, match="no run"):
        load_plan(tmp_path)


def test_latest_moves_to_the_newest(tmp_path: Path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        point_latest(tmp_path / name)
        assert (tmp_path / "latest").resolve() == tmp_path / name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "one", "two"]


def test_the_default_compares_all_methods_on_needles(monkeypatch):
    def no_selector(family):
        raise CheckpointError("no Lite selector. Train it")

    monkeypatch.setattr(defaults, "selector_folder", no_selector)
    plan = make_plan("qwen")
    assert (plan.family, plan.checkpoint, tuple(plan.tasks)) == ("qwen2_5_vl", TINY, NEEDLES)
    assert [*plan.methods, *plan.missing] == list(ALL)
    assert "Train it" in plan.missing["flexselect-lite"]
    monkeypatch.setattr(defaults, "selector_folder", lambda family: Path("/selectors") / family)
    plan = make_plan("qwen", budget=8, layer=3)
    assert not plan.missing
    assert plan.methods["full"] == {"method": "full"}
    assert plan.methods["random"] == {"method": "random", "budget": 8}
    assert plan.methods["flexselect"] == {"method": "flexselect", "budget": 8, "layer": 3}
    assert plan.methods["flexselect-lite"] == {
        "method": "flexselect-lite",
        "budget": 8,
        "selector": "/selectors/qwen2_5_vl",
    }


def test_a_real_model_runs_the_benchmarks():
    plan = make_plan("internvl", checkpoint="a/b")
    assert (list(plan.methods), tuple(plan.tasks)) == (["full", "flexselect"], BENCHMARKS)
    plan = make_plan("internvl", checkpoint="a/b", methods="full", selector="c/d")
    assert plan.methods["flexselect-lite"]["selector"] == "c/d"


def test_a_method_that_is_named_must_run(monkeypatch):
    def no_selector(family):
        raise CheckpointError("no Lite selector. Train it")

    monkeypatch.setattr(defaults, "selector_folder", no_selector)
    with pytest.raises(CheckpointError, match="Train it"):
        make_plan("qwen", methods="full,flexselect-lite")


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"family": "gpt"}, "gpt"),
        ({"methods": "full,best"}, "best"),
        ({"methods": ","}, "methods"),
        ({"checkpoint": "a/b", "methods": "flexselect-lite"}, "selector"),
        ({"budget": 0}, "budget"),
        ({"budget": 8, "methods": "full"}, "budget"),
        ({"layer": 3, "methods": "full,uniform"}, "layer"),
        ({"shared": {"frames": 8, "fps": 1.0}}, "fps"),
        ({"include": [Path("/nowhere")]}, "nowhere"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_loaded(given, named):
    with pytest.raises(FlexSelectError, match=named):
        make_plan(given.pop("family", "qwen"), **given)
