"""The tiny models, opened once, and short needle videos to ask them about."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

import flexselect
from flexselect.evaluation.data import BENCHMARKS
from flexselect.evaluation.data.tasks import tasks_folder
from flexselect.evaluation.needle import Recipe
from flexselect.testbed.locate import FAMILIES, checkpoint_folder
from flexselect.tests.evaluation.shapes import (
    METHODS,
    TASKS,
    has_checkpoint,
    prepare_all,
    rows_of,
)

#: As long as the shortest training clip's half: nothing to select from, quick to render.
SHORT = Recipe("validation", frames=8, videos=4)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where needle videos are rendered, for this process and those it starts."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEXSELECT_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def videos(cache: Path) -> list[Path]:
    """Videos of eight pictures."""
    return [SHORT.render(index) for index in range(SHORT.videos)]


@pytest.fixture(scope="session", params=["internvl", "qwen2_5_vl"])
def tiny(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """Model and processor of each family that has a tiny checkpoint."""
    folder = checkpoint_folder(request.param)
    model = flexselect.load_model(folder, dtype="float32", device="cpu")
    return model, flexselect.load_processor(folder)


@pytest.fixture(scope="session")
def benchmarks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The six benchmarks, asked and run: ``root`` with the data, ``asked.json``, ``runs``."""
    folder = tmp_path_factory.mktemp("benchmarks")
    root = prepare_all(folder)
    names = [f"{task}_local" for task in TASKS.values()]
    include = [str(tasks_folder(root, BENCHMARKS[name])) for name in TASKS]
    commands = [
        [
            *("eval", family, "--methods", ",".join(METHODS), "--tasks", ",".join(names)),
            *(word for path in include for word in ("--include", path)),
            *("--out", str(folder / "runs"), "--frames", "4"),
        ]
        for family in FAMILIES
        if has_checkpoint(family)
    ]
    removed = rows_of("egoschema")[1]["video_idx"]
    work = {
        "tasks": names,
        "include": include,
        "asked": str(folder / "asked.json"),
        "damage": str(root / "mlvu" / "plot_2.mp4"),
        "remove": str(root / "egoschema" / "videos" / f"{removed}.mp4"),
        "commands": commands,
    }
    (folder / "work.json").write_text(json.dumps(work))
    environment = {**os.environ, "HF_HOME": str(root), "HF_HUB_OFFLINE": "1"}
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        environment[name] = "1"
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("ask_tasks.py"), folder / "work.json"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def own_accelerate() -> Iterator[None]:
    """Let a test use accelerate without leaving its global state to the next one."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
