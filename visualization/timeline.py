"""A selection over time: relevance, kept share, moments and needles of every frame, as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..inference.terminal import stamp
from .overlays import area_path, strip_paths
from .page import text

#: Least distance of two pins in a row, as a share of the width.
_APART = 0.085


@dataclass(frozen=True)
class Pin:
    """A numbered place on a timeline."""

    number: int
    seconds: float
    label: str


def timeline(
    times: Sequence[float],
    end: float,
    kept: Sequence[float],
    relevance: Sequence[float] | None,
    *,
    pins: Sequence[Pin] = (),
    needles: Sequence[float] = (),
    plays: bool = False,
) -> str:
    """Draw a timeline.

    Parameters
    ----------
    times : when each frame appears, in seconds, ascending.
    end : when the last one goes.
    kept : share of every frame's visual tokens that stayed.
    relevance : of every frame, 0 or more; None for a method that does not rank.
    pins : numbered places above it.
    needles : seconds at which the answer is known to be seen.
    plays : whether a pin is a button that plays the video from there.
    """
    end = max(end, times[-1] + 1e-3)
    edges = [1000 * max(time, 0.0) / end for time in [*times, end]]
    parts = []
    if relevance is not None:
        best = max(relevance)
        heights = [value / best if best > 0 else 0.0 for value in relevance]
        peak = max(range(len(times)), key=lambda frame: relevance[frame])
        label = (
            f"Relevance of {len(times)} frames over time; highest at {stamp(times[peak])} of "
            f"{stamp(end)}"
        )
        parts.append(_svg("area", f'<path d="{area_path(heights, edges)}"/>', label))
    read = sum(share > 0 for share in kept)
    label = f"Share of visual tokens kept of each frame; {read} of {len(times)} frames keep some"
    parts.append(_svg("strip", strip_paths([round(share, 2) for share in kept], edges), label))
    tag = "button" if plays else "span"
    rows = _rows([pin.seconds / end for pin in pins])
    places = "".join(
        f'<{tag} class="badge pin" style="left:{_percent(pin.seconds / end)};--row:{row}" '
        + (f'type="button" data-at="{pin.seconds:.3f}" ' if plays else "")
        + f'title="{text(pin.label)}"'
        + (f' aria-label="{text(pin.label)}"' if plays else "")
        + f">{pin.number}</{tag}>"
        for pin, row in zip(pins, rows, strict=True)
    )
    marks = "".join(
        f'<span class="mark" style="left:{100 * max(seconds, 0.0) / end:.2f}%"></span>'
        for seconds in needles
    )
    axis = "".join(f"<span>{stamp(end * part / 4)}</span>" for part in range(5))
    legend = _legend(relevance is not None, bool(needles))
    return (
        f'<div class="timeline" style="--rows:{max(rows, default=0) + 1}">'
        f'<div class="pins">{places}</div>{"".join(parts)}'
        f'<div class="marks" aria-hidden="true">{marks}</div></div>'
        f'<div class="axis number">{axis}</div>{legend}'
    )


def _rows(places: Sequence[float]) -> list[int]:
    """Give every pin a row in which no other is closer than a finger's breadth on a phone."""
    taken: list[list[float]] = []
    rows = []
    for place in places:
        free = (i for i, row in enumerate(taken) if all(abs(place - p) > _APART for p in row))
        row = next(free, len(taken))
        if row == len(taken):
            taken.append([])
        taken[row].append(place)
        rows.append(row)
    return rows


def _percent(share: float) -> str:
    """Place a pin so that it stays within the page."""
    return f"clamp(.9rem, {100 * max(share, 0.0):.2f}%, calc(100% - .9rem))"


def _svg(kind: str, body: str, label: str) -> str:
    return (
        f'<svg class="{kind}" viewBox="0 0 1000 1" preserveAspectRatio="none" role="img" '
        f'aria-label="{text(label)}">{body}</svg>'
    )


def _legend(ranked: bool, needles: bool) -> str:
    items = []
    if ranked:
        items.append('<li><span class="swatch"></span>relevance of the frame’s best token</li>')
    items.append('<li><span class="swatch kept"></span>kept: the stronger, the more tokens</li>')
    if needles:
        items.append('<li><span class="swatch needle"></span>where the answer is seen</li>')
    return f'<ul class="legend">{"".join(items)}</ul>'
