"""Recall curves as files: JSON, CSV and a plot."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

from ..testbed.videos import replace_file
from .extras import new_figure, save_figure
from .recall import AGGREGATIONS, Curves

#: Colour of each aggregation: told apart also by people who see no red or green, and in print by
#: marker, and stands a little aside so that no interval hides another.
_STYLES = {"max": ("#1f5fbf", "o", -0.06), "mean": ("#d9730d", "s", 0.06)}
_GREY = "#6b7280"


def write_curves(
    curves: Curves, folder: Path, *, settings: dict[str, Any], preset_layer: int | None
) -> list[Path]:
    """Write ``recall.json``, ``recall.csv``, ``recall.png`` and ``recall.svg`` into ``folder``.

    Parameters
    ----------
    curves : the measurement.
    settings : what decided it; goes into the JSON, and model and method into the title.
    preset_layer : marked in the plot.

    Raises `OptionError` where matplotlib is not installed.
    """
    record = {
        "recommended": {
            "layer": curves.layer,
            "aggregation": curves.aggregation,
            "not_told_apart": list(curves.rivals),
        },
        "k": curves.ks,
        "chance": curves.chance,
        "most_precise": curves.most_precise,
        "videos": curves.videos,
        "questions": curves.questions,
        "left_out": curves.left_out,
        "layers": [dataclasses.asdict(point) for point in curves.points],
        "settings": settings,
    }
    replace_file(folder / "recall.json", (json.dumps(record, indent=1) + "\n").encode())
    replace_file(folder / "recall.csv", _table(curves).encode())
    figure = draw_curves(curves, title=_title(settings), preset_layer=preset_layer)
    for ending in ("png", "svg"):
        save_figure(figure, folder / f"recall.{ending}")
    return [folder / f"recall.{ending}" for ending in ("json", "csv", "png", "svg")]


def draw_curves(curves: Curves, *, title: str = "", preset_layer: int | None = None) -> Any:
    """Draw recall at the budget, and beside it the reference's measure, over the layers.

    Returns a matplotlib figure.
    """
    layers = [point.layer for point in curves.of("max", "budget")]
    figure = new_figure(9.6, 4.3)
    left, right = figure.subplots(1, 2, sharex=True)
    for axes, k, field in ((left, "budget", "recall"), (right, "frame", "precision")):
        for aggregation in AGGREGATIONS:
            curve = [getattr(point, field) for point in curves.of(aggregation, k)]
            colour, marker, aside = _STYLES[aggregation]
            axes.errorbar(
                [layer + aside for layer in layers],
                [value.mean for value in curve],
                yerr=[
                    [value.mean - value.low for value in curve],
                    [value.high - value.mean for value in curve],
                ],
                color=colour,
                marker=marker,
                markersize=5,
                linewidth=1.8,
                elinewidth=1,
                capsize=2,
                label=f"{aggregation} over heads and text",
                zorder=3,
            )
        axes.set_ylim(-0.03, 1.05)
        axes.set_xlim(-0.5, max(layers) + 0.5)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("reference layer")
        axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        if preset_layer is not None:
            axes.axvline(preset_layer, color=_GREY, linewidth=1, linestyle=(0, (1, 2)), zorder=0)
    _level(left, curves.chance["budget"], "by chance")
    _level(right, curves.most_precise, "the most possible")
    best = curves.best.recall
    colour, marker, aside = _STYLES[curves.aggregation]
    left.plot(
        [curves.layer + aside],
        [best.mean],
        marker="o",
        markersize=14,
        markerfacecolor="none",
        markeredgecolor=colour,
        markeredgewidth=1.6,
        clip_on=False,
    )
    left.set_title(
        f"Recall@{curves.ks['budget']:,}: share of the needle's tokens\n"
        f"among the {curves.ks['budget']:,} highest (the budget)",
        fontsize=10,
        loc="left",
    )
    right.set_title(
        f"The reference's measure: share of the {curves.ks['frame']:,} highest\n"
        "(the tokens of a frame) that are the needle's",
        fontsize=10,
        loc="left",
    )
    lines, labels = left.get_legend_handles_labels()
    figure.legend(lines, labels, loc="upper right", ncols=2, frameon=False, fontsize=9)
    dotted = "" if preset_layer is None else f"; dotted: the preset's layer {preset_layer}"
    figure.suptitle(
        title or " ", fontsize=11, fontweight="bold", x=0.01, ha="left", parse_math=False
    )
    figure.supxlabel(
        f"{curves.questions} questions on {curves.videos} videos; bars: 95% intervals; "
        f"ring: recommended{dotted}",
        fontsize=8.5,
        color=_GREY,
    )
    return figure


def _level(axes: Any, height: float, label: str) -> None:
    """Draw a dashed line across, labelled at its left end."""
    axes.axhline(height, color=_GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.annotate(
        label,
        (0.01, height),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        color=_GREY,
        fontsize=8,
    )


def _title(settings: dict[str, Any]) -> str:
    name = Path(str(settings.get("model", ""))).name
    selector = settings.get("selector")
    lite = f", selector {Path(str(selector)).name}" if selector else ""
    return f"Which layer finds the needle: {name}{lite}"


def _table(curves: Curves) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    names = ("recall", "precision")
    parts = ("mean", "low", "high")
    writer.writerow(
        [
            "layer",
            "aggregation",
            "k_is",
            "k",
            *(f"{name}{'' if part == 'mean' else '_' + part}" for name in names for part in parts),
        ]
    )
    for point in curves.points:
        values = [getattr(getattr(point, name), part) for name in names for part in parts]
        writer.writerow(
            [
                point.layer,
                point.aggregation,
                point.k,
                curves.ks[point.k],
                *(f"{value:.4f}" for value in values),
            ]
        )
    return buffer.getvalue()
