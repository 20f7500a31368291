"""Tables of the testbed's study, as Markdown, from the tallies that the study gathered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import Any

from flexselect.testbed.questions import CHANCE, RETRIEVAL

_METHODS = (
    "all tokens",
    "uniform frames",
    "random tokens",
    "training-free",
    "Lite",
    "training-free, 1/16",
    "Lite, 1/16",
)
_LENGTHS = (16, 512, 1024, 2048)
_ANOTHER = "another video's question"


def interval(right: int, asked: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share: bounds that hold near 0 and 1 too.

    Parameters
    ----------
    right, asked : int
        Successes and trials, at least one.
    z : float
        Standard deviations; 1.96 for 95%.
    """
    share = right / asked
    centre = share + z * z / (2 * asked)
    spread = z * sqrt(share * (1 - share) / asked + z * z / (4 * asked * asked))
    scale = 1 + z * z / asked
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def write_report(results: Mapping[str, Any], path: Path) -> None:
    """Write every table that the results have cells for, between two marks of a Markdown file.

    Text outside the marks stays; a file without them gets the tables at its end.
    """
    begin, end = "<!-- tables -->", "<!-- end of tables -->"
    text = path.read_text() if path.exists() else ""
    before, _, rest = text.partition(begin)
    after = rest.partition(end)[2]
    tables = "\n\n".join(_family_report(family, cells) for family, cells in sorted(results.items()))
    path.write_text(f"{before.rstrip()}\n\n{begin}\n\n{tables}\n\n{end}{after or chr(10)}")


def _family_report(family: str, cells: Mapping[str, Any]) -> str:
    parts = [f"## {family}", _accuracy(cells), _moments(cells), _scoring(cells)]
    parts += [_layers(cells, "test", LAYER_TITLE)]
    parts += [_weak(cells), _knobs(cells), _layers(cells, "validation", LOOKED_AT)]
    return "\n\n".join(part for part in parts if part)


LAYER_TITLE = "Recall of the needle among as many best tokens as the budget, 512 frames, by layer:"
LOOKED_AT = "The same on validation videos, by what asks:"


def _accuracy(cells: Mapping[str, Any]) -> str:
    rows = []
    for name in (*_METHODS, f"all tokens, {_ANOTHER}", f"training-free, {_ANOTHER}"):
        row = [name]
        for frames in _LENGTHS:
            cell = cells.get(f"test/{frames}/retrieval/{name}")
            row.append(_share(cell) if cell else "")
        if any(row[1:]):
            rows.append(row)
    if not rows:
        return ""
    chance = sum(CHANCE[task] for task in RETRIEVAL) / len(RETRIEVAL)
    head = [f"accuracy (chance {chance:.2f})", *(f"{frames:,} frames" for frames in _LENGTHS)]
    return _table(head, rows)


def _share(cell: Mapping[str, Any]) -> str:
    low, high = interval(cell["right"], cell["asked"])
    text = f"{cell['right'] / cell['asked']:.3f} ({low:.2f}-{high:.2f}, n {cell['asked']})"
    if cell["kept"] < cell["visual"] and cell["kept_needle"]:
        kept = cell["kept"] / cell["visual"]
        text += f"; kept {kept:.1%}, of the needle {cell['kept_needle'] / cell['asked']:.2f}"
    return text


def _moments(cells: Mapping[str, Any]) -> str:
    def shares(cell: Mapping[str, Any]) -> str:
        first, five = (cell[k] / cell["asked"] for k in ("first_moment", "five_moments"))
        return f"{first:.2f}; {five:.2f}"

    title = "Questions whose right moment `ask` names first; among five:"
    return _by_length(cells, "right moment", title, shares)


def _scoring(cells: Mapping[str, Any]) -> str:
    def milliseconds(cell: Mapping[str, Any]) -> str:
        return f"{1e3 * cell['seconds']['rank'] / cell['asked']:.0f}"

    title = "Scoring, milliseconds a question, in one process:"
    return _by_length(cells, "scoring", title, milliseconds)


def _by_length(
    cells: Mapping[str, Any], head: str, title: str, figure: Callable[[Mapping[str, Any]], str]
) -> str:
    """Tabulate a figure of training-free and Lite, at the preset's budget."""
    rows = []
    for name in ("training-free", "Lite"):
        found = [cells.get(f"test/{frames}/retrieval/{name}") for frames in _LENGTHS[1:]]
        if any(found):
            rows.append([name, *(figure(cell) if cell else "" for cell in found)])
    lengths = [f"{frames:,} frames" for frames in _LENGTHS[1:]]
    return f"{title}\n\n" + _table([head, *lengths], rows) if rows else ""


def _layers(cells: Mapping[str, Any], split: str, title: str) -> str:
    found: dict[str, dict[str, str]] = {}
    for key, cell in cells.items():
        prefix, _, name = key.rpartition("/")
        if prefix == f"{split}/512/retrieval" and name.startswith("layer "):
            layer, _, asks = name.removeprefix("layer ").partition(", ")
            found.setdefault(asks, {})[layer] = f"{cell['recall'] / cell['asked']:.2f}"
    if not found:
        return ""
    layers = sorted({layer for row in found.values() for layer in row}, key=int)
    rows = [
        [_asking(asks), *(row.get(layer, "") for layer in layers)] for asks, row in found.items()
    ]
    return f"{title}\n\n" + _table(["layer", *layers], rows)


def _asking(asks: str) -> str:
    return "as in the preset" if "None" in asks else asks


def _weak(cells: Mapping[str, Any]) -> str:
    rows = []
    for frames in (16, 512):
        for name in ("all tokens", "training-free"):
            cell = cells.get(f"test/{frames}/weak/{name}")
            if cell:
                shares = [
                    f"{right / asked:.2f} ({low:.2f}-{high:.2f})"
                    for right, asked in cell["by_task"].values()
                    for low, high in [interval(right, asked)]
                ]
                rows.append([f"{frames} frames, {name}", *shares])
    if not rows:
        return ""
    tasks = next(cells[k]["by_task"] for k in cells if "/weak/" in k)
    return _table(["weak task", *(f"{t} (chance {CHANCE[t]:.2f})" for t in tasks)], rows)


def _knobs(cells: Mapping[str, Any]) -> str:
    rows = []
    for key, cell in cells.items():
        prefix, _, name = key.rpartition("/")
        if prefix == "validation/512/retrieval" and not name.startswith("layer "):
            knob, _, value = name.partition(" ")
            asked = cell["asked"]
            accuracy = _share({**cell, "kept_needle": 0})
            figures = [
                f"{cell[k] / asked:.2f}" for k in ("kept_needle", "first_moment", "five_moments")
            ]
            rows.append([knob, value, accuracy, *figures])
    if not rows:
        return ""
    rows.sort(key=lambda row: (row[0], row[1].zfill(9)))
    head = ["knob", "value", "accuracy", "needle kept", "in first moment", "in first five"]
    return "Knobs one by one, 512 frames, validation videos:\n\n" + _table(head, rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
