"""`flexselect rank` writes one store, however it is run, killed, or shared out."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flexselect.cli import app
from flexselect.core.errors import OptionError, VideoError
from flexselect.testbed.locate import checkpoint_folder
from flexselect.testbed.make import make_videos
from flexselect.tests.training.tiny import tiny
from flexselect.training.examples import Example, read_examples
from flexselect.training.rank import RankReport, examples_of_shard, parse_shard, rank
from flexselect.training.store import ScoreStore

FAMILY = "internvl"
SAMPLING = {"frames": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of five videos, one of them damaged, with two questions each."""
    folder = tmp_path_factory.mktemp("films")
    videos = make_videos(folder, split="train", frames=16, count=5, questions=2)
    videos[2].path.write_text("no film")
    return folder


def run(folder: Path, out: Path, **options: Any) -> RankReport:
    architecture, processor = tiny(FAMILY)
    examples = read_examples(folder)
    return rank(architecture.model, processor, examples, out, sampling=SAMPLING, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole")
    run(folder, out)
    return contents(out)


def test_every_sample_is_ranked_or_named(folder: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    report = run(folder, tmp_path, progress=lambda *step: seen.append(step))
    ids = [example.id for example in read_examples(folder)]
    assert (report.ranked, report.present, report.scored) == (8, 0, 8)
    assert list(report.damaged) == ids[4:6]
    assert all("train-0016-00002.mp4" in reason for reason in report.damaged.values())
    assert report.complete
    assert seen == [("rank", done, 10) for done in range(11)]
    store = ScoreStore(tmp_path)
    assert list(store.entries) == ids
    assert store.settings["sampling"] == SAMPLING
    assert store.settings.keys() >= {"family", "layer", "aggregation", "query", "frames_per_set"}
    assert store.made_by.keys() >= {"model", "flexselect", "torch", "transformers"}
    again = run(folder, tmp_path)
    assert (again.ranked, again.present, again.damaged) == (0, 10, report.damaged)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shards", [1, 2, 3])
def test_shards_and_workers_change_nothing(
    folder: Path, tmp_path: Path, whole: dict[str, bytes], shards: int, workers: int
) -> None:
    reports = [
        run(folder, tmp_path, shard=(place, shards), workers=workers, flush_samples=1)
        for place in range(shards)
    ]
    assert [report.complete for report in reports] == [False] * (shards - 1) + [True]
    assert sum(report.ranked for report in reports) == 8
    assert sum(len(report.damaged) for report in reports) == 2
    assert contents(tmp_path) == whole


KILLED = """
import os, signal, sys
from flexselect.tests.training.test_rank import Path, run

def progress(stage, done, total):
    if done == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

run(Path(sys.argv[1]), Path(sys.argv[2]), flush_samples=2, progress=progress)
"""


def command(folder: Path, out: Path, *more: str) -> list[str]:
    model = str(checkpoint_folder(FAMILY))
    start = ["rank", "--model", model, "--data", str(folder), "--out", str(out)]
    return [*start, "--frames", "8", "--dtype", "float32", "--device", "cpu", *more]


def test_killed_and_started_again_is_uninterrupted(
    folder: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder), str(tmp_path), "5"], check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert len(ScoreStore(tmp_path).entries) == 4
    # The rest through the command itself, which names the model by a path of its own.
    result = CliRunner().invoke(app, command(folder, tmp_path))
    assert result.exit_code == 0, result.output
    assert "4 samples ranked, 4 were there, 2 damaged; all are there." in result.output
    assert contents(tmp_path) == whole


def test_the_command_is_honest(folder: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    first = runner.invoke(app, command(folder, tmp_path, "--shard", "1/2", "--limit", "4"))
    assert first.exit_code == 0, first.output
    assert "2 samples ranked, 0 were there, 0 damaged (shard 1/2)" in first.output
    assert "other shards have samples to come" in first.output
    other = runner.invoke(app, command(folder, tmp_path, "--layer", "2"))
    assert other.exit_code == 1
    assert "other settings: layer (4 there, 2 here)" in other.output
    wrong = runner.invoke(app, command(folder, tmp_path, "--shard", "3/2"))
    assert wrong.exit_code == 1
    assert "--shard must be i/n" in wrong.output
    gone = runner.invoke(app, command(folder / "gone", tmp_path))
    assert gone.exit_code == 1
    assert "There is no data at" in gone.output


def test_nothing_but_damage_is_an_error_and_can_be_tried_again(
    folder: Path, tmp_path: Path
) -> None:
    architecture, processor = tiny(FAMILY)
    films = tmp_path / "films"
    examples = [replace(e, video=films / e.video.name) for e in read_examples(folder)[:2]]

    def go(**options: Any) -> RankReport:
        return rank(architecture.model, processor, examples, tmp_path, sampling=SAMPLING, **options)

    report = go()
    assert report.scored == 0
    with pytest.raises(VideoError, match=r"None of 2 samples could be ranked.*no such file"):
        report.check()
    films.symlink_to(folder)
    assert go().scored == 0
    report = go(retry=True)
    assert (report.ranked, report.scored, report.damaged) == (2, 2, {})
    report.check()


def test_a_video_belongs_to_one_shard() -> None:
    examples = [Example(f"{n}", Path(f"{n * 7 % 5}.mp4"), "What?") for n in range(20)]
    for shards in (1, 2, 3, 8):
        parts = [examples_of_shard(examples, (place, shards)) for place in range(shards)]
        assert sorted([e.id for part in parts for e in part]) == sorted(e.id for e in examples)
        films = [{e.video for e in part} for part in parts]
        assert sum(map(len, films)) == 5


def test_shards_are_read_from_the_option_or_the_launcher() -> None:
    launched = {"RANK": "1", "WORLD_SIZE": "4"}
    assert parse_shard(None, {}) == (0, 1)
    assert parse_shard(None, launched) == (1, 4)
    assert parse_shard("2/3", launched) == (1, 3)
    for text in ("0/2", "3/2", "1", "a/b", "1/0"):
        with pytest.raises(OptionError, match="--shard must be i/n"):
            parse_shard(text, {})
    for wrong in ({"WORLD_SIZE": "2"}, {"WORLD_SIZE": "2", "RANK": "2"}):
        with pytest.raises(OptionError, match="RANK"):
            parse_shard(None, wrong)
