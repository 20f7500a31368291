"""The ``flexselect`` command: ask a video, list what is supported, convert checkpoints."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.logging import RichHandler
from rich.table import Table
from transformers.utils import logging as logging_of_transformers

from . import __version__, evaluation, training, visualization
from .core.budget import check_budget
from .core.errors import FlexSelectError, OptionError
from .core.selection import Selection
from .inference.apply import method_from
from .inference.features import FRAMES_PER_CHUNK
from .inference.methods import METHODS, FlexSelect, Positions, Query
from .inference.policy import check_sampling
from .inference.presets import FOLDER, load_presets
from .inference.registry import (
    CHECKPOINTS,
    FAMILIES,
    convert_model,
    family_named,
    load_model,
    load_processor,
)
from .inference.session import Answer, Video, check_question, open_video
from .inference.terminal import check_writable, err, out, progress_bars, stamp, user_errors
from .inference.video import probe
from .testbed.locate import checkpoint_folder

app = typer.Typer(
    help="Answer questions about long videos from the visual tokens that matter.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _known_method(name: str) -> str:
    if name not in METHODS:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(METHODS)}.")
    return name


def _known_family(name: str) -> str:
    try:
        return family_named(name)
    except OptionError as error:
        raise typer.BadParameter(str(error)) from error


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"flexselect {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=err, show_path=False, show_time=False, markup=False)],
    )


@app.command()
def ask(
    video: Annotated[Path, typer.Argument(help="A video file.", show_default=False)],
    question: Annotated[str, typer.Argument(help="What to ask about it.", show_default=False)],
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id of the model; default: the tiny one of --family in the testbed, "
            "which knows only testbed videos.",
            show_default=False,
        ),
    ] = None,
    family: Annotated[
        str | None,
        typer.Option(
            help="Without --model: whose tiny model answers.",
            parser=_known_family,
            metavar="<qwen|llava|internvl>",
            show_default="qwen",
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="How to choose tokens.", parser=_known_method, metavar=f"<{'|'.join(METHODS)}>"
        ),
    ] = FlexSelect.name,
    selector: Annotated[
        str | None, typer.Option(help="Folder or hub id of a Lite selector.")
    ] = None,
    budget: Annotated[
        int | None,
        typer.Option(help="Visual tokens that may stay; Qwen2.5-VL rounds up to whole frames."),
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Reference layer, from 0.")] = None,
    aggregation: Annotated[
        str | None, typer.Option(help="max or mean, over heads and asking tokens.")
    ] = None,
    query: Annotated[Query | None, typer.Option(help="Which text tokens ask.")] = None,
    frames_per_set: Annotated[int | None, typer.Option(help="Most frames of a set.")] = None,
    sets_per_batch: Annotated[
        int | None, typer.Option(help="Most sets ranked in one pass; default: by their length.")
    ] = None,
    positions: Annotated[
        Positions | None, typer.Option(help="Position ids of kept tokens.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="What to draw from, with --method random.", min=0)
    ] = None,
    fps: Annotated[float | None, typer.Option(help="Pictures a second to look at.")] = None,
    frames: Annotated[
        int | None, typer.Option(help="Pictures to look at, instead of --fps.")
    ] = None,
    min_frames: Annotated[
        int | None, typer.Option(help="Least pictures to look at with --fps.")
    ] = None,
    max_frames: Annotated[
        int | None, typer.Option(help="Most pictures to look at with --fps.")
    ] = None,
    min_pixels: Annotated[int | None, typer.Option(help="Least pixels of a picture.")] = None,
    max_pixels: Annotated[int | None, typer.Option(help="Most pixels of a picture.")] = None,
    backend: Annotated[str, typer.Option(help="Decoder: pyav, decord or torchcodec.")] = "pyav",
    frames_per_chunk: Annotated[
        int | None, typer.Option(help="Most frames on the device while encoding.", min=1)
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    device: Annotated[
        str | None, typer.Option(help="Where to compute; default: a GPU if there is one.")
    ] = None,
    device_map: Annotated[
        str | None, typer.Option(help="Spread the model over devices, e.g. auto.")
    ] = None,
    attn: Annotated[
        str | None, typer.Option(help="Attention kernel, e.g. sdpa or flash_attention_2.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 256,
    moments: Annotated[int, typer.Option(help="Most moments to name.", min=1)] = 5,
    save: Annotated[
        Path | None,
        typer.Option(help="Also save the selection here, as .safetensors and .json."),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Also write a page here that shows what the answer was read from."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress display.")] = False,
) -> None:
    """Answer QUESTION about VIDEO, and say what the answer was read from."""
    with user_errors():
        knobs = {
            "selector": selector,
            "budget": budget,
            "layer": layer,
            "aggregation": aggregation,
            "query": query,
            "frames_per_set": frames_per_set,
            "sets_per_batch": sets_per_batch,
            "positions": positions,
            "seed": seed,
        }
        given = {name: value for name, value in knobs.items() if value is not None}
        chosen = method_from(METHODS[method], given)
        sampling = check_sampling(
            {
                "fps": fps,
                "frames": frames,
                "min_frames": min_frames,
                "max_frames": max_frames,
                "min_pixels": min_pixels,
                "max_pixels": max_pixels,
            }
        )
        _check_before_loading(video, question, budget, {"--save": save, "--report": report})
        note = None
        if model is None:
            model, note = _tiny_model(family or family_named("qwen"))
        elif family is not None:
            raise OptionError("--family chooses a tiny model; leave it out where --model is given.")
        logging_of_transformers.disable_progress_bar()
        with progress_bars(quiet or as_json) as progress:
            progress("load", 0, 1)
            # First the processor: where it is missing, that should not cost loading the weights.
            processor = load_processor(model)
            loaded = load_model(model, dtype, device, device_map, attn)
            progress("load", 1, 1)
            opened = open_video(
                loaded,
                processor,
                video,
                method=chosen,
                backend=backend,
                frames_per_chunk=frames_per_chunk or FRAMES_PER_CHUNK,
                progress=progress,
                **sampling,
            )
            answer = opened.ask(question, progress, max_new_tokens=max_new_tokens)
        said = _report(opened, question, answer, moments)
        if note is not None:
            said["note"] = note
        if as_json:
            typer.echo(json.dumps(said, indent=1))
        else:
            _show(said)
        if save is not None:
            _save(answer.selection, save)
        if report is not None:
            _write_report(report, opened, question, answer, moments, note)
            if not as_json:
                out.print(f"\nreport: {report}", markup=False, highlight=False)


@app.command()
def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the families, the checkpoints they load, and the presets."""
    rows: list[dict[str, Any]] = [
        {
            "family": family,
            "model": name,
            "model_types": [kind for kind, loaded in CHECKPOINTS.items() if loaded == name],
            "presets": [
                {"name": p.name, "match": p.match, **p.method, "video": p.video, "source": p.source}
                for p in load_presets(FOLDER)
                if p.family == family
            ],
        }
        for name, (family, _) in sorted(FAMILIES.items(), key=lambda item: item[1])
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    for row in rows:
        kinds = ", ".join(row["model_types"])
        out.print(f"[bold]{row['family']}[/]  {row['model']}  [dim]model_type {kinds}[/]")
        for preset in row["presets"]:
            layer = preset.get("layer", f"{preset.get('layer_depth', 0):.0%} of depth")
            sampling = ", ".join(f"{k} {v}" for k, v in preset["video"].items())
            out.print(
                f"  {preset['name']:<18} layer {layer}, budget {preset['budget']:,}, "
                f"{preset['aggregation']}, {preset['positions']} positions, {sampling}",
                highlight=False,
            )


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(help="Folder or hub id of an original checkpoint.", show_default=False)
    ],
    destination: Annotated[Path, typer.Argument(help="Folder to make.", show_default=False)],
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    overwrite: Annotated[bool, typer.Option(help="Replace DESTINATION if it exists.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress display.")] = False,
) -> None:
    """Write an original LLaVA-Video or InternVL checkpoint as one that transformers loads.

    Nothing that looks finished appears before everything is written.
    """
    with user_errors():
        with progress_bars(quiet) as progress:
            made = convert_model(
                source,
                destination,
                dtype=dtype,
                overwrite=overwrite,
                progress=lambda done, total: progress("convert", done, total),
            )
        out.print(f"{made}", markup=False, highlight=False)


for _folder in (evaluation, training, visualization):
    _folder.register(app)


def main() -> None:
    """Run the command."""
    app()


def _check_before_loading(
    video: Path, question: str, budget: int | None, written: Mapping[str, Path | None]
) -> None:
    """Refuse what is wrong whatever the model: it should not cost the time to load one."""
    if budget is not None:
        check_budget(budget)
    check_question(question)
    for option, path in written.items():
        if path is not None:
            check_writable(option, path)
    report = written["--report"]
    if report is not None and report.is_dir():
        raise OptionError(
            f"--report {report} is a folder. Name a file, such as {report}/talk.html."
        )
    probe(video)


def _tiny_model(family: str) -> tuple[str, str]:
    """Return the folder of the testbed's model of a family, and what its user should know."""
    note = (
        f"No --model was named: the tiny {family} of the testbed answered. It knows only testbed "
        "videos and their questions; python -m flexselect.testbed.make renders some."
    )
    return str(checkpoint_folder(family)), note


def _report(video: Video, question: str, answer: Answer, moments: int) -> dict[str, Any]:
    """Collect what an answer says and what decided it, as ``--json`` prints it."""
    selection = answer.selection
    return {
        "answer": answer.text,
        "cut": answer.cut,
        "question": question,
        "visual_tokens": selection.num_visual,
        "kept_tokens": len(selection.kept),
        "seconds": {**video.seconds, **answer.seconds},
        "moments": [vars(moment) for moment in selection.moments(moments)],
        "decided_by": selection.settings,
    }


def _show(report: dict[str, Any]) -> None:
    """Print an answer for people."""
    out.print(report["answer"] or "(the model said nothing)", markup=False, highlight=False)
    if "note" in report:
        err.print(report["note"], style="yellow", markup=False, highlight=False)
    if report["cut"]:
        err.print("The answer was cut at --max-new-tokens.", style="yellow")
    before, after = report["visual_tokens"], report["kept_tokens"]
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column()
    table.add_row("tokens", f"{before:,} → {after:,} visual ({after / before:.0%} kept)")
    table.add_row("time", "  ".join(f"{k} {v:.2f} s" for k, v in report["seconds"].items()))
    for index, moment in enumerate(report["moments"]):
        table.add_row(
            "" if index else "read from",
            f"{stamp(moment['start'])} - {stamp(moment['end'])}  "
            f"({moment['kept']} tokens, relevance {moment['score']:.2g})",
        )
    if not report["moments"]:
        all_of_it = "the whole video: nothing was dropped"
        table.add_row("read from", all_of_it if before == after else "tokens that were not ranked")
    method = report["decided_by"]
    table.add_row("method", f"{method['method']}, preset {method['preset']}, {method['model']}")
    out.print()
    out.print(table)


def _write_report(
    path: Path, video: Video, question: str, answer: Answer, moments: int, note: str | None
) -> None:
    from .visualization.report import write_report

    try:
        write_report(path, video, question, answer, moments=moments, note=note)
    except OSError as error:
        raise FlexSelectError(f"--report {path}: the report was not written ({error}).") from error


def _save(selection: Selection, path: Path) -> None:
    try:
        selection.save(path)
    except OSError as error:
        raise FlexSelectError(f"--save {path}: the selection was not saved ({error}).") from error
