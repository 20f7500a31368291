r"""Command that builds a folder of needle videos: ``python -m flexselect.testbed.make``.

    python -m flexselect.testbed.make --split test --frames 512 --count 100 --out videos
    python -m flexselect.testbed.make --split test --frames 64 --count 30 --out vniah \
        --pictures media/needles --haystack talk.mp4

Interrupted, the same command goes on where it stopped. ``questions.jsonl`` has one row a question
of every video in the folder, whichever call made it, for tools that want a flat list.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from ..core.errors import FlexSelectError, OptionError, VideoError
from ..inference.terminal import check_writable
from .pictures import make_picture_video, read_pictures
from .questions import RETRIEVAL, SPLITS, TASKS
from .videos import (
    HOLD,
    NeedleVideo,
    is_complete,
    make_needle_video,
    read_sidecar,
    replace_file,
)

logger = logging.getLogger(__name__)


def make_videos(
    out: Path,
    *,
    split: str,
    frames: int,
    count: int,
    tasks: Sequence[str] = RETRIEVAL,
    questions: int = 1,
    hold: int = HOLD,
    first: int = 0,
) -> list[NeedleVideo]:
    """Render ``count`` needle videos; those that are there already stay.

    Parameters
    ----------
    out : Path
        Folder of the videos, made if missing.
    split, frames, count : str, int, int
        Split, frames a video, and number of videos.
    tasks : sequence of str
        The tasks, dealt in turn to the questions of one video after another.
    questions : int
        Questions a video.
    hold : int
        Frames a scene lasts.
    first : int
        Number of the first video within the split.

    Raises
    ------
    OptionError
        If an option is out of range, or the folder holds videos made with other options.
    VideoError
        If the sidecar of a video that is there already cannot be read.
    """
    if count < 1 or questions < 1 or not tasks:
        raise OptionError("count, questions and tasks must each be at least one.")
    videos = []
    for index in _progress(range(first, first + count)):
        dealt = [tasks[(index * questions + i) % len(tasks)] for i in range(questions)]
        path = out / f"{split}-{frames:04d}-{index:05d}.mp4"
        videos.append(
            make_needle_video(path, split=split, index=index, frames=frames, tasks=dealt, hold=hold)
        )
    write_question_list(out)
    return videos


def make_picture_videos(
    out: Path,
    *,
    split: str,
    frames: int,
    count: int,
    pictures: Path,
    haystack: Path,
    first: int = 0,
) -> list[NeedleVideo]:
    """Hide needle pictures, one after another, in ``count`` copies of a real video.

    Parameters
    ----------
    out : Path
        Folder of the videos, made if missing.
    split, frames, count : str, int, int
        Split, frames a video, and number of videos.
    pictures, haystack : Path, Path
        Folder of the images with their ``dataset.json``, and the real video.
    first : int
        Number of the first video within the split; it decides picture and place.

    Raises
    ------
    OptionError
        If an option is out of range, there is no picture, or the folder holds videos made with
        other options or from files of other content.
    VideoError
        If the haystack, an image, or the sidecar of a video that is there cannot be read.
    """
    if count < 1:
        raise OptionError(f"count={count} must be at least one.")
    rows = read_pictures(pictures)
    videos = [
        make_picture_video(
            out / f"{split}-{frames:04d}-{index:05d}.mp4",
            haystack,
            rows[index % len(rows)],
            split=split,
            index=index,
            frames=frames,
        )
        for index in _progress(range(first, first + count))
    ]
    write_question_list(out)
    return videos


def write_question_list(out: Path) -> Path:
    """Write one JSON row a question, with its video, answer, chance and needle frames.

    All complete needle videos of the folder are listed, by name; one whose sidecar cannot be read
    is left out with a warning.
    """
    videos = []
    for path in sorted(out.glob("*.mp4")):
        if is_complete(path):
            try:
                videos.append(read_sidecar(path))
            except VideoError as error:
                logger.warning("%s is left out of the list of questions: %s", path, error)
    rows = [
        {
            "id": f"{video.path.stem}-{number}",
            "video": video.path.name,
            "frames": video.frames,
            "task": question.task,
            "question": question.text,
            "answer": question.answer,
            "chance": question.chance,
            "needle_frames": [list(needle.frames) for needle in question.needles],
        }
        for video in videos
        for number, question in enumerate(video.questions)
    ]
    path = out / "questions.jsonl"
    replace_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        # Absolute, because "." is a folder to write to as well.
        check_writable("--out", options.out.absolute(), "folder")
        videos = _make(options)
    except FlexSelectError as error:
        logger.error("error: %s", error)
        return 2
    except OSError as error:
        logger.error(
            "error: --out %s: a file cannot be written (%s). Make room for it, or name another "
            "folder.",
            options.out,
            error,
        )
        return 2
    asked = sum(len(video.questions) for video in videos)
    logger.info("%d videos with %d questions in %s", len(videos), asked, options.out)
    return 0


def _make(options: argparse.Namespace) -> list[NeedleVideo]:
    """Make the videos that the options ask for."""
    if (options.pictures is None) != (options.haystack is None):
        raise OptionError("--pictures and --haystack belong together; give both or neither.")
    common: dict[str, Any] = {
        name: getattr(options, name) for name in ("split", "frames", "count", "first")
    }
    drawn = {
        name: value
        for name in ("tasks", "questions", "hold")
        if (value := getattr(options, name)) is not None
    }
    if options.pictures is None:
        return make_videos(options.out, **common, **drawn)
    if drawn:
        raise OptionError(
            f"{', '.join(f'--{name}' for name in drawn)} cannot go with --pictures, which hides "
            "one picture a video and asks its own question. Leave out one or the other."
        )
    return make_picture_videos(
        options.out, **common, pictures=options.pictures, haystack=options.haystack
    )


def _progress(indices: range) -> Iterable[int]:
    """Show on the terminal how far rendering has come."""
    return track(indices, description="render", console=Console(stderr=True))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flexselect.testbed.make",
        description="Render needle videos with their questions.",
    )
    parser.add_argument("--split", choices=SPLITS, required=True)
    parser.add_argument("--frames", type=int, required=True, help="frames a video, such as 512")
    parser.add_argument("--count", type=int, required=True, help="number of videos")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    # No defaults here, so that what is given beside --pictures can be told.
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=TASKS,
        help=f"dealt in turn; default: {' '.join(RETRIEVAL)}",
    )
    parser.add_argument("--questions", type=int, help="questions a video; default: 1")
    parser.add_argument("--hold", type=int, help=f"frames a scene lasts; default: {HOLD}")
    parser.add_argument("--first", type=int, default=0, help="number of the first video")
    parser.add_argument("--pictures", type=Path, help="V-NIAH: folder of images and dataset.json")
    parser.add_argument("--haystack", type=Path, help="V-NIAH: the real video to hide them in")
    return parser


if __name__ == "__main__":
    sys.exit(main())
