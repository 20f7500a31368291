"""Tables of the testbed's study, as Markdown, from the tallies that the study gathered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import Any

from flexselect.core.errors import OptionError
from flexselect.testbed.questions import CHANCE, RETRIEVAL
from flexselect.testbed.videos import replace_file

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
_CONTROLS = (
    "all tokens, another video's question",
    "training-free, another video's question",
    "no video",
)
_LAYER_TITLE = "Recall of the needle among as many best tokens as the budget, 512 frames, by layer"
_LOOKED_AT = "The same on validation videos, by what asks"
_BEGIN, _END = "<!-- tables -->", "<!-- end of tables -->"


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


def difference(ours: str, theirs: str, z: float = 1.96) -> tuple[float, float, float]:
    """Difference of two shares of the same questions, and the bounds of its interval.

    Parameters
    ----------
    ours, theirs : str
        A 1 (right) or 0 a question, in the same order, at least one.
    z : float
        Standard deviations; 1.96 for 95%.

    Returns
    -------
    difference, low, high : float
        Ours less theirs; only questions that one has right and the other wrong tell them apart.
    """
    pairs = list(zip(ours, theirs, strict=True))
    better, worse = pairs.count(("1", "0")), pairs.count(("0", "1"))
    n = len(pairs)
    found = (better - worse) / n
    # Agresti and Min's interval for matched pairs: half a question is added to each of the four.
    centre = (better - worse) / (n + 2)
    variance = (better + worse + 1) - (better - worse) ** 2 / (n + 2)
    spread = z * sqrt(variance) / (n + 2)
    return found, centre - spread, centre + spread


def write_report(results: Mapping[str, Any], path: Path) -> None:
    """Write every table that the results have cells for, between two marks of a Markdown file.

    Text outside the marks stays; a file without them gets the tables at its end. Raises
    `OptionError` for a file with only one of the marks.
    """
    text = path.read_text() if path.exists() else ""
    if (text.count(_BEGIN), text.count(_END)) not in ((0, 0), (1, 1)):
        raise OptionError(
            f"{path} must have {_BEGIN} and {_END} once each, or neither. Mend the marks, or name "
            "another file with --report."
        )
    before, _, rest = text.partition(_BEGIN)
    after = rest.partition(_END)[2]
    tables = "\n\n".join(_family_report(family, cells) for family, cells in sorted(results.items()))
    page = f"{before.rstrip()}\n\n{_BEGIN}\n\n{tables}\n\n{_END}{after or chr(10)}"
    replace_file(path, page.encode())


def _family_report(family: str, cells: Mapping[str, Any]) -> str:
    parts = [f"## {family}", _accuracy(cells), _moments(cells), _scoring(cells)]
    parts += [_layers(cells, "test", _LAYER_TITLE)]
    parts += [_weak(cells), _knobs(cells), _layers(cells, "validation", _LOOKED_AT)]
    return "\n\n".join(part for part in parts if part)


def _accuracy(cells: Mapping[str, Any]) -> str:
    rows = []
    for name in (*_METHODS, *_CONTROLS):
        row = [name]
        for frames in _LENGTHS:
            cell = cells.get(f"test/{frames}/retrieval/{name}")
            # A control has no needle.
            row.append(_share(cell, name in _METHODS) if cell else "")
        if any(row[1:]):
            rows.append(row)
    for budget in ("", ", 1/16"):
        row = [f"Lite{budget} less training-free{budget}"]
        for frames in _LENGTHS:
            ours, theirs = (
                cells.get(f"test/{frames}/retrieval/{name}{budget}")
                for name in ("Lite", "training-free")
            )
            row.append(_difference(ours, theirs) if ours and theirs else "")
        if any(row[1:]):
            rows.append(row)
    if not rows:
        return ""
    chance = sum(CHANCE[task] for task in RETRIEVAL) / len(RETRIEVAL)
    head = [f"accuracy (chance {chance:.2f})", *(f"{frames:,} frames" for frames in _LENGTHS)]
    return _table(head, rows)


def _difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    if not ours["hits"] or len(ours["hits"]) != len(theirs["hits"]):
        return ""  # One of them is still being counted.
    found, low, high = difference(ours["hits"], theirs["hits"])
    return f"{found:+.3f} ({low:+.3f} to {high:+.3f})"


def _share(cell: Mapping[str, Any], needle: bool = True) -> str:
    low, high = interval(cell["right"], cell["asked"])
    text = f"{cell['right'] / cell['asked']:.3f} ({low:.2f}-{high:.2f}, n {cell['asked']})"
    if needle and cell["kept"] < cell["visual"]:
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
    found: dict[str, dict[int, str]] = {}
    asked = 0
    for key, cell in cells.items():
        name = key.removeprefix(f"{split}/512/retrieval/layer ")
        if name != key:
            layer, _, asks = name.partition(", ")
            found.setdefault(asks, {})[int(layer)] = f"{cell['recall'] / cell['asked']:.2f}"
            asked = cell["asked"]
    if not found:
        return ""
    layers = sorted({layer for row in found.values() for layer in row})
    rows = [
        [asks or "as in the preset", *(row.get(layer, "") for layer in layers)]
        for asks, row in found.items()
    ]
    return f"{title} (n {asked}):\n\n" + _table(["layer", *map(str, layers)], rows)


def _weak(cells: Mapping[str, Any]) -> str:
    rows = []
    for frames in (16, 512):
        for name in ("all tokens", "training-free"):
            cell = cells.get(f"test/{frames}/weak/{name}")
            if cell:
                shares = [
                    f"{right / asked:.2f} ({low:.2f}-{high:.2f}, n {asked})"
                    for right, asked in cell["by_task"].values()
                    for low, high in [interval(right, asked)]
                ]
                rows.append([f"{frames} frames, {name}", *shares])
    if not rows:
        return ""
    tasks = next(cells[k]["by_task"] for k in cells if "/weak/" in k)
    return _table(["weak task", *(f"{t} (chance {CHANCE[t]:.2f})" for t in tasks)], rows)


def _knobs(cells: Mapping[str, Any]) -> str:
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for key, cell in cells.items():
        name = key.removeprefix("validation/512/retrieval/")
        if name != key and not name.startswith("layer "):
            knob, _, value = name.partition(" ")
            found.setdefault(knob, {})[value] = cell
    rows = []
    for knob, values in sorted(found.items()):
        # Where other knobs were turned, this one was as in the preset.
        others = [cell for other in found if other != knob for cell in found[other].values()]
        preset = str(others[0]["knobs"][knob]) if others else None
        for value, cell in sorted(values.items(), key=lambda item: item[0].zfill(9)):
            asked = cell["asked"]
            less = "preset"
            if value != preset:
                less = _difference(cell, values[preset]) if preset in values else ""
            figures = [
                f"{cell[k] / asked:.2f}" for k in ("kept_needle", "first_moment", "five_moments")
            ]
            rows.append([knob, value, _share(cell, needle=False), less, *figures])
    if not rows:
        return ""
    head = ["knob", "value", "accuracy", "less preset", "needle kept"]
    head += ["in first moment", "in first five"]
    return "Knobs one by one, 512 frames, validation videos:\n\n" + _table(head, rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
