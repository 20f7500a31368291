"""Commands of this folder. What a command needs is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import DataError, OptionError
from ..inference.terminal import err, out, user_errors


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.command(name="eval")(evaluate)
    app.command(name="compare")(compare_runs)


def evaluate(
    family: Annotated[
        str, typer.Argument(help="Model family: qwen, llava, internvl, or a folder's name.")
    ] = "qwen",
    ckpt: Annotated[
        str | None, typer.Option(help="Folder or hub id of a model; default: the tiny one here.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="lmms-eval tasks, by commas; default: needles, or the four long-video benchmarks "
            "with --ckpt."
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(help="full, uniform, random, flexselect, flexselect-lite, by commas."),
    ] = None,
    selector: Annotated[
        str | None, typer.Option(help="Folder or hub id of a Lite selector, for flexselect-lite.")
    ] = None,
    budget: Annotated[int | None, typer.Option(help="Visual tokens that may stay.")] = None,
    layer: Annotated[int | None, typer.Option(help="Reference layer, for flexselect.")] = None,
    frames: Annotated[int | None, typer.Option(help="Pictures of a video to look at.")] = None,
    fps: Annotated[float | None, typer.Option(help="Pictures a second, instead.")] = None,
    max_frames: Annotated[int | None, typer.Option(help="Most pictures, with --fps.")] = None,
    limit: Annotated[int | None, typer.Option(help="Questions a task.", min=1)] = None,
    gpus: Annotated[
        int, typer.Option(help="Processes, each on a GPU of its own if there are any.", min=1)
    ] = 1,
    batch_size: Annotated[int, typer.Option(help="Questions answered at a time.", min=1)] = 1,
    include: Annotated[
        list[Path] | None, typer.Option(help="Folder of more tasks; may be given again.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32.")] = None,
    device: Annotated[str | None, typer.Option(help="Where to compute, such as cuda.")] = None,
    device_map: Annotated[
        str | None, typer.Option(help="Spread a model that one GPU cannot hold, e.g. auto.")
    ] = None,
    attn: Annotated[str | None, typer.Option(help="Attention kernel.")] = None,
    record_selection: Annotated[
        bool, typer.Option("--record-selection", help="Also keep which frames stayed, by sample.")
    ] = False,
    output: Annotated[Path, typer.Option("--out", help="Folder of all runs.")] = Path(
        "results/eval"
    ),
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Begin anew instead of continuing a run.")
    ] = False,
) -> None:
    """Compare methods on benchmarks, through lmms-eval.

    Without options: the tiny model on generated videos, offline. Interrupted, the same command
    continues where it stopped.
    """
    with user_errors():
        from .defaults import make_plan
        from .plan import TABLE, choose_folder
        from .run import perform
        from .tables import EXPLANATION, remarks, savings, terminal

        shared: dict[str, Any] = {
            "frames": frames,
            "fps": fps,
            "max_frames": max_frames,
            "batch_size": batch_size,
            "dtype": dtype,
            "device": device,
            "device_map": device_map,
            "attn_implementation": attn,
            "record_selection": record_selection or None,
        }
        plan = make_plan(
            family,
            checkpoint=ckpt,
            tasks=tasks,
            methods=methods,
            selector=selector,
            budget=budget,
            layer=layer,
            limit=limit,
            processes=gpus,
            include=include or [],
            shared=shared,
        )
        folder, continued = choose_folder(output / plan.family, plan, fresh)
        err.print(
            f"{'Continuing' if continued else 'Run'} {folder}"
            + (" (--fresh would begin anew)" if continued else ""),
            markup=False,
            highlight=False,
        )
        try:
            rows = perform(folder, plan)
        except KeyboardInterrupt:
            err.print("Interrupted. The same command goes on where it stopped.", style="yellow")
            raise typer.Exit(130) from None
        out.print(terminal(rows, f"{plan.family}, {plan.checkpoint}"))
        for remark in (EXPLANATION, *remarks(rows), savings(rows)):
            if remark is not None:
                out.print(remark, style="dim", markup=False, highlight=False)
        out.print(f"{folder / TABLE}", markup=False, highlight=False)
        blind = {row["task"] for row in rows if row["samples"] and row["failed"] == row["samples"]}
        if blind:
            raise DataError(
                f"No question of {', '.join(sorted(blind))} had a usable video; samples.jsonl says "
                "why. scripts/prepare_data.py puts a benchmark's videos where its task looks."
            )


def compare_runs(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...", help="Folders of runs, such as results/eval/qwen2_5_vl/latest."
        ),
    ],
    against: Annotated[
        str | None,
        typer.Option(help="Method that the others are compared with; default: the first."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--out", help="Also write the page to this file.")
    ] = None,
) -> None:
    """Put runs side by side, with paired significance, as Markdown.

    Settings besides the methods' own that differ between the runs are named first.
    """
    with user_errors():
        from .compare import compare, markdown

        page = markdown(compare(runs, against))
        if output is not None:
            try:
                output.write_text(page, encoding="utf-8")
            except OSError as error:
                raise OptionError(
                    f"--out {output} cannot be written ({error.strerror}). Name a file in a "
                    "folder that can be written to."
                ) from error
    out.print(page, markup=False, highlight=False)
