"""Recall@K of every layer: how many of a needle's tokens are among those the layer ranks highest.

For every question each set of frames walks through the layers once; what a layer's query and key
states say is ranked on the way. Results are kept question by question, so an interrupted
measurement goes on where it stopped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from ..core.errors import OptionError
from ..core.metrics import precision_at_k, recall_at_k
from ..core.relevance import Aggregation
from ..inference.features import Progress
from ..inference.methods import FlexSelect
from ..inference.scoring import score_layers
from ..inference.session import Video
from ..testbed.videos import VideoQuestion, replace_file
from .asked import ask_layers
from .needles import needle_tokens

AGGREGATIONS: tuple[Aggregation, ...] = get_args(Aggregation)

#: Half width of a 95% interval in standard errors.
_Z = 1.959964


@dataclass(frozen=True)
class Estimate:
    """A mean over videos with its 95% interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Point:
    """What was measured of one layer.

    Attributes
    ----------
    layer, aggregation : how tokens were ranked.
    k : name of K, see `Curves.ks`.
    recall : share of the needle's tokens among the K highest.
    precision : share of the K highest that are the needle's; the reference calls this recall, with
        K the tokens of a frame.
    """

    layer: int
    aggregation: Aggregation
    k: str
    recall: Estimate
    precision: Estimate


@dataclass(frozen=True)
class Curves:
    """The measurement as a whole.

    Attributes
    ----------
    points : every layer, aggregation and K.
    ks : "budget" and "frame" (the visual tokens of one frame) to their value of K.
    chance : "budget" and "frame" to the recall that a random ranking expects.
    most_precise : highest precision there can be with K the tokens of a frame: a needle may have
        fewer tokens.
    videos, questions : how many there were.
    left_out : identifiers of questions that measure nothing, with the reason.
    layer, aggregation : the recommendation: highest recall at the budget; of equals, the lowest
        layer, which costs least.
    rivals : other layers of that aggregation which these videos do not tell apart from it.
    """

    points: tuple[Point, ...]
    ks: dict[str, int]
    chance: dict[str, float]
    most_precise: float
    videos: int
    questions: int
    left_out: dict[str, str]
    layer: int
    aggregation: Aggregation
    rivals: tuple[int, ...]

    def of(self, aggregation: Aggregation, k: str) -> list[Point]:
        """Points of one curve, layer by layer."""
        return [p for p in self.points if (p.aggregation, p.k) == (aggregation, k)]

    @property
    def best(self) -> Point:
        """The recommended point."""
        curve = self.of(self.aggregation, "budget")
        return next(point for point in curve if point.layer == self.layer)


def measure(
    video: Video, question: VideoQuestion, *, progress: Progress | None = None
) -> dict[str, Any]:
    """Rank the visual tokens at every layer and count the needle's among the highest.

    Parameters
    ----------
    video : opened with `FlexSelect`, whose budget, sets, asking text and selector are used.
    question : what is asked, and where its needles are.
    progress : called with ("rank", sets done, sets).

    Returns
    -------
    A row for `summarise`, ready for JSON: ``ks`` with both values of K, numbers of ``visual`` and
    of ``needle`` tokens, and for either aggregation and K the ``recall`` and ``precision`` of every
    layer. Without any needle token or with a budget that covers everything, only ``left_out``.
    """
    engine = video.engine
    asked = ask_layers(video, question.text)
    needle = needle_tokens(video, question)
    if not bool(needle.any()):
        return {"left_out": "the needle is in no picture that was looked at"}
    method = engine.method
    assert isinstance(method, FlexSelect)
    budget = method.quota(asked.encoded, engine.architecture)
    if budget >= len(needle):
        return {"left_out": f"the budget of {budget} covers all {len(needle)} visual tokens"}
    scores = score_layers(
        asked.prompt,
        asked.sets,
        asked.features,
        asked.scorer,
        layers=range(asked.num_layers),
        aggregations=AGGREGATIONS,
        sets_per_batch=method.sets_per_batch,
        progress=progress,
    )
    ks = {"budget": budget, "frame": len(needle) // video.clip.frames}

    def every_layer(count: Any, aggregation: Aggregation, k: int) -> list[float]:
        return [count(scores[i, aggregation], needle, k) for i in range(asked.num_layers)]

    return {
        "ks": ks,
        "visual": len(needle),
        "needle": int(needle.sum()),
        **{
            name: {
                aggregation: {k: every_layer(count, aggregation, ks[k]) for k in ks}
                for aggregation in AGGREGATIONS
            }
            for name, count in (("recall", recall_at_k), ("precision", precision_at_k))
        },
    }


def summarise(rows: Sequence[dict[str, Any]]) -> Curves:
    """Average rows of `measure`, each with the ``id`` of its question and its ``video``.

    The questions of a video share its needles' surroundings, so videos are what counts: the
    intervals are over their means.

    Raises
    ------
    OptionError
        No row measures anything.
    """
    used = [row for row in rows if "left_out" not in row]
    left_out = {row["id"]: row["left_out"] for row in rows if "left_out" in row}
    if not used:
        reasons = "; ".join(sorted(set(left_out.values()))) or "there is no question"
        raise OptionError(
            f"Nothing could be measured: {reasons}. Take longer videos, a smaller --budget, or "
            "look at every picture with --frames."
        )
    layers = len(used[0]["recall"]["max"]["budget"])

    def values(name: str, aggregation: str, k: str, layer: int) -> list[float]:
        return _by_video(used, [row[name][aggregation][k][layer] for row in used])

    ceilings = {k: [_ceiling(row, k) for row in used] for k in used[0]["ks"]}

    points = tuple(
        Point(
            layer,
            aggregation,
            k,
            estimate(values("recall", aggregation, k, layer)),
            estimate(values("precision", aggregation, k, layer), max(ceilings[k])),
        )
        for aggregation in AGGREGATIONS
        for k in used[0]["ks"]
        for layer in range(layers)
    )
    candidates = [point for point in points if point.k == "budget"]
    best = max(candidates, key=lambda point: (point.recall.mean, -point.layer))
    ranked = values("recall", best.aggregation, "budget", best.layer)
    rivals = tuple(
        layer
        for layer in range(layers)
        if layer != best.layer
        and not _is_below(values("recall", best.aggregation, "budget", layer), ranked)
    )
    return Curves(
        points=points,
        ks={k: round(sum(row["ks"][k] for row in used) / len(used)) for k in used[0]["ks"]},
        chance={
            k: sum(row["ks"][k] / row["visual"] for row in used) / len(used) for k in used[0]["ks"]
        },
        most_precise=sum(ceilings["frame"]) / len(used),
        videos=len({row["video"] for row in used}),
        questions=len(used),
        left_out=left_out,
        layer=best.layer,
        aggregation=best.aggregation,
        rivals=rivals,
    )


def estimate(values: Sequence[float], most: float = 1.0) -> Estimate:
    """Mean of values in [0, ``most``] with a 95% Wilson interval.

    The interval is that of a yes-or-no share, the widest that such values can need, so it is never
    too narrow, stays within the range, and has a width even where all values are alike.
    """
    n, mean = len(values), sum(values) / len(values)
    share = min(1.0, mean / most)
    spread = 1 + _Z**2 / n
    middle = (share + _Z**2 / (2 * n)) / spread
    half = _Z / spread * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    low, high = max(0.0, middle - half) * most, min(1.0, middle + half) * most
    return Estimate(mean, min(mean, low), max(mean, high))


class Rows:
    """Rows of a measurement in a file, one a line, the settings in the first.

    Parameters
    ----------
    path : the file; made if missing. A last line that an interruption cut is measured again.
    settings : what decides the rows, ready for JSON.

    Raises
    ------
    OptionError
        The file holds rows that other settings decided.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path = path
        self._rows: dict[str, dict[str, Any]] = {}
        lines = path.read_text().splitlines() if path.exists() else []
        found = [row for line in lines if (row := _parsed(line)) is not None]
        if found and found[0] != {"settings": settings}:
            before = found[0].get("settings", {})
            names = sorted(
                name for name in {*before, *settings} if before.get(name) != settings.get(name)
            )
            raise OptionError(
                f"{path} was measured with other settings ({', '.join(names)} differ). Choose "
                "another folder with --out, or delete the file."
            )
        self._rows = {row["id"]: row for row in found[1:]}
        # Written anew, so that no half line stays in the middle of the file.
        whole = [{"settings": settings}, *found[1:]]
        replace_file(path, "".join(json.dumps(row) + "\n" for row in whole).encode())

    def __contains__(self, name: str) -> bool:
        return name in self._rows

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row; it is in the file when this returns."""
        self._rows[row["id"]] = row
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def of(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return the rows called ``names``."""
        return [self._rows[name] for name in names]


def _by_video(rows: Sequence[dict[str, Any]], values: Sequence[float]) -> list[float]:
    """Average values of the same video: one value a video."""
    by_video: dict[str, list[float]] = {}
    for row, value in zip(rows, values, strict=True):
        by_video.setdefault(row["video"], []).append(value)
    return [sum(own) / len(own) for own in by_video.values()]


def _ceiling(row: dict[str, Any], k: str) -> float:
    """Return the highest precision that a needle of this many tokens allows."""
    return min(row["needle"], row["ks"][k]) / min(row["ks"][k], row["visual"])


def _is_below(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether paired values tell that the first are lower: the 95% interval of the difference."""
    difference = torch.tensor(second, dtype=torch.float64) - torch.tensor(
        first, dtype=torch.float64
    )
    if len(difference) < 2:
        return False
    error = float(difference.std()) / math.sqrt(len(difference))
    return float(difference.mean()) - _Z * error > 0


def _parsed(line: str) -> dict[str, Any] | None:
    """Read a line, None for one that was cut off."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) else None
