"""Processes that share a video's sets keep what one process keeps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flexselect
from flexselect.tests.inference import sharing_worker
from flexselect.tests.inference.sharing_worker import CASES, FAMILY, select

WORLD = 2


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote down."""
    folder = tmp_path_factory.mktemp("sharing")
    command = [sys.executable, sharing_worker.__file__]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(WORLD), str(folder)], stderr=subprocess.PIPE, text=True
        )
        for rank in range(WORLD)
    ]
    for process in started:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    return folder


@pytest.mark.parametrize("case", CASES)
def test_every_process_keeps_what_one_alone_keeps(shared: Path, case: str) -> None:
    alone = select(FAMILY.model(), CASES[case])
    assert alone.scores is not None
    for rank in range(WORLD):
        found = flexselect.Selection.load(shared / f"{case} {rank}")
        assert torch.equal(found.kept, alone.kept)
        assert found.scores is not None
        assert torch.equal(found.scores[found.kept], alone.scores[alone.kept])
        assert int((found.scores != 0).sum()) == len(found.kept) < found.num_visual
        # Moments are made of frames that keep a token, whose best token is among the kept.
        assert found.moments() == alone.moments()
        assert found.settings == alone.settings


def test_processes_that_were_asked_different_things_say_so(shared: Path) -> None:
    for rank in range(WORLD):
        different, _ = json.loads((shared / f"errors {rank}.json").read_text())
        assert "not asked the same" in different


def test_numbers_that_overflow_in_one_process_fail_in_all(shared: Path) -> None:
    for rank in range(WORLD):
        _, infinite = json.loads((shared / f"errors {rank}.json").read_text())
        assert "not finite in one of the processes" in infinite


def test_sharing_without_other_processes() -> None:
    with pytest.raises(flexselect.OptionError, match="torchrun"):
        select(FAMILY.model(), CASES["many"], share_sets=True)


def test_sharing_is_yes_or_no() -> None:
    with pytest.raises(flexselect.OptionError, match="share_sets must be one of"):
        select(FAMILY.model(), CASES["many"], share_sets="two")
