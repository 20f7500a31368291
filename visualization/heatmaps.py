"""Heat maps: the relevance of visual tokens over the pictures they show, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ..inference.terminal import stamp
from .extras import new_figure
from .layers import Look
from .stills import TINY, Still, on_grid

_BLUE, _WARM, _GREEN, _GREY = "#1f5fbf", "#b4540a", "#22c55e", "#6b7280"


def draw_overlays(look: Look, stills: Mapping[int, Still], layer: int) -> Any:
    """Draw frames, their heat maps at one layer, and what was kept; returns a matplotlib figure.

    ``stills`` are the frames to show.
    """
    return _draw(look, stills, [layer], show_kept=True)


def draw_layers(look: Look, stills: Mapping[int, Still], layers: Sequence[int]) -> Any:
    """Draw frames above their heat maps at several layers, one row each."""
    return _draw(look, stills, layers, show_kept=False)


def draw_timeline(look: Look, layer: int) -> Any:
    """Draw relevance over time at one layer, above the share kept of every frame."""
    figure = new_figure(9.6, 3.4)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    times = look.video.times.numpy()
    end = max(float(look.video.record["duration"]), float(times[-1]) + 1e-3)
    edges = np.append(times, end)
    upper.stairs(look.frame_relevance(layer).numpy(), edges, fill=True, color=_BLUE)
    upper.set_ylabel("relevance")
    upper.set_title(f"Relevance of each frame’s best token, layer {layer}", fontsize=10, loc="left")
    tokens = len(look.grid.cells)
    share = look.selection.kept_per_frame().numpy() / tokens
    lower.stairs(share, edges, fill=True, color=_WARM)
    lower.set_ylim(0, 1)
    lower.set_ylabel("kept")
    lower.set_xlabel("seconds")
    for axes in (upper, lower):
        axes.set_xlim(0, end)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    if look.needle is not None:
        shown = look.needle.view(len(times), -1).any(1).nonzero()[:, 0].tolist()
        for axes in (upper, lower):
            for i, frame in enumerate(shown):
                axes.axvline(
                    (times[frame] + edges[frame + 1]) / 2,
                    color=_GREEN,
                    linewidth=1.4,
                    linestyle=(0, (3, 2)),
                    label="where the answer is seen" if i == 0 else None,
                )
        if shown:
            upper.legend(
                frameon=False,
                fontsize=8.5,
                loc="lower right",
                bbox_to_anchor=(1, 1),
                borderaxespad=0.2,
            )
    return figure


def heat_over(
    still: Still, relevance: NDArray[np.float64], longest: int = 224
) -> NDArray[np.uint8]:
    """Colour a grey picture by the relevance of its cells.

    Parameters
    ----------
    still : the picture.
    relevance : ``(rows, columns)`` in [0, 1].
    longest : pixels of the longer side of the result.

    Returns
    -------
    uint8 ``(height, width, 3)``
    """
    from matplotlib import colormaps

    picture = _scaled(still, longest)
    size = picture.shape[1], picture.shape[0]
    cells = Image.fromarray(np.asarray(relevance, dtype=np.float32))
    # Attention falls off steeply: its square root still shows the second and third best.
    heat = np.sqrt(np.clip(np.asarray(cells.resize(size, Image.Resampling.NEAREST)), 0, 1))
    light = picture.astype(np.float32).mean(-1)
    dark, bright = np.percentile(light, (1, 99))
    light = np.clip((light - dark) / max(bright - dark, 1.0), 0, 1)[..., None]
    colour = np.asarray(colormaps["inferno"](heat))[..., :3]
    # Light and dark of the picture stay in the colour, or what is most relevant would be hidden.
    mixed = colour * (0.5 + 0.5 * light) + 0.4 * light * (1 - heat[..., None])
    return (255 * np.clip(mixed, 0, 1)).round().astype(np.uint8)


def kept_over(still: Still, kept: NDArray[np.bool_], longest: int = 224) -> NDArray[np.uint8]:
    """Darken the cells of a picture that were dropped: bool ``(rows, columns)``."""
    picture = _scaled(still, longest)
    cells = Image.fromarray(kept.astype(np.uint8) * 255)
    stays = cells.resize((picture.shape[1], picture.shape[0]), Image.Resampling.NEAREST)
    return np.where(np.asarray(stays)[..., None] > 0, picture, picture // 5).astype(np.uint8)


def _draw(
    look: Look, stills: Mapping[int, Still], layers: Sequence[int], *, show_kept: bool
) -> Any:
    frames = sorted(stills)
    sample = stills[frames[0]]
    shape = sample.size[1] / sample.size[0]
    column = min(1.9, 11.5 / len(frames))
    lines = 1 + len(layers) + show_kept
    figure = new_figure(1.35 + len(frames) * column, 0.75 + lines * (column * shape + 0.12))
    rows = figure.subplots(lines, len(frames), squeeze=False)
    clip, grid = look.video.clip, look.grid
    needle = None if look.needle is None else on_grid(look.needle, grid, clip.frames).numpy()

    way = "nearest" if max(sample.size) < TINY else "antialiased"

    def fill(row: Any, label: str, pictures: Sequence[NDArray[np.uint8]]) -> None:
        for axes, frame, picture in zip(row, frames, pictures, strict=True):
            # Smoothed, a tiny picture would be blurred and its file three times as large.
            axes.imshow(picture, extent=(0, grid.columns, grid.rows, 0), interpolation=way)
            if needle is not None:
                _outline(axes, needle[frame], _GREEN, (0, (2, 1)))
            axes.set_aspect(grid.columns / grid.rows * shape)
            axes.set_xticks([])
            axes.set_yticks([])
            for side in axes.spines.values():
                side.set_visible(False)
        row[0].set_ylabel(label, fontsize=8.5, rotation=0, ha="right", va="center", labelpad=8)

    fill(rows[0], "the video", [_scaled(stills[frame], 224) for frame in frames])
    for axes, frame in zip(rows[0], frames, strict=True):
        axes.set_title(stamp(stills[frame].seconds), fontsize=8.5, color="#374151")
    for row, layer in zip(rows[1:], layers, strict=False):
        laid = on_grid(look.scores[layer].double(), grid, clip.frames)
        heat = (laid / laid.max().clamp(min=1e-30)).numpy()
        fill(row, _row_label(look, layer), [heat_over(stills[f], heat[f]) for f in frames])
    notes = ["brighter: more relevant (square root), each layer by its own highest"]
    if show_kept:
        stays = torch.zeros(look.selection.num_visual, dtype=torch.bool)
        stays[look.selection.kept] = True
        kept = on_grid(stays, grid, clip.frames).numpy()
        label = f"kept: {len(look.selection.kept):,} of\n{look.selection.num_visual:,} tokens"
        fill(rows[-1], label, [kept_over(stills[f], kept[f]) for f in frames])
        for axes, frame in zip(rows[-1], frames, strict=True):
            _outline(axes, kept[frame], "#ffb020", "solid")
            if needle is not None:
                _outline(axes, needle[frame], _GREEN, (0, (2, 1)))
        notes.append("framed: kept")
    if needle is not None:
        notes.append("green: where the answer is")
    figure.supxlabel("; ".join(notes), fontsize=8.5, color=_GREY)
    figure.suptitle(
        f"“{_short(look.question)}”",
        fontsize=11,
        fontweight="bold",
        x=0.01,
        ha="left",
        # Dollars in a question are money.
        parse_math=False,
    )
    return figure


def _row_label(look: Look, layer: int) -> str:
    own = " *" if layer == look.layer and len(look.scores) > 1 else ""
    rank = look.needle_rank(layer)
    if rank is None:
        return f"layer {layer}{own}"
    return f"layer {layer}{own}\nneedle ranks\n{rank:,} of {look.selection.num_visual:,}"


def _outline(axes: Any, mask: NDArray[np.bool_], colour: str, style: Any) -> None:
    """Trace the border of the true cells of a picture whose axes count cells."""
    padded = np.pad(mask, 1)
    level = padded[1:, 1:-1] != padded[:-1, 1:-1]
    upright = padded[1:-1, 1:] != padded[1:-1, :-1]
    y, x = np.nonzero(level)
    axes.hlines(y, x, x + 1, color=colour, linewidth=1.8, linestyle=style, clip_on=False)
    y, x = np.nonzero(upright)
    axes.vlines(x, y, y + 1, color=colour, linewidth=1.8, linestyle=style, clip_on=False)


def _scaled(still: Still, longest: int) -> NDArray[np.uint8]:
    """Scale a picture; small ones grow without smoothing."""
    width, height = still.size
    factor = longest / max(width, height)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    way = Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(still.pixels).resize(size, way))


def _short(question: str) -> str:
    return question if len(question) <= 90 else question[:89] + "…"
