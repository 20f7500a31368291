"""Overlays and timelines as SVG: sharp at any size, and small enough to lie in a page by dozens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

#: Steps in which relevance is shown.
_LEVELS = 8


def kept_overlay(kept: NDArray[np.bool_]) -> str:
    """Darken what was dropped and outline what was kept: bool ``(rows, columns)`` to SVG."""
    rows, columns = kept.shape
    dropped = "".join(
        f"M{c} {r}h{stop - c}v1h{c - stop}z"
        for r in range(rows)
        for c, stop in _stretches(~kept[r])
    )
    return (
        f'<svg class="overlay kept" viewBox="0 0 {columns} {rows}" preserveAspectRatio="none" '
        f'aria-hidden="true"><path class="dropped" d="{dropped}"/>'
        f'<path class="rim" d="{_outline(kept)}"/></svg>'
    )


def heat_overlay(relevance: NDArray[np.float64]) -> str:
    """Colour the cells of a picture by relevance in [0, 1]: ``(rows, columns)`` to SVG."""
    rows, columns = relevance.shape
    levels = np.ceil(np.clip(relevance, 0, 1) * _LEVELS).astype(int)
    paths = []
    for level in range(1, _LEVELS + 1):
        cells = "".join(
            f"M{c} {r}h{stop - c}v1h{c - stop}z"
            for r in range(rows)
            for c, stop in _stretches(levels[r] == level)
        )
        if cells:
            paths.append(f'<path d="{cells}" fill-opacity="{0.85 * level / _LEVELS:.2f}"/>')
    return (
        f'<svg class="overlay heat" viewBox="0 0 {columns} {rows}" preserveAspectRatio="none" '
        f'aria-hidden="true">{"".join(paths)}</svg>'
    )


def box_overlay(marked: NDArray[np.bool_]) -> str:
    """Outline the cells that show a needle: bool ``(rows, columns)`` to SVG."""
    rows, columns = marked.shape
    return (
        f'<svg class="overlay needle" viewBox="0 0 {columns} {rows}" preserveAspectRatio="none" '
        f'aria-hidden="true"><path class="box" d="{_outline(marked)}"/></svg>'
    )


def area_path(heights: Sequence[float], edges: Sequence[float]) -> str:
    """Draw steps from the bottom (1) up as an SVG path.

    Parameters
    ----------
    heights : ``n`` values in [0, 1].
    edges : ``n + 1`` places along the axis, ascending; step i stands between edges i and i + 1.
    """
    parts = [f"M{edges[0]:.2f} 1"]
    parts += [
        f"V{1 - height:.4f}H{edge:.2f}" for height, edge in zip(heights, edges[1:], strict=True)
    ]
    return "".join(parts) + "V1z"


def strip_paths(shares: Sequence[float], edges: Sequence[float]) -> str:
    """Draw shares in [0, 1] as a strip of the given opacity, in SVG paths of height 1."""
    paths = []
    for share in sorted(set(shares) - {0.0}):
        places = np.array([value == share for value in shares])
        bars = "".join(
            f"M{edges[start]:.2f} 0H{edges[stop]:.2f}V1H{edges[start]:.2f}z"
            for start, stop in _stretches(places)
        )
        paths.append(f'<path d="{bars}" fill-opacity="{0.25 + 0.75 * share:.2f}"/>')
    return "".join(paths)


def _stretches(mask: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return (start, stop) of every stretch of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False])).astype(np.int8)))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def _outline(mask: NDArray[np.bool_]) -> str:
    """Trace the border of the true cells, one straight piece after the other."""
    padded = np.pad(mask, 1)
    level = padded[1:, 1:-1] != padded[:-1, 1:-1]
    upright = padded[1:-1, 1:] != padded[1:-1, :-1]
    across = [
        f"M{start} {y}H{stop}" for y, row in enumerate(level) for start, stop in _stretches(row)
    ]
    down = [
        f"M{x} {start}V{stop}"
        for x, column in enumerate(upright.T)
        for start, stop in _stretches(column)
    ]
    return "".join(across + down)
