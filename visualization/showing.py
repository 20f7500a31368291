"""Everything there is to see of one question, as pictures and as one page."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..inference.features import Progress
from ..inference.terminal import stamp
from ..testbed.videos import replace_file
from .embeddings import draw_embedding
from .extras import need_matplotlib, need_sklearn, save_figure
from .heatmaps import draw_layers, draw_overlays, draw_timeline
from .layers import Look
from .page import facts, page, record_table, section, text
from .stills import read_stills

#: Name of a picture: what it shows, and a title and a note for the page.
_PICTURES = {
    "overlays": (
        "Relevance over the pictures",
        "Frames that the question finds, how relevant each part of them is, and the parts that "
        "were kept.",
    ),
    "layers": (
        "How attention finds it with depth",
        "The same frames at several layers. Each row is scaled by its own most relevant token.",
    ),
    "timeline": (
        "Relevance over time",
        "The best token of every frame, and the share of the frame that was kept.",
    ),
    "pca": (
        "Visual tokens by PCA",
        "What a layer reads, in the two directions that vary most. Colour: how many others a "
        "token outranks.",
    ),
    "tsne": (
        "Visual tokens by t-SNE",
        "Tokens that a layer reads alike lie together; distances between groups mean nothing.",
    ),
}


def write_pictures(
    look: Look,
    out: Path,
    *,
    pictures: int = 6,
    layer: int | None = None,
    embeddings: bool = True,
    progress: Progress | None = None,
) -> list[Path]:
    """Write ``overlays``, ``layers``, ``timeline``, ``pca`` and ``tsne`` as PNG, and the page.

    Parameters
    ----------
    look : the question as the layers see it.
    out : folder to write to, made if missing.
    pictures : frames to show.
    layer : whose relevance the overlays and the timeline show; default: the method's own.
    embeddings : also draw PCA and t-SNE; ``look`` must have states.
    progress : called with ("draw", pictures drawn, pictures).

    Returns
    -------
    The files, the page last.

    Raises
    ------
    OptionError
        matplotlib or scikit-learn is missing.
    VideoError
        The video file is no longer there.
    """
    need_matplotlib()
    if embeddings:
        need_sklearn()
    own = look.layer if layer is None else layer
    layers = sorted(look.scores)
    stills = read_stills(look.video, look.best_frames(pictures))
    draw: dict[str, Callable[[], Any]] = {
        "overlays": lambda: draw_overlays(look, stills, own),
        "layers": lambda: draw_layers(look, stills, layers),
        "timeline": lambda: draw_timeline(look, own),
    }
    if len(layers) == 1:
        del draw["layers"]
    if embeddings:
        draw["pca"] = lambda: draw_embedding(look, layers, "pca")
        draw["tsne"] = lambda: draw_embedding(look, layers, "tsne")
    written, shown = [], []
    for done, (name, make) in enumerate(draw.items()):
        if progress is not None:
            progress("draw", done, len(draw))
        path = out / f"{name}.png"
        picture = save_figure(make(), path, dpi=130)
        written.append(path)
        shown.append(_section(name, picture, _described(name, look, own, len(stills))))
    replace_file(out / "index.html", _page(look, own, shown).encode())
    if progress is not None:
        progress("draw", len(draw), len(draw))
    return [*written, out / "index.html"]


def _section(name: str, picture: bytes, described: str) -> str:
    title, note = _PICTURES[name]
    source = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    image = f'<div class="picture"><img src="{source}" alt="{text(described)}"></div>'
    return section(title, note, image)


def _described(name: str, look: Look, layer: int, frames: int) -> str:
    """Say in words what a picture shows, for those who do not see it."""
    best = int(look.frame_relevance(layer).argmax())
    when = stamp(float(look.video.times[best]))
    layers = ", ".join(map(str, sorted(look.scores)))
    return {
        "overlays": f"{frames} frames with their relevance at layer {layer}; the most relevant "
        f"frame is at {when}",
        "layers": f"{frames} frames with their relevance at layers {layers}",
        "timeline": f"Relevance and share kept of {look.video.clip.frames} frames; the highest "
        f"relevance is at {when}",
        "pca": f"{len(look.points)} visual tokens projected by PCA at layers {layers}",
        "tsne": f"{len(look.points)} visual tokens laid out by t-SNE at layers {layers}",
    }[name]


def _page(look: Look, layer: int, sections: list[str]) -> str:
    selection = look.selection
    items = [
        ("Layers looked at", ", ".join(map(str, sorted(look.scores))), "counted from 0"),
        ("Layer that is read", str(look.layer), str(selection.settings.get("aggregation", ""))),
        (
            "Visual tokens kept",
            f"{len(selection.kept):,}",
            f"of {selection.num_visual:,} in {look.video.clip.frames:,} frames",
        ),
    ]
    rank = look.needle_rank(layer)
    if rank is not None:
        items.append(("The answer’s token ranks", f"{rank:,}", f"at layer {layer}"))
    body = [
        '<main><p class="kicker">FlexSelect: how the layers look</p>',
        f"<h1>{text(look.question)}</h1>",
        facts(items),
        *sections,
        section(
            "What decided it",
            "",
            "<details><summary>The run record</summary>"
            + record_table(selection.settings)
            + "</details>",
        ),
        "</main>",
        "<footer><p>Everything is in this file; nothing is loaded from the network.</p></footer>",
    ]
    return page(f"{look.question} – FlexSelect", "\n".join(body))
