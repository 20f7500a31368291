"""V-NIAH with real pictures: a needle image in place of one frame of a real video.

The protocol is that of LongVA (arXiv 2406.16852), which FlexSelect's Recall@K follows: a folder
holds needle images and a ``dataset.json`` with rows of ``path``, ``prompt`` and ``answer``; one
frame of an unrelated video gives way to the image, and the prompt asks about it. This variant is
for real models; the tiny checkpoints know nothing of such pictures.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import av.error
import numpy as np
from numpy.typing import NDArray

from ..core.errors import OptionError, VideoError
from .questions import split_seed
from .videos import (
    FPS,
    NeedleSpot,
    NeedleVideo,
    VideoQuestion,
    finished,
    iterate_video,
    write_sidecar,
    write_video,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Picture:
    """A needle image with its question."""

    path: Path
    prompt: str
    answer: str


def read_pictures(folder: Path) -> list[Picture]:
    """Read the rows of ``folder/dataset.json`` whose image lies in the folder.

    Raises
    ------
    OptionError
        If there is no such file to read, it is damaged, or not one of its images is there.
    """
    listing = folder / "dataset.json"
    try:
        rows = json.loads(listing.read_text(encoding="utf-8"))
        pictures = [
            Picture(folder / row["path"], row["prompt"].strip(), row["answer"]) for row in rows
        ]
    except OSError as error:
        raise OptionError(
            f"{listing} cannot be read ({error.strerror}); it must list the needle images."
        ) from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise OptionError(
            f"{listing} must hold rows of path, prompt, answer: {error!r}."
        ) from error
    present = [picture for picture in pictures if picture.path.exists()]
    if not present:
        raise OptionError(f"{listing}: none of its {len(pictures)} images is in {folder}.")
    if absent := [picture.path.name for picture in pictures if not picture.path.exists()]:
        logger.warning("%s: rows without an image are left out: %s", listing, ", ".join(absent))
    return present


def make_picture_video(
    path: Path,
    haystack: Path,
    picture: Picture,
    *,
    split: str,
    index: int,
    frames: int,
) -> NeedleVideo:
    """Write a real video with one frame replaced by a needle image, unless it is there already.

    Parameters
    ----------
    path : Path
        The ``.mp4`` to write, with its sidecar beside it.
    haystack : Path
        A real video; its frames are sampled evenly.
    picture : Picture
        The image, fitted into the frame on black, and its question.
    split, index : str, int
        Together the seed, which decides the needle's frame.
    frames : int
        Frames of the result.

    Raises
    ------
    OptionError
        If the haystack has fewer frames, or ``path`` was made with other options or from files
        of other content.
    VideoError
        If the haystack or the image cannot be read or decoded.
    """
    seed = split_seed(split, index)
    recipe = {
        "kind": "picture",
        "split": split,
        "index": index,
        "seed": seed,
        "frames": frames,
        "fps": FPS,
        "haystack": haystack.name,
        "haystack_sha256": _checksum(haystack),
        "picture": picture.path.name,
        "picture_sha256": _checksum(picture.path),
        "prompt": picture.prompt,
        "answer": picture.answer,
    }
    if (done := finished(path, recipe)) is not None:
        return done
    spot = int(np.random.RandomState([seed, frames]).randint(frames))
    write_video(path, _insert(haystack, picture.path, frames, spot), fps=FPS)
    needle = NeedleSpot((spot,), None, None, None, "picture")
    question = VideoQuestion("picture", picture.prompt, picture.answer, None, (needle,))
    return write_sidecar(path, recipe, (question,))


def _checksum(path: Path) -> str:
    """Return the SHA-256 of a haystack or an image."""
    try:
        state = path.stat()
        return _read_checksum(path, state.st_mtime_ns, state.st_size)
    except OSError as error:
        raise VideoError(
            f"{path} cannot be read ({error.strerror}). Name a file that is there and readable."
        ) from error


@functools.lru_cache
def _read_checksum(path: Path, modified: int, size: int) -> str:
    """Read a file for its SHA-256: a long haystack once for all its needles, until it changes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _insert(haystack: Path, image: Path, frames: int, spot: int) -> Iterator[NDArray[np.uint8]]:
    """Yield ``frames`` evenly spaced frames of the haystack, the image in place of one."""
    available = sum(1 for _ in iterate_video(haystack))
    if not 0 < frames <= available:
        raise OptionError(
            f"frames={frames}: {haystack} has {available}. Ask for no more, or take a longer video."
        )
    wanted = (np.arange(frames) * available // frames).tolist()
    taken = 0
    for index, frame in enumerate(iterate_video(haystack)):
        if taken < frames and index == wanted[taken]:
            height, width = frame.shape[0] // 2 * 2, frame.shape[1] // 2 * 2
            yield _fit(image, height, width) if taken == spot else frame[:height, :width]
            taken += 1


def _fit(image: Path, height: int, width: int) -> NDArray[np.uint8]:
    """Scale an image to fit ``height`` × ``width`` whole, centred on black."""
    try:
        with av.open(str(image)) as container:
            picture = next(container.decode(video=0))
    except (av.error.FFmpegError, StopIteration, IndexError) as error:
        raise VideoError(f"{image} cannot be decoded as an image: {error!r}.") from error
    scale = min(height / picture.height, width / picture.width)
    inner = max(1, round(picture.height * scale)), max(1, round(picture.width * scale))
    small = picture.reformat(width=inner[1], height=inner[0], format="rgb24").to_ndarray()
    canvas = np.zeros((height, width, 3), dtype=np.uint8)
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    canvas[top : top + inner[0], left : left + inner[1]] = small
    return canvas
