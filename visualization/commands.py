"""Commands of this folder. What a command needs is imported when it runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from .recall import Curves

_Model = Annotated[
    str | None,
    typer.Option(
        help="Folder or hub id of the model; default: the tiny one of --family in the testbed.",
        show_default=False,
    ),
]
_Family = Annotated[
    str | None,
    typer.Option(
        help="Without --model: whose tiny model, qwen, llava or internvl.",
        metavar="<qwen|llava|internvl>",
        show_default="qwen",
    ),
]
_Selector = Annotated[
    str | None, typer.Option(help="Look at the layers of this Lite selector instead.")
]
_Dtype = Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")]
_Device = Annotated[
    str | None, typer.Option(help="Where to compute; default: a GPU if there is one.")
]
_DeviceMap = Annotated[str | None, typer.Option(help="Spread the model over devices, e.g. auto.")]
_Attention = Annotated[
    str | None, typer.Option(help="Attention kernel, e.g. sdpa or flash_attention_2.")
]
_Quiet = Annotated[bool, typer.Option("--quiet", help="No progress display.")]


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.command()(recall)
    app.command()(show)
    app.command()(reports)


def recall(
    model: _Model = None,
    family: _Family = None,
    videos: Annotated[
        Path | None,
        typer.Option(
            help="Folder of needle videos, or with --needles of videos to hide pictures in; "
            "default: testbed videos are rendered."
        ),
    ] = None,
    needles: Annotated[
        Path | None,
        typer.Option(help="V-NIAH: folder of needle pictures with their dataset.json."),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(help="Videos; default: 24, or all of a folder of needle videos.", min=1),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(help="Pictures of a video; default: the preset's, or 256.", min=1),
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides where the needles are.", min=0)] = 0,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("recall"),
    selector: _Selector = None,
    budget: Annotated[
        int | None, typer.Option(help="K of the true recall; default: the preset's budget.")
    ] = None,
    frames_per_set: Annotated[int | None, typer.Option(help="Most frames of a set.")] = None,
    query: Annotated[str | None, typer.Option(help="Which text tokens ask: all or last.")] = None,
    dtype: _Dtype = "auto",
    device: _Device = None,
    device_map: _DeviceMap = None,
    attn: _Attention = None,
    quiet: _Quiet = False,
) -> None:
    """Find the layer to read: recall@K of a needle's tokens at every layer.

    Writes recall.json, recall.csv, recall.png and recall.svg. Interrupted, the same command goes
    on where it stopped.
    """
    from transformers.utils import logging as logging_of_transformers

    from ..core.errors import OptionError
    from ..inference.apply import method_from
    from ..inference.engine import Engine
    from ..inference.methods import FlexSelect
    from ..inference.registry import load_model, load_processor
    from ..inference.terminal import check_writable, progress_bars, user_errors
    from ..inference.terminal import out as console
    from .extras import need_matplotlib
    from .measuring import measure_recall
    from .needles import generated_videos, hidden_pictures, videos_with_needles

    with user_errors():
        need_matplotlib()
        if needles is not None and videos is None:
            raise OptionError(
                "--needles hides pictures in real videos; name a folder of them with --videos."
            )
        check_writable("--out", out, "folder")
        given = {
            "selector": selector,
            "budget": budget,
            "frames_per_set": frames_per_set,
            "query": query,
        }
        knobs = {name: value for name, value in given.items() if value is not None}
        method = method_from(FlexSelect, knobs)
        assert isinstance(method, FlexSelect)
        folder = model_folder(model, family)
        logging_of_transformers.disable_progress_bar()
        with progress_bars(quiet) as progress:
            progress("load", 0, 1)
            processor = load_processor(folder)
            loaded = load_model(folder, dtype, device, device_map, attn)
            preset = Engine(loaded, method).preset
            progress("load", 1, 1)
            length = frames or preset.video.get("frames") or 256
            sampling: dict[str, Any] = {"frames": length}
            making: dict[str, Any] = {
                "frames": length,
                "count": 24 if count is None else count,
                "seed": seed,
                "progress": progress,
            }
            if videos is None:
                made = generated_videos(out / "videos", **making)
            elif needles is not None:
                made = hidden_pictures(out / "videos", videos, needles, **making)
            else:
                made = videos_with_needles(videos, count)
                sampling = {} if frames is None else sampling
            curves = measure_recall(
                loaded, processor, made, out, method=method, progress=progress, **sampling
            )
        _show_curves(curves, preset.method["layer"], selector)
        console.print(f"\n{out / 'recall.png'}", markup=False, highlight=False)


def show(
    video: Annotated[Path, typer.Argument(help="A video file.", show_default=False)],
    question: Annotated[str, typer.Argument(help="What to ask about it.", show_default=False)],
    model: _Model = None,
    family: _Family = None,
    layer: Annotated[
        int | None,
        typer.Option(help="Layer to read, from 0; default: the preset's.", show_default=False),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help='Layers to compare, such as 0,2,4, or "all"; default: six, evenly spaced.',
            show_default=False,
        ),
    ] = None,
    pictures: Annotated[int, typer.Option(help="Frames to show.", min=1, max=24)] = 6,
    embeddings: Annotated[
        bool, typer.Option(help="Also lay out the visual tokens by PCA and t-SNE.")
    ] = True,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the pictures; default: VIDEO-seen, beside it.", show_default=False
        ),
    ] = None,
    selector: _Selector = None,
    budget: Annotated[int | None, typer.Option(help="Visual tokens that may stay.")] = None,
    aggregation: Annotated[
        str | None, typer.Option(help="max or mean, over heads and asking tokens.")
    ] = None,
    frames_per_set: Annotated[int | None, typer.Option(help="Most frames of a set.")] = None,
    query: Annotated[str | None, typer.Option(help="Which text tokens ask: all or last.")] = None,
    fps: Annotated[float | None, typer.Option(help="Pictures a second to look at.")] = None,
    frames: Annotated[
        int | None, typer.Option(help="Pictures to look at, instead of --fps.")
    ] = None,
    min_pixels: Annotated[int | None, typer.Option(help="Least pixels of a picture.")] = None,
    max_pixels: Annotated[int | None, typer.Option(help="Most pixels of a picture.")] = None,
    dtype: _Dtype = "auto",
    device: _Device = None,
    device_map: _DeviceMap = None,
    attn: _Attention = None,
    quiet: _Quiet = False,
) -> None:
    """Show where QUESTION looks in VIDEO: heat maps by layer, a timeline, embeddings.

    Writes PNG files and index.html, one page with all of them.
    """
    from transformers.utils import logging as logging_of_transformers

    from ..inference.apply import method_from
    from ..inference.methods import FlexSelect
    from ..inference.policy import check_sampling
    from ..inference.registry import load_model, load_processor
    from ..inference.session import check_question, open_video
    from ..inference.terminal import check_writable, progress_bars, user_errors
    from ..inference.terminal import out as console
    from ..inference.video import probe
    from .extras import need_matplotlib, need_sklearn
    from .layers import look
    from .showing import write_pictures

    with user_errors():
        need_matplotlib()
        if embeddings:
            need_sklearn()
        check_question(question)
        probe(video)
        wanted = _layer_list(layers)
        target = out or video.with_name(f"{video.stem}-seen")
        check_writable("--out", target, "folder")
        given = {
            "selector": selector,
            "budget": budget,
            "layer": layer,
            "aggregation": aggregation,
            "frames_per_set": frames_per_set,
            "query": query,
        }
        method = method_from(FlexSelect, {k: v for k, v in given.items() if v is not None})
        sampling = check_sampling(
            {"fps": fps, "frames": frames, "min_pixels": min_pixels, "max_pixels": max_pixels}
        )
        folder = model_folder(model, family)
        logging_of_transformers.disable_progress_bar()
        with progress_bars(quiet) as progress:
            progress("load", 0, 1)
            processor = load_processor(folder)
            loaded = load_model(folder, dtype, device, device_map, attn)
            progress("load", 1, 1)
            opened = open_video(
                loaded, processor, video, method=method, progress=progress, **sampling
            )
            if wanted == "all":
                scorer = opened.engine.method.encodes_for or opened.engine.architecture
                wanted = range(scorer.num_layers)
            seen = look(opened, question, wanted, states=embeddings, progress=progress)
            written = write_pictures(
                seen, target, pictures=pictures, embeddings=embeddings, progress=progress
            )
        for path in written:
            console.print(str(path), markup=False, highlight=False)


def reports(
    run: Annotated[
        Path, typer.Argument(help="Folder of a run of flexselect eval.", show_default=False)
    ],
    methods: Annotated[
        str | None,
        typer.Option(help="Whose wrong answers, by commas; default: all.", show_default=False),
    ] = None,
    limit: Annotated[int, typer.Option(help="Most reports a method.", min=1)] = 20,
    out: Annotated[
        Path | None, typer.Option(help="Folder; default: RUN/reports.", show_default=False)
    ] = None,
    dtype: _Dtype = "auto",
    device: _Device = None,
    device_map: _DeviceMap = None,
    attn: _Attention = None,
    quiet: _Quiet = False,
) -> None:
    """See why answers of an evaluation were wrong: ask again, and write a report of each.

    Writes index.html, which links them.
    """
    from transformers.utils import logging as logging_of_transformers

    from ..inference.registry import load_model, load_processor
    from ..inference.terminal import check_writable, progress_bars, user_errors
    from ..inference.terminal import out as console
    from .wrong import report_wrong, wrong_answers

    with user_errors():
        names = [name.strip() for name in methods.split(",")] if methods else []
        checkpoint, wrong = wrong_answers(run, names, limit)
        target = out or run / "reports"
        check_writable("--out", target, "folder")
        logging_of_transformers.disable_progress_bar()
        with progress_bars(quiet) as progress:
            progress("load", 0, 1)
            processor = load_processor(checkpoint)
            loaded = load_model(checkpoint, dtype, device, device_map, attn)
            progress("load", 1, 1)
            index = report_wrong(loaded, processor, wrong, target, progress=progress)
        console.print(f"{len(wrong)} wrong answers: {index}", markup=False, highlight=False)


def _layer_list(text: str | None) -> Sequence[int] | Literal["all"] | None:
    """Read the layers of ``--layers``; None where it is not given."""
    from ..core.errors import OptionError

    if text is None:
        return None
    if text == "all":
        return "all"
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise OptionError(
            f'--layers must be whole numbers with commas between, or "all", got {text!r}.'
        ) from error


def model_folder(model: str | None, family: str | None) -> str:
    """Return the model to load: the one named, or the tiny one of a family.

    Raises `OptionError` where both are given, and as `checkpoint_folder` does.
    """
    from ..core.errors import OptionError
    from ..inference.registry import family_named
    from ..testbed.locate import checkpoint_folder

    if model is None:
        return str(checkpoint_folder(family_named(family or "qwen")))
    if family is not None:
        raise OptionError("--family chooses a tiny model; leave it out where --model is given.")
    return model


def _show_curves(curves: Curves, preset_layer: int, selector: str | None) -> None:
    """Print the curves for people."""
    from rich.table import Table

    from ..inference.terminal import err, out
    from .recall import AGGREGATIONS

    k, frame = curves.ks["budget"], curves.ks["frame"]
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("layer", justify="right")
    for aggregation in AGGREGATIONS:
        table.add_column(f"recall@{k} {aggregation}")
    for aggregation in AGGREGATIONS:
        table.add_column(f"precision@{frame} {aggregation}", justify="right")
    curve = {a: (curves.of(a, "budget"), curves.of(a, "frame")) for a in AGGREGATIONS}
    for layer in range(len(curve["max"][0])):
        cells = []
        for aggregation in AGGREGATIONS:
            recall = curve[aggregation][0][layer].recall
            chosen = (layer, aggregation) == (curves.layer, curves.aggregation)
            text = f"{recall.mean:.2f} [dim]({recall.low:.2f}-{recall.high:.2f})[/]"
            cells.append(f"[bold]{text}[/]" if chosen else text)
        cells += [f"{curve[a][1][layer].precision.mean:.2f}" for a in AGGREGATIONS]
        table.add_row(str(layer), *cells)
    out.print(table, highlight=False)
    best = curves.best.recall
    out.print(
        f"\nRead layer {curves.layer} with {curves.aggregation}: recall@{k} {best.mean:.2f} "
        f"({best.low:.2f}-{best.high:.2f}) over {curves.videos} videos; "
        f"{curves.chance['budget']:.2f} by chance.",
        highlight=False,
    )
    if curves.rivals:
        layers = ", ".join(map(str, curves.rivals))
        out.print(f"These videos do not tell it from layer {layers}.", highlight=False)
    if selector is None:
        out.print(f"The preset reads layer {preset_layer}.", highlight=False)
    for name, reason in curves.left_out.items():
        err.print(f"left out: {name}: {reason}", style="yellow", markup=False, highlight=False)
