"""Commands of this folder. What a command needs is imported when it runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from .train_command import train_selector


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.command(name="rank")(rank_command)
    app.command(name="train-selector")(train_selector)


def rank_command(
    model: Annotated[
        str, typer.Option(help="Folder or hub id of the teacher.", show_default=False)
    ],
    data: Annotated[
        Path,
        typer.Option(
            help="Folder of needle videos, or a .yaml, .json or .jsonl of conversations.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write scores to.", show_default=False)],
    videos: Annotated[
        Path | None,
        typer.Option(help="Folder that the names of videos are relative to; default: the data's."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only this many questions.", min=1)] = None,
    layer: Annotated[int | None, typer.Option(help="Reference layer, from 0.")] = None,
    aggregation: Annotated[
        str | None, typer.Option(help="max or mean, over heads and asking tokens.")
    ] = None,
    query: Annotated[str | None, typer.Option(help="Which text asks: all or last.")] = None,
    frames_per_set: Annotated[int | None, typer.Option(help="Most frames of a set.", min=1)] = None,
    frames: Annotated[
        int | None, typer.Option(help="Pictures of a video; default: 64, unless --fps is given.")
    ] = None,
    fps: Annotated[float | None, typer.Option(help="Pictures a second, instead.")] = None,
    min_frames: Annotated[int | None, typer.Option(help="Least pictures with --fps.")] = None,
    max_frames: Annotated[int | None, typer.Option(help="Most pictures with --fps.")] = None,
    min_pixels: Annotated[int | None, typer.Option(help="Least pixels of a picture.")] = None,
    max_pixels: Annotated[int | None, typer.Option(help="Most pixels of a picture.")] = None,
    shard: Annotated[
        str | None,
        typer.Option(help="i/n: the i-th of n processes; default: what torchrun sets, else 1/1."),
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes that decode.", min=0)] = 2,
    write_every: Annotated[
        int, typer.Option(help="Samples after which scores are written, at latest.", min=1)
    ] = 64,
    retry: Annotated[bool, typer.Option(help="Try again what was damaged before.")] = False,
    seed: Annotated[
        int, typer.Option(help="What 'random' of a .yaml's sampling_strategy draws.")
    ] = 0,
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
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress display.")] = False,
) -> None:
    """Write the teacher's scores of a data set once: training then needs no big model.

    Stopped or killed, the same command goes on where it was.
    """
    from transformers.utils import logging as logging_of_transformers

    from ..inference.registry import load_model, load_processor
    from ..inference.terminal import err, progress_bars, user_errors
    from ..inference.terminal import out as console
    from .examples import read_examples
    from .rank import parse_shard, rank
    from .samples import FRAMES

    with user_errors():
        place, processes = parse_shard(shard, os.environ)
        examples = read_examples(data, videos, limit=limit, seed=seed)
        sampling = {
            "frames": FRAMES if frames is None and fps is None else frames,
            "fps": fps,
            "min_frames": min_frames,
            "max_frames": max_frames,
            "min_pixels": min_pixels,
            "max_pixels": max_pixels,
        }
        if shard is None and device is None and device_map is None and processes > 1:
            device = _own_gpu(os.environ.get("LOCAL_RANK", "0"))
        logging_of_transformers.disable_progress_bar()
        with progress_bars(quiet or place > 0) as progress:
            processor = load_processor(model)
            loaded = load_model(model, dtype, device, device_map, attn)
            report = rank(
                loaded,
                processor,
                examples,
                out,
                sampling=sampling,
                layer=layer,
                aggregation=aggregation,
                query=query,
                frames_per_set=frames_per_set,
                shard=(place, processes),
                workers=workers,
                retry=retry,
                flush_samples=write_every,
                progress=progress,
            )
        of = f" (shard {place + 1}/{processes})" if processes > 1 else ""
        console.print(
            f"{out}: {report.ranked} samples ranked, {report.present} were there, "
            f"{len(report.damaged)} damaged{of}; "
            f"{'all are there' if report.complete else 'other shards have samples to come'}.",
            markup=False,
            highlight=False,
        )
        for id, reason in report.damaged.items():
            err.print(f"damaged: {id}: {reason}", style="yellow", markup=False, highlight=False)
        report.check()


def _own_gpu(local_rank: str) -> str | None:
    """Name the GPU of this process among those on its machine; None without GPU."""
    import torch

    count = torch.cuda.device_count()
    return f"cuda:{int(local_rank) % count}" if count else None
