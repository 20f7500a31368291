"""Recall of a model's layers over a folder of needle videos, question by question."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..inference.engine import Engine
from ..inference.features import Progress
from ..inference.methods import FlexSelect
from ..inference.session import open_video
from ..testbed.videos import NeedleVideo
from .curves import write_curves
from .extras import need_matplotlib
from .recall import Curves, Rows, measure, summarise


def measure_recall(
    model: Any,
    processor: Any,
    videos: Sequence[NeedleVideo],
    out: Path,
    *,
    method: FlexSelect | None = None,
    progress: Progress | None = None,
    **sampling: Any,
) -> Curves:
    """Measure recall@K of every layer and write ``recall.*`` into ``out``.

    Every video is decoded and encoded once, and every set of a question walks through the layers
    once. Interrupted, the same call goes on where it stopped.

    Parameters
    ----------
    model, processor : of a supported family.
    videos : with their questions.
    out : folder of the results; ``rows.jsonl`` in it has one row a question.
    method : whose budget, sets, asking text and selector count; default: the model's preset.
    progress : called with ("measure", questions done, questions).
    sampling : as in `open_video`.

    Raises
    ------
    OptionError
        Nothing can be measured, ``out`` holds another measurement, or matplotlib is missing.
    VideoError
        A video cannot be read.
    """
    need_matplotlib()
    engine = Engine(model, method or FlexSelect())
    record = {**engine.method.record(), **engine.record()}
    # Every layer and both aggregations are measured.
    preset_layer = record.pop("layer") if record.get("selector") is None else None
    for name in ("layer", "aggregation", "positions", "sets_per_batch"):
        record.pop(name, None)
    weights = {name: _weights(str(record[name])) for name in ("model", "selector") if record[name]}
    settings = {**record, "sampling": sampling, "weights": weights}
    rows = Rows(out / "rows.jsonl", settings)
    names = [[_name(video, i) for i in range(len(video.questions))] for video in videos]
    total, done = sum(map(len, names)), 0
    for video, own in zip(videos, names, strict=True):
        missing = [i for i, name in enumerate(own) if name not in rows]
        done += len(own) - len(missing)
        if progress is not None:
            progress("measure", done, total)
        if not missing:
            continue
        opened = open_video(model, processor, video.path, method=engine.method, **sampling)
        for i in missing:
            row = measure(opened, video.questions[i])
            rows.add({"id": own[i], "video": video.path.name, **row})
            done += 1
            if progress is not None:
                progress("measure", done, total)
    curves = summarise(rows.of([name for own in names for name in own]))
    write_curves(curves, out, settings=settings, preset_layer=preset_layer)
    return curves


def _weights(folder: str) -> str:
    """Tell checkpoints in the same folder apart: by the size and the last MiB of every file.

    Empty for a model that is in no folder; nothing tells that it was changed.
    """
    seen = 0
    for path in sorted(Path(folder).glob("*.safetensors")) if folder else ():
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - (1 << 20)))
            seen = zlib.crc32(file.read(), seen ^ (size & 0xFFFFFFFF))
    return f"{seen:08x}" if seen else ""


def _name(video: NeedleVideo, question: int) -> str:
    return f"{video.path.name}#{question}"
