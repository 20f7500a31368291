"""LongVideoBench's subtitles in the prompt, as the reference asks InternVL.

Its evaluation tree runs InternVL on ``longvideobench_val_v_sub``: before the question stand the
subtitles that cover one of 64 evenly spread moments, with a full stop between them and one for
every moment that passes (there the original has a frame).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.errors import DataError

#: Where lmms-eval unpacks them, below ``HF_HOME``.
FOLDER = "datasets/longvideobench/subtitles"
MOMENTS = 64


def subtitles_of(doc: Mapping[str, Any]) -> str:
    """Return the subtitles of a row of LongVideoBench as one line.

    Raises
    ------
    DataError
        Its file is missing or damaged.
    """
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    path = home / FOLDER / doc["subtitle_path"]
    try:
        lines = json.loads(path.read_text(encoding="utf-8"))
        spans = [_span(line, float(doc["duration"])) for line in lines]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} cannot be read ({error}). InternVL is asked LongVideoBench with subtitles; "
            "unpack them with: python scripts/prepare_data.py longvideobench --root $HF_HOME"
        ) from error
    offset = doc["starting_timestamp_for_subtitles"]
    shifted = [(start - offset, end - offset, text) for start, end, text in spans]
    return ".".join(interleave(shifted, moments(float(doc["duration"]))))


def moments(duration: float) -> list[float]:
    """Return the seconds at which the original has frames."""
    if duration > MOMENTS:
        return [duration / MOMENTS * i for i in range(MOMENTS)]
    return [float(second) for second in range(int(duration))]


def interleave(spans: Sequence[tuple[float, float, str]], times: Sequence[float]) -> list[str]:
    """Put subtitles among moments: an empty text per moment, in the order of time.

    A moment comes before the first subtitle whose middle it does not pass. A subtitle counts only
    if a moment lies inside it; a span shorter than a second is widened to one.
    """
    found: list[str] = []
    passed = 0
    for start, end, text in spans:
        middle = (start + end) / 2
        while passed < len(times) and times[passed] <= middle:
            found.append("")
            passed += 1
        if end - start < 1:
            start, end = middle - 0.5, middle + 0.5
        if any(start < time < end for time in times):
            found.append(text)
    return found + [""] * (len(times) - passed)


def _span(line: Mapping[str, Any], duration: float) -> tuple[float, float, str]:
    """Read a subtitle, whose times come in one of two forms."""
    if "timestamp" in line:
        start, end = line["timestamp"]
        # An open end is stored as something that is no number.
        return start, end if isinstance(end, float) else duration, line["text"]
    return _seconds(line["start"]), _seconds(line["end"]), line["line"]


def _seconds(stamp: str) -> float:
    hours, minutes, seconds = stamp.split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
