"""What the testbed's study measures: cells of its tables, each a method at work on some clips."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flexselect.inference.methods import FlexSelect, Full, Method, Random, Uniform
from flexselect.testbed.questions import RETRIEVAL, TASKS

LENGTHS = (512, 1024, 2048)
#: Number of the first test video that retrieval is measured on. Recipes of training were changed
#: after a look at how earlier checkpoints did on those before it.
UNSEEN = 10_000


@dataclass(frozen=True)
class Clips:
    """Videos that are asked together: which of a split, their length, and what is asked of each."""

    split: str
    frames: int
    count: int
    tasks: tuple[str, ...]
    first: int = 0

    @property
    def retrieval(self) -> bool:
        """Whether nothing is asked but attributes of a single needle."""
        return set(self.tasks) <= set(RETRIEVAL)

    @property
    def key(self) -> str:
        """Name in keys and of the folder."""
        kind = "retrieval" if self.retrieval else "weak"
        return f"{self.split}/{self.frames}/{kind}"


@dataclass(frozen=True)
class Cell:
    """One line of a table: a method at work on some clips.

    ``control`` "shuffled" asks each video what was meant for the next, "blind" asks without any
    video and looks at the first word alone; ``ranks_only`` measures recall without an answer;
    ``lite`` ranks with the family's Lite selector; ``limit`` looks only at the first videos, for
    what takes too long.
    """

    name: str
    clips: Clips
    method: Method
    control: str | None = None
    ranks_only: bool = False
    lite: bool = False
    limit: int | None = None

    @property
    def key(self) -> str:
        """Name in the results."""
        return f"{self.clips.key}/{self.name}"

    @property
    def count(self) -> int:
        """Videos to look at."""
        return self.clips.count if self.limit is None else self.limit


def table_cells(preset: Mapping[str, Any], tokens_per_frame: int) -> list[Cell]:
    """List the cells of the test table; beside the preset's budget, a sixteenth of the tokens."""
    short = Clips("test", 16, 70, RETRIEVAL, UNSEEN)
    weak = Clips("test", 16, 200, TASKS[3:])
    cells = [
        Cell("all tokens", short, Full()),
        Cell("all tokens, another video's question", short, Full(), control="shuffled"),
        Cell("no video", short, Full(), control="blind"),
        Cell("all tokens", weak, Full()),
    ]
    for frames in LENGTHS:
        clips = Clips("test", frames, 35, RETRIEVAL * 2, UNSEEN)
        # Attention over every token of 2,048 frames takes a core half a minute a question.
        limit = 12 if frames * tokens_per_frame > 8192 else None
        cells += [
            Cell("all tokens", clips, Full(), limit=limit),
            Cell("uniform frames", clips, Uniform()),
            Cell("random tokens", clips, Random()),
            Cell("training-free", clips, FlexSelect()),
            Cell("Lite", clips, FlexSelect(), lite=True),
        ]
        sixteenth = frames * tokens_per_frame // 16
        if sixteenth != preset["budget"]:
            cells += [
                Cell("training-free, 1/16", clips, FlexSelect(budget=sixteenth)),
                Cell("Lite, 1/16", clips, FlexSelect(budget=sixteenth), lite=True),
            ]
        if frames == LENGTHS[0]:
            asked = "training-free, another video's question"
            cells.append(Cell(asked, clips, FlexSelect(), control="shuffled"))
    weak = Clips("test", LENGTHS[0], 70, TASKS[3:] * 3)
    cells += [Cell("all tokens", weak, Full()), Cell("training-free", weak, FlexSelect())]
    return cells


def layer_cells(layers: int, split: str, count: int) -> list[Cell]:
    """List what recall each layer has; nothing is answered.

    On validation videos whatever asks is tried, on test videos what the preset says.
    """
    clips = Clips(split, LENGTHS[0], count, RETRIEVAL * 2, UNSEEN if split == "test" else 0)
    asking: list[tuple[str, dict[str, Any]]] = [("", {})]
    if split == "validation":
        asking = [
            (f", {how} of {who}", {"aggregation": how, "query": who})
            for how, who in (("max", "all"), ("mean", "all"), ("max", "last"))
        ]
    return [
        Cell(f"layer {layer}{name}", clips, FlexSelect(layer=layer, **knobs), ranks_only=True)
        for name, knobs in asking
        for layer in range(layers)
    ]


def knob_cells(preset: Mapping[str, Any], count: int) -> list[Cell]:
    """List the knobs one by one around the preset, on validation videos."""
    clips = Clips("validation", LENGTHS[0], count, RETRIEVAL * 2)
    budget = int(preset["budget"])
    tries: list[tuple[str, list[Any]]] = [
        ("positions", ["original", "compact"]),
        ("query", ["all", "last"]),
        ("aggregation", ["max", "mean"]),
        ("budget", sorted({16, 32, 64, 96, 128, 192, 256, budget})),
        ("frames_per_set", [4, 8, 16, 32, 64]),
    ]
    return [
        Cell(f"{knob} {value}", clips, FlexSelect(**{knob: value}))
        for knob, values in tries
        for value in values
    ]
