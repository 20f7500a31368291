"""Needle videos to measure on, and which visual tokens of an opened one show the needle."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..core.errors import OptionError
from ..core.layout import NONE, Grid
from ..inference.features import Progress
from ..inference.session import Video
from ..testbed.pictures import make_picture_video, read_pictures
from ..testbed.questions import RETRIEVAL
from ..testbed.scenes import GRID
from ..testbed.videos import (
    NeedleVideo,
    VideoQuestion,
    make_needle_video,
    read_sidecar,
)

#: Endings of the files that count as haystacks.
VIDEO_ENDINGS = (".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v", ".ts")

#: Needle positions are drawn by number within the split; every seed has this many of its own.
_PER_SEED = 10_000

#: Pictures that measure a ranking are not those it is reported on.
_SPLIT = "validation"


def generated_videos(
    folder: Path, *, frames: int, count: int, seed: int = 0, progress: Progress | None = None
) -> list[NeedleVideo]:
    """Render ``count`` testbed videos of ``frames`` pictures with one question each.

    They are of the validation split; those that are there already stay. Raises `OptionError` for
    a number out of range.
    """
    _check(count, frames, seed)
    return [
        make_needle_video(
            folder / f"{_SPLIT}-{frames:04d}-{index:05d}.mp4",
            split=_SPLIT,
            index=index,
            frames=frames,
            tasks=[RETRIEVAL[index % len(RETRIEVAL)]],
        )
        for index in _counted("render", count, seed, progress)
    ]


def hidden_pictures(
    folder: Path,
    haystacks: Path,
    pictures: Path,
    *,
    frames: int,
    count: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[NeedleVideo]:
    """Hide needle pictures in real videos (V-NIAH), at places drawn by number and seed.

    Parameters
    ----------
    folder : where the videos are written; those that are there already stay.
    haystacks : a video, or a folder of videos.
    pictures : a folder of images with their ``dataset.json``, see `testbed.pictures`.
    frames, count, seed : pictures a video, number of videos, and what decides the places.
    progress : called with ("render", done, ``count``).

    Raises
    ------
    OptionError
        There is no video or no picture, or a haystack has fewer pictures than ``frames``.
    """
    _check(count, frames, seed)
    found = [haystacks] if haystacks.is_file() else _videos_in(haystacks)
    if not found:
        raise OptionError(
            f"--videos {haystacks}: no video there to hide pictures in. Expected files ending in "
            f"{', '.join(VIDEO_ENDINGS)}."
        )
    rows = read_pictures(pictures)
    return [
        make_picture_video(
            folder / f"vniah-{frames:04d}-{index:05d}.mp4",
            found[index // len(rows) % len(found)],
            rows[index % len(rows)],
            split=_SPLIT,
            index=index,
            frames=frames,
        )
        for index in _counted("render", count, seed, progress)
    ]


def videos_with_needles(folder: Path, count: int | None = None) -> list[NeedleVideo]:
    """Read a folder of needle videos that were made before: the first ``count``, or all.

    Raises `OptionError` where there is none.
    """
    found = [path for path in _videos_in(folder) if path.with_suffix(".json").exists()]
    if not found:
        raise OptionError(
            f"--videos {folder}: no needle videos there (a video with a .json of the same name). "
            "Render some with python -m flexselect.testbed.make, or name a folder of needle "
            "pictures with --needles to hide them in these videos."
        )
    return [read_sidecar(path) for path in found[:count]]


def needle_tokens(video: Video, question: VideoQuestion) -> Tensor:
    """Mark the visual tokens that show what a question is about: bool ``(visual,)``.

    A token shows a cell of the testbed if its middle lies in it, or the cell's middle in the
    token; a needle picture is shown by every token of its frame. None where sampling missed it.
    """
    architecture = video.engine.architecture
    grid = architecture.grid(video.clip)
    marked = torch.zeros(video.clip.frames, len(grid.cells), dtype=torch.bool)
    seen = question.cells_seen(
        video.pictures.tolist(), temporal_patch=architecture.pictures_per_frame
    )
    for frame, row, column in seen.tolist():
        if row < 0:
            marked[frame] = True
        else:
            marked[frame] |= _tokens_at(grid, row, column)
    return marked.flatten()


def _tokens_at(grid: Grid, row: int, column: int) -> Tensor:
    """Mark the tokens of a frame that show one cell of the testbed: bool ``(tokens,)``."""

    def shows(cells: int, place: int) -> Tensor:
        middles = (torch.arange(cells) + 0.5) / cells
        inside = (middles * GRID).long() == place
        holding = torch.arange(cells) == int((place + 0.5) / GRID * cells)
        return inside | holding

    showing = shows(grid.rows, row)[:, None] & shows(grid.columns, column)
    return showing.flatten()[grid.cells.clamp(min=0)] & (grid.cells != NONE)


def _counted(stage: str, count: int, seed: int, progress: Progress | None) -> Iterator[int]:
    """Yield the numbers of ``count`` videos, telling ``progress`` of each that is done."""
    for done in range(count):
        if progress is not None:
            progress(stage, done, count)
        yield seed * _PER_SEED + done
    if progress is not None:
        progress(stage, count, count)


def _videos_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise OptionError(f"--videos {folder} is no folder.")
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in VIDEO_ENDINGS)


def _check(count: int, frames: int, seed: int) -> None:
    for name, value, most in (
        ("count", count, _PER_SEED),
        ("frames", frames, None),
        ("seed", seed + 1, _PER_SEED),
    ):
        if value < 1 or (most is not None and value > most):
            raise OptionError(f"--{name} {value - (name == 'seed')} is out of range.")
