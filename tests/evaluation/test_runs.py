"""Whole runs by real processes: killed and continued, shared by two, with damaged videos."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flexselect.core.errors import FlexSelectError, OptionError
from flexselect.evaluation.needle import TASKS, videos_folder
from flexselect.evaluation.plan import ROWS, SUMMARY, TABLE, Plan, choose_folder, hold
from flexselect.evaluation.run import perform
from flexselect.evaluation.worker import evaluate_run
from flexselect.inference.presets import FOLDER, load_presets
from flexselect.testbed.locate import checkpoint_folder

COUNT = 24

pytestmark = pytest.mark.usefixtures("own_accelerate", "cache")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a needle task of eight short videos, three questions about each."""
    folder = tmp_path_factory.mktemp("tasks")
    text = (TASKS / "needle_16.yaml").read_text()
    text = text.replace("task: needle_16", "task: needle_few")
    (folder / "few.yaml").write_text(text.replace("frames: 16, videos: 32", "frames: 8, videos: 8"))
    return folder


@pytest.fixture(scope="module")
def plan(tasks: Path) -> Plan:
    return Plan(
        family="qwen2_5_vl",
        checkpoint=str(checkpoint_folder("qwen2_5_vl")),
        methods={
            "flexselect": {"method": "flexselect", "budget": 8},
            "random": {"method": "random", "budget": 8},
        },
        tasks=["needle_few"],
        include=[str(tasks)],
        shared={"record_selection": True, "device": "cpu"},
        missing={"flexselect-lite": "there is no selector"},
    )


@pytest.fixture(scope="module")
def uninterrupted(plan: Plan, tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The folder of a run that nothing disturbed."""
    folder, _ = choose_folder(tmp_path_factory.mktemp("runs"), plan, fresh=False)
    perform(folder, plan)
    return folder


def worker(folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "flexselect.evaluation.worker", str(folder)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def outcome(folder: Path) -> list[dict[str, Any]]:
    """Everything of the samples that does not depend on the clock, or on who opened a video."""
    samples = []
    for method in ("flexselect", "random"):
        for line in (folder / method / "samples.jsonl").read_text().splitlines():
            sample = json.loads(line)
            del sample["seconds"], sample["opened"]
            samples.append(sample)
    return samples


def harness(folder: Path) -> list[Any]:
    """What lmms-eval itself wrote of figures and samples, without dates and times."""
    (results,) = (folder / "flexselect" / "lmms_eval").rglob("*_results.json")
    (samples,) = (folder / "flexselect" / "lmms_eval").rglob("*_samples_needle_few.jsonl")
    return [
        json.loads(results.read_text())["results"],
        [json.loads(line) for line in samples.read_text().splitlines()],
    ]


def test_a_run_leaves_its_figures_and_what_decided_them(uninterrupted: Path):
    rows = json.loads((uninterrupted / ROWS).read_text())
    assert [row["method"] for row in rows] == ["flexselect", "random", "flexselect-lite"]
    first, second, missing = rows
    assert (first["samples"], first["frames"], first["failed"]) == (COUNT, 8, 0)
    assert (first["visual_tokens"], first["kept_tokens"]) == (16, 8)
    assert first["accuracy"] > second["accuracy"]
    assert first["ttft_s"] == pytest.approx(
        sum(first["stages"][s] for s in ("decode", "encode", "rank", "gather", "prefill"))
    )
    # Eight videos were opened for the first method, and shared by all questions and methods.
    assert (first["opened"], second["opened"]) == (8, 0)
    assert missing["note"] == "there is no selector"
    summary = json.loads((uninterrupted / SUMMARY).read_text())
    names = ["method", "task", "frames", "samples", "accuracy", "stderr"]
    names += ["visual_tokens", "kept_tokens", "ttft_s", "stages"]
    assert [list(row) for row in summary] == [names] * 3
    assert summary == [{name: row[name] for name in names} for row in rows]
    assert "| flexselect | needle_few | 8 | 16 → 8 |" in (uninterrupted / TABLE).read_text()
    assert (uninterrupted.parent / "latest").resolve() == uninterrupted.resolve()

    record = json.loads((uninterrupted / "run.json").read_text())
    settings = record["methods"]["flexselect"]["settings"]
    (preset,) = (each for each in load_presets(FOLDER) if each.name == "qwen2_5_vl-tiny")
    assert (settings["layer"], settings["preset"]) == (preset.method["layer"], preset.name)
    assert settings["budget"] == 8
    (turn,) = record["methods"]["flexselect"]["prompts"]["needle_few"]["example"]
    assert [part["type"] for part in turn["content"]] == ["video", "text"]

    samples = outcome(uninterrupted)
    assert len(samples) == 2 * COUNT
    for sample in samples:
        (kept,) = sample["selection"]["kept_per_frame"]
        assert sum(kept) == sample["kept_tokens"] == 8
        assert bool(sample["selection"]["moments"]) == (sample["method"] == "flexselect")


def test_a_run_that_was_killed_goes_on_to_the_same_result(
    plan: Plan, tmp_path: Path, uninterrupted: Path
):
    folder, _ = choose_folder(tmp_path, plan, fresh=False)
    journal = folder / "flexselect" / "answers-0.jsonl"
    process = worker(folder)
    while not journal.exists() or journal.read_bytes().count(b"\n") < 3:
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = journal.read_bytes()
    whole = before[: before.rindex(b"\n") + 1]
    assert 3 <= whole.count(b"\n") < COUNT, "it was killed too late to prove anything"
    # A kill may also come in the middle of a line.
    journal.write_bytes(whole + whole[: len(whole) // 2].split(b"\n")[0][:-9])

    same, continued = choose_folder(tmp_path, plan, fresh=False)
    assert (same, continued) == (folder, True)
    perform(folder, plan)
    after = journal.read_bytes()
    assert after.startswith(whole)
    keys = [json.loads(line)["key"] for line in after.splitlines() if line.endswith(b"}")]
    assert len(keys) == len(set(keys)) == COUNT
    assert outcome(folder) == outcome(uninterrupted)
    assert harness(folder) == harness(uninterrupted)


def test_two_processes_give_the_result_of_one(
    plan: Plan, tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
):
    # Also where there is one GPU.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    folder, _ = choose_folder(tmp_path, plan, fresh=False)
    assert perform(folder, replace(plan, processes=2))[0]["samples"] == COUNT
    assert outcome(folder) == outcome(uninterrupted)
    assert harness(folder) == harness(uninterrupted)
    # No video was opened by both, although the harness deals the questions one by one.
    videos = [
        {json.loads(line)["videos"][0] for line in path.read_text().splitlines()}
        for path in sorted((folder / "random").glob("answers-*.jsonl"))
    ]
    assert len(videos) == 2
    assert not videos[0] & videos[1]


@pytest.mark.skipif(sys.platform != "linux", reason="the system has no such signal")
def test_processes_end_with_the_command_that_is_killed(tmp_path: Path):
    code = (
        "import sys; from pathlib import Path\n"
        "from flexselect.evaluation.plan import hold\n"
        "from flexselect.evaluation.run import run_to_the_end\n"
        "sleep = [sys.executable, '-c', 'print(1, flush=True); import time; time.sleep(300)']\n"
        "run_to_the_end(sleep, {}, hold(Path(sys.argv[1])))"
    )
    command = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert command.stdout is not None
    assert command.stdout.readline() == "1\n"
    with pytest.raises(FlexSelectError, match="another process"):
        hold(tmp_path)
    command.kill()
    command.wait()
    # Ends when the last process that writes to it does.
    assert command.stdout.read() == ""
    os.close(hold(tmp_path))


def test_damaged_and_missing_videos_are_counted_and_end_nothing(
    plan: Plan, tasks: Path, tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
):
    config = (tasks / "few.yaml").read_text().replace("needle.video_of", "ask_video")
    folder = tmp_path / "tasks"
    folder.mkdir()
    # The files stay as they are: a task that does not render.
    (folder / "lookup.py").write_text(
        "import sys\n"
        "from pathlib import Path\n"
        f"FOLDER = Path({str(tmp_path / 'videos')!r})\n"
        "def find(doc):\n"
        "    path = FOLDER / (doc['video'] + '.mp4')\n"
        "    return [str(path)] if path.exists() else sys.exit(f'{path} does not exist')\n"
    )
    config = config.replace("flexselect.evaluation.ask_video", "lookup.find")
    (folder / "few.yaml").write_text(config.replace("needle_few", "needle_found"))
    copies = tmp_path / "videos"
    copies.mkdir()
    for path in sorted(videos_folder().glob("test-0008-*.mp4")):
        shutil.copy(path, copies)
    (copies / "test-0008-00001.mp4").unlink()
    (copies / "test-0008-00002.mp4").write_bytes(b"not a video")

    plan = replace(plan, tasks=["needle_found"], include=[str(folder)], limit=12, missing={})
    run, _ = choose_folder(tmp_path / "runs", plan, fresh=False)
    first, _ = perform(run, plan)
    assert (first["samples"], first["failed"]) == (12, 6)
    samples = [json.loads(x) for x in (run / "flexselect" / "samples.jsonl").open()]
    reasons = [sample["error"] for sample in samples]
    assert [reason is None for reason in reasons] == [True] * 3 + [False] * 6 + [True] * 3
    assert "does not exist" in reasons[3]
    assert "test-0008-00002.mp4" in reasons[6]
    assert all(sample["answer"] == "" for sample in samples[3:9])
    usual = [sample for sample in outcome(uninterrupted) if sample["method"] == "flexselect"]
    good = [(s["doc_id"], s["answer"], s["score"]) for s in samples if s["error"] is None]
    assert good == [
        (s["doc_id"], s["answer"], s["score"]) for s in usual if s["doc_id"] in (0, 1, 2, 9, 10, 11)
    ]
    assert "6 of 12 without" in (run / TABLE).read_text()

    # Once the file is there, only its questions are asked.
    summary = run / SUMMARY
    summary.unlink()
    shutil.copy(copies / "test-0008-00000.mp4", copies / "test-0008-00001.mp4")
    evaluate_run(run)
    lines = (run / "flexselect" / "answers-0.jsonl").read_text().splitlines()
    assert len(lines) == 12 + 3


def test_a_checkpoint_of_another_family_is_named_before_it_is_loaded(plan: Plan, tmp_path: Path):
    folder, _ = choose_folder(tmp_path, replace(plan, family="internvl"), fresh=False)
    with pytest.raises(OptionError, match="MODEL=qwen2_5_vl"):
        perform(folder, replace(plan, family="internvl"))
    assert not (folder / "flexselect").exists()


def test_a_task_that_is_nowhere_is_named(plan: Plan, tmp_path: Path):
    plan = replace(plan, tasks=["needle_none"])
    folder, _ = choose_folder(tmp_path, plan, fresh=False)
    with pytest.raises(OptionError, match="needle_none"):
        perform(folder, plan)
    assert not (folder / SUMMARY).exists()
