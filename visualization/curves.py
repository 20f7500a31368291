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
#: marker.
_STYLES = {"max": ("#1f5fbf", "o"), "mean": ("#d9730d", "s")}
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
    figure = new_figure(9.6, 4.1)
    left, right = figure.subplots(1, 2, sharex=True)
    for axes, k, field in ((left, "budget", "recall"), (right, "frame", "precision")):
        for aggregation in AGGREGATIONS:
            curve = [getattr(point, field) for point in curves.of(aggregation, k)]
            colour, marker = _STYLES[aggregation]
            axes.fill_between(
                layers,
                [value.low for value in curve],
                [value.high for value in curve],
                color=colour,
                alpha=0.13,
                linewidth=0,
            )
            axes.plot(
                layers,
                [value.mean for value in curve],
                color=colour,
                marker=marker,
                markersize=4.5,
                linewidth=1.8,
                label=f"{aggregation} over heads and text",
            )
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlim(-0.4, max(layers) + 0.4)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("reference layer")
        axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        if preset_layer is not None:
            axes.axvline(preset_layer, color=_GREY, linewidth=1, linestyle=(0, (1, 2)), zorder=0)
    left.axhline(curves.chance["budget"], color=_GREY, linewidth=1, linestyle=(0, (4, 3)))
    left.annotate(
        "by chance",
        (max(layers), curves.chance["budget"]),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        color=_GREY,
        fontsize=8,
    )
    best = curves.best.recall
    left.plot(
        [curves.layer],
        [best.mean],
        marker="o",
        markersize=13,
        markerfacecolor="none",
        markeredgecolor=_STYLES[curves.aggregation][0],
        markeredgewidth=1.6,
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
    left.legend(frameon=False, fontsize=8.5, loc="best")
    dotted = "" if preset_layer is None else f"; dotted: the preset's layer {preset_layer}"
    figure.suptitle(
        f"{title}\n" if title else "", fontsize=11, fontweight="bold", x=0.01, ha="left"
    )
    figure.supxlabel(
        f"{curves.questions} questions, {curves.videos} videos; bands: 95% intervals; "
        f"ring: recommended{dotted}",
        fontsize=8.5,
        color=_GREY,
    )
    return figure


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
