"""What drawing needs beside the package itself: matplotlib and scikit-learn, the extra ``show``."""

from __future__ import annotations

import io
from importlib import import_module
from pathlib import Path
from typing import Any

from ..core.errors import OptionError
from ..testbed.videos import replace_file


def need_matplotlib() -> None:
    """Raise `OptionError` with the remedy where matplotlib is not installed."""
    _need("matplotlib", "Pictures are drawn with matplotlib")


def need_sklearn() -> None:
    """Raise `OptionError` with the remedy where scikit-learn is not installed."""
    _need("sklearn", "Embeddings are projected with scikit-learn")


def new_figure(width: float, height: float) -> Any:
    """Return an empty matplotlib figure of ``width`` × ``height`` inches that no window knows of.

    It is drawn by Agg, and nothing global is touched, so any thread may draw.
    """
    need_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path, *, dpi: int = 150) -> bytes:
    """Write a figure in the format of the ending of ``path``, whole or not at all.

    Returns what was written. The same figure gives the same bytes: no date, no random names.
    """
    import matplotlib

    kind = path.suffix.removeprefix(".")
    undated = {"Date": None} if kind == "svg" else {}
    buffer = io.BytesIO()
    smaller = {"pil_kwargs": {"optimize": True}} if kind == "png" else {}
    with matplotlib.rc_context({"svg.hashsalt": "flexselect", "svg.fonttype": "none"}):
        figure.savefig(buffer, format=kind, dpi=dpi, metadata=undated, **smaller)
    replace_file(path, buffer.getvalue())
    return buffer.getvalue()


def _need(module: str, what: str) -> None:
    try:
        import_module(module)
    except ImportError as error:
        raise OptionError(
            f"{what}, which is not installed. Run: pip install 'flexselect[show]'"
        ) from error
