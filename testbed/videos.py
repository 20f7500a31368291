"""Needle videos as files: h264 in mp4, with a JSON sidecar that says where every needle is.

The encoder runs on one thread and the container carries no dates, so one build of FFmpeg writes
the same bytes for the same seed every time. The sidecar is written last and moved into place: a
video that has one is complete.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np
from numpy.typing import NDArray

from ..core.errors import OptionError, VideoError
from .questions import CHANCE, Plot, compose, describe, split_seed
from .scenes import COLOURS, DIGITS, EMPTY, GRID, SHAPES, draw_frames

SIDECAR_FORMAT = 1
#: Frames a second; a scene of two frames then lasts a second.
FPS = 2
#: Frames a scene lasts by default: one temporal cell of Qwen2.5-VL.
HOLD = 2
_ENCODER = {"crf": "18", "preset": "veryfast", "x264-params": "threads=1:keyint=16"}


@dataclass(frozen=True)
class NeedleSpot:
    """Where a needle is seen: its frames, its cell, and what it shows.

    ``row``, ``column``, ``mark`` are None for a picture needle, which fills its frame.
    """

    frames: tuple[int, ...]
    row: int | None
    column: int | None
    mark: str | None
    role: str


@dataclass(frozen=True)
class VideoQuestion:
    """A question of a sidecar. ``chance`` is the accuracy of guessing, None where unknown."""

    task: str
    text: str
    answer: str
    chance: float | None
    needles: tuple[NeedleSpot, ...]

    def cells_seen(self, frames: Sequence[int], *, temporal_patch: int = 1) -> NDArray[np.int64]:
        """Find the visual tokens that show the needles in a sampled video.

        Parameters
        ----------
        frames : sequence of int
            Index in the file of each sampled frame, in order.
        temporal_patch : int
            Sampled frames per temporal cell: 2 for Qwen2.5-VL, 1 for the other families.

        Returns
        -------
        ndarray of shape (tokens, 3)
            Temporal cell, row and column of each needle token, sorted; row and column are -1 for a
            picture needle. Empty if sampling missed the needles.
        """
        hits = {
            (at // temporal_patch, *_place(needle))
            for at, frame in enumerate(frames)
            for needle in self.needles
            if frame in needle.frames
        }
        return np.array(sorted(hits), dtype=np.int64).reshape(-1, 3)


@dataclass(frozen=True)
class NeedleVideo:
    """A video file and all that its sidecar says of it."""

    path: Path
    frames: int
    fps: float
    questions: tuple[VideoQuestion, ...]
    recipe: dict[str, Any]


def make_needle_video(
    path: Path,
    *,
    split: str,
    index: int,
    frames: int,
    tasks: Sequence[str],
    hold: int = HOLD,
) -> NeedleVideo:
    """Render one needle video and its sidecar, unless both are there already.

    Parameters
    ----------
    path : Path
        The ``.mp4`` to write; the sidecar lies beside it as ``.json``.
    split, index : str, int
        Split, and number of the video in it: together the seed.
    frames : int
        Length in frames, a multiple of ``hold``.
    tasks : sequence of str
        The task of each question.
    hold : int
        Frames a scene lasts.

    Returns
    -------
    NeedleVideo
        The video as its sidecar describes it.

    Raises
    ------
    OptionError
        If the options do not fit, or ``path`` holds a video made with others.
    """
    if hold < 1 or frames < 1 or frames % hold:
        raise OptionError(f"frames={frames} must be a positive multiple of hold={hold}.")
    seed = split_seed(split, index)
    recipe: dict[str, Any] = {
        "kind": "cells",
        "split": split,
        "index": index,
        "seed": seed,
        "frames": frames,
        "hold": hold,
        "fps": FPS,
        "tasks": list(tasks),
    }
    if (done := finished(path, recipe)) is not None:
        return done
    plot = compose(seed, frames // hold, tasks)
    write_video(path, draw_plot(plot, hold=hold), fps=FPS)
    return write_sidecar(path, recipe, plot_questions(plot, hold), cells=_cell_names(plot))


def draw_plot(plot: Plot, *, hold: int = HOLD) -> NDArray[np.uint8]:
    """Draw a plot as frames ``(scenes * hold, FRAME, FRAME, 3)``, uint8 RGB."""
    rng = np.random.RandomState([plot.seed, plot.cells.shape[0], hold])
    return draw_frames(plot.cells, rng, hold=hold)


def plot_questions(plot: Plot, hold: int) -> tuple[VideoQuestion, ...]:
    """Say in frames of the file where the needles of a plot are."""
    return tuple(
        VideoQuestion(
            task=question.task,
            text=question.text,
            answer=question.answer,
            chance=CHANCE[question.task],
            needles=tuple(
                NeedleSpot(
                    frames=tuple(range(n.scene * hold, (n.scene + 1) * hold)),
                    row=n.row,
                    column=n.column,
                    mark=describe(n.mark),
                    role=n.role,
                )
                for n in question.needles
            ),
        )
        for question in plot.questions
    )


def finished(path: Path, recipe: dict[str, Any]) -> NeedleVideo | None:
    """Return the video if it is complete, None if it is yet to be made.

    Raises
    ------
    OptionError
        If the file was made by another recipe, or a folder has its name.
    VideoError
        If the sidecar cannot be read.
    """
    for file in (path, path.with_suffix(".json")):
        if file.is_dir():
            raise OptionError(
                f"{file} is a folder, where a file is to be written. "
                "Choose another folder for the videos or delete this one."
            )
    if not is_complete(path):
        return None
    video = read_sidecar(path)
    if video.recipe != recipe:
        changed = sorted(k for k in recipe | video.recipe if recipe.get(k) != video.recipe.get(k))
        raise OptionError(
            f"{path} was made with other options or sources ({', '.join(changed)} differ). "
            "Choose another folder or delete the old video."
        )
    return video


def is_complete(path: Path) -> bool:
    """Whether a video has its sidecar and is not empty; each is written whole or not at all."""
    return path.with_suffix(".json").exists() and path.is_file() and path.stat().st_size > 0


def write_sidecar(
    path: Path,
    recipe: dict[str, Any],
    questions: Sequence[VideoQuestion],
    *,
    cells: list[list[list[str | None]]] | None = None,
) -> NeedleVideo:
    """Write what a video holds beside it, as ``path`` with the suffix ``.json``."""
    record = {
        "format": SIDECAR_FORMAT,
        "video": path.name,
        "recipe": recipe,
        "questions": [
            {
                "task": q.task,
                "question": q.text,
                "answer": q.answer,
                "chance": q.chance,
                "needles": [
                    {
                        "frames": list(n.frames),
                        "row": n.row,
                        "column": n.column,
                        "mark": n.mark,
                        "role": n.role,
                    }
                    for n in q.needles
                ],
            }
            for q in questions
        ],
        "cells": cells,
    }
    replace_file(path.with_suffix(".json"), json.dumps(record, indent=1).encode())
    return NeedleVideo(path, recipe["frames"], recipe["fps"], tuple(questions), recipe)


def read_sidecar(path: Path) -> NeedleVideo:
    """Read what a needle video holds; ``path`` is the video or its sidecar.

    Raises
    ------
    VideoError
        If there is no sidecar, it cannot be read, or it is not one of ours.
    """
    sidecar = path.with_suffix(".json")
    try:
        record = json.loads(sidecar.read_text(encoding="utf-8"))
        if record["format"] != SIDECAR_FORMAT:
            raise VideoError(
                f"{sidecar} has format {record['format']}, this version reads {SIDECAR_FORMAT}. "
                "Make the videos again."
            )
        questions = tuple(
            VideoQuestion(
                task=q["task"],
                text=q["question"],
                answer=q["answer"],
                chance=q["chance"],
                needles=tuple(
                    NeedleSpot(tuple(n["frames"]), n["row"], n["column"], n["mark"], n["role"])
                    for n in q["needles"]
                ),
            )
            for q in record["questions"]
        )
        recipe = record["recipe"]
        video = path.with_name(record["video"])
        return NeedleVideo(video, recipe["frames"], recipe["fps"], questions, recipe)
    except FileNotFoundError as error:
        raise VideoError(
            f"{sidecar} does not exist: {path} is no needle video, or was not finished. "
            "Make it with python -m flexselect.testbed.make."
        ) from error
    except OSError as error:
        raise VideoError(
            f"{sidecar} cannot be read ({error.strerror}). Give yourself access to it, or delete "
            "it and make the video again."
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        raise VideoError(
            f"{sidecar} is not a needle video's sidecar: {error!r}. Move or delete it, and make "
            "the video again."
        ) from error


def replace_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises
    ------
    OSError
        If it cannot be written; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def held(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Lock ``folder`` until this is left; other processes that ask for it wait.

    Raises ``BlockingIOError`` where another one holds it and ``wait`` is False.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


def write_video(path: Path, frames: Iterable[NDArray[np.uint8]], *, fps: float) -> None:
    """Encode RGB frames ``(height, width, 3)`` as h264 and move the file into place when done."""
    replace_file(path, encode_video(frames, fps=fps))


def encode_video(frames: Iterable[NDArray[np.uint8]], *, fps: float = FPS) -> bytes:
    """Encode RGB frames as h264 in mp4, in memory.

    Parameters
    ----------
    frames : iterable of ndarray of shape (height, width, 3), uint8
        Even height and width, because the chroma planes have half of each.
    fps : float
        Frames a second.

    Raises
    ------
    OptionError
        If there is no frame, or its size is odd.
    """
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", container_options={"fflags": "+bitexact"}) as container:
        rate = Fraction(fps).limit_denominator(1000)
        stream = container.add_stream("libx264", rate=rate, options=_ENCODER)
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        empty = True
        for picture in frames:
            if empty:
                stream.height, stream.width = picture.shape[:2]
                if picture.shape[0] % 2 or picture.shape[1] % 2:
                    raise OptionError(f"frames of {picture.shape[:2]} pixels: both must be even.")
                empty = False
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        if empty:
            raise OptionError("A video needs at least one frame; there is none.")
        container.mux(stream.encode())
    return buffer.getvalue()


def decode_video(source: Path | bytes) -> NDArray[np.uint8]:
    """Decode every frame of a file, or of the bytes of one, as ``(frames, height, width, 3)``."""
    return np.stack(list(iterate_video(source)))


def iterate_video(source: Path | bytes) -> Iterator[NDArray[np.uint8]]:
    """Decode a video frame by frame, RGB uint8.

    Raises
    ------
    VideoError
        If the file is missing or is no video.
    """
    name = "the encoded video" if isinstance(source, bytes) else str(source)
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else str(source)
        with av.open(file, "r") as container:
            for frame in container.decode(video=0):
                yield np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8)
    except (av.error.FFmpegError, IndexError) as error:
        raise VideoError(f"{name} cannot be decoded: {error}.") from error


def _place(needle: NeedleSpot) -> tuple[int, int]:
    if needle.row is None or needle.column is None:
        return -1, -1
    return needle.row, needle.column


def _cell_names(plot: Plot) -> list[list[list[str | None]]]:
    """Name every cell, scene by scene, row by row; None where it is empty."""

    def name(mark: NDArray[np.int64]) -> str | None:
        colour, shape, digit = (int(value) for value in mark)
        if colour == EMPTY:
            return None
        return f"{COLOURS[colour]} {SHAPES[shape]} {DIGITS[digit]}"

    return [
        [[name(scene[row, column]) for column in range(GRID)] for row in range(GRID)]
        for scene in plot.cells
    ]
