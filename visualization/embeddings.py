"""Embeddings: the states of visual tokens at a layer in two dimensions, coloured by relevance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .extras import need_sklearn, new_figure
from .layers import Look

Kind = Literal["pca", "tsne"]

_NAMES = {"pca": "PCA", "tsne": "t-SNE"}


def project(states: Tensor, kind: Kind) -> NDArray[np.float64]:
    """Lay out states in two dimensions, the same way every time.

    Parameters
    ----------
    states : float32 ``(n, hidden)``, at least two.
    kind : "pca" for the two directions of most variance, "tsne" for neighbourhoods.

    Returns
    -------
    float64 ``(n, 2)``

    Raises
    ------
    OptionError
        scikit-learn is not installed.
    """
    need_sklearn()
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    values = states.double().numpy()
    if kind == "pca":
        return np.asarray(PCA(2, svd_solver="full").fit_transform(values))
    # Distances in what little the rest varies are noise, and cost most of the time.
    fewer = PCA(min(30, *values.shape), svd_solver="full").fit_transform(values)
    perplexity = min(30.0, (len(values) - 1) / 3)
    tsne = TSNE(2, perplexity=perplexity, init="pca", random_state=0, n_jobs=1, max_iter=300)
    # So few points are faster on one thread; on a busy machine, by far.
    with threadpool_limits(1):
        return np.asarray(tsne.fit_transform(fewer), dtype=np.float64)


def draw_embedding(look: Look, layers: Sequence[int], kind: Kind) -> Any:
    """Draw the visual tokens of a `Look` at several layers; returns a matplotlib figure."""
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list(
        "relevance", ["#cfd4da", "#f0a35a", "#cc3a10", "#5a0d00"]
    )
    columns = min(3, len(layers))
    lines = -(-len(layers) // columns)
    figure = new_figure(0.6 + 3.1 * columns, 0.7 + 2.9 * lines)
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    shown = None
    for axes, layer in zip(panels, layers, strict=False):
        places = project(look.states[layer], kind)
        relevance = _spread(look.scores[layer])[look.points].numpy()
        # The relevant ones lie on top.
        order = np.argsort(relevance, kind="stable")
        shown = axes.scatter(
            places[order, 0],
            places[order, 1],
            c=relevance[order],
            cmap=colours,
            vmin=0,
            vmax=1,
            s=9,
            linewidths=0,
        )
        if look.needle is not None:
            mine = look.needle[look.points].numpy()
            axes.scatter(
                places[mine, 0],
                places[mine, 1],
                s=90,
                facecolors="none",
                edgecolors="#15803d",
                linewidths=1.8,
            )
        own = " *" if layer == look.layer else ""
        axes.set_title(f"layer {layer}{own}", fontsize=10)
        axes.set_xticks([])
        axes.set_yticks([])
        for side in axes.spines.values():
            side.set_color("#d1d5db")
    for axes in panels[len(layers) :]:
        axes.set_visible(False)
    bar = figure.colorbar(shown, ax=list(panels), shrink=0.5, ticks=[0, 1], aspect=30)
    bar.ax.set_yticklabels(["least relevant", "most relevant"], fontsize=8.5)
    bar.outline.set_visible(False)
    ring = "" if look.needle is None else "; ring: where the answer is"
    figure.supxlabel(
        f"{len(look.points):,} of {look.selection.num_visual:,} visual tokens{ring}; "
        "*: the layer that is read",
        fontsize=8.5,
        color="#6b7280",
    )
    figure.suptitle(
        f"{_NAMES[kind]} of what each layer reads",
        fontsize=11,
        fontweight="bold",
        x=0.01,
        ha="left",
    )
    return figure


def _spread(scores: Tensor) -> Tensor:
    """Return the share of tokens that each one outranks: relevance itself is too uneven to see."""
    order = torch.empty_like(scores)
    order[scores.argsort(stable=True)] = torch.arange(len(scores), dtype=scores.dtype)
    return (order / max(1, len(scores) - 1)) ** 4
