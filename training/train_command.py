"""The command ``flexselect train-selector``: the testbed's run, or the real one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer


def train_selector(
    family: Annotated[
        str, typer.Argument(help="Model family: qwen, llava, internvl, or a folder's name.")
    ] = "qwen",
    ckpt: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of the model to train for; default: the tiny one."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder of needle videos, or a .yaml, .json or .jsonl of conversations; default: "
            "needle videos are rendered."
        ),
    ] = None,
    videos: Annotated[
        Path | None, typer.Option(help="Folder that the names of videos are relative to.")
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(help="What flexselect rank wrote: no big model is asked while training."),
    ] = None,
    student: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of a small language model, or of a small sibling."),
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Reference layer of the teacher.")] = None,
    aggregation: Annotated[str | None, typer.Option(help="max or mean.")] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Times through the data.")] = None,
    seed: Annotated[int | None, typer.Option(help="Decides the order of the data.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only this many samples.", min=1)] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="Recipe; default: the family's in shared_configs/training."),
    ] = None,
    deepspeed: Annotated[
        Path | None, typer.Option(help="Configuration of DeepSpeed, for a run without one.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of the selector; default: outputs/selector/FAMILY."),
    ] = None,
    report_to: Annotated[
        str, typer.Option(help="Where to log to, by commas, or none.")
    ] = "tensorboard",
    push_to_hub: Annotated[
        str | None, typer.Option(help="Repository to push the finished selector to.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the teacher.")] = "auto",
    device: Annotated[
        str | None, typer.Option(help="Where to compute; default: a GPU if there is one.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print sizes, memory and steps of the run; train nothing."),
    ] = False,
    gpus: Annotated[
        int | None, typer.Option(help="With --dry-run: GPUs of the run.", min=1)
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress display.")] = False,
) -> None:
    """Train a Lite selector to rank as a model does; stopped, the same command goes on.

    Without --ckpt and --data the tiny model of the testbed teaches a tiny selector on rendered
    videos, in minutes on two cores, and both then answer questions about long ones.
    """
    from transformers.utils import logging as logging_of_transformers

    from ..core.errors import OptionError
    from ..inference.registry import family_named
    from ..inference.terminal import user_errors
    from .recipe import read_recipe, recipe_for

    logging_of_transformers.disable_progress_bar()
    logging_of_transformers.set_verbosity_error()
    with user_errors():
        name = family_named(family)
        real = dry_run if ckpt is None else True
        settings = read_recipe(
            recipe or recipe_for(name, tiny=not real),
            teacher=ckpt,
            student=student,
            layer=layer,
            aggregation=aggregation,
            learning_rate=lr,
            epochs=epochs,
            seed=seed,
            devices=gpus,
        )
        if settings.family != name:
            raise OptionError(
                f"{recipe} is a recipe for {settings.family}, but the family asked for is {name}."
            )
        if dry_run:
            _dry_run(settings, data, videos, limit)
            return
        _run(
            settings,
            data,
            videos,
            output or Path("outputs/selector") / name,
            limit=limit,
            scores=scores,
            device=device,
            dtype=dtype,
            deepspeed=deepspeed,
            report_to=[part for part in report_to.split(",") if part and part != "none"],
            push_to_hub=push_to_hub,
            quiet=quiet,
        )


def _run(
    recipe: Any,
    data: Path | None,
    videos: Path | None,
    out: Path,
    *,
    limit: int | None,
    scores: Path | None,
    device: str | None,
    dtype: str,
    deepspeed: Path | None,
    report_to: list[str],
    push_to_hub: str | None,
    quiet: bool,
) -> None:
    """Render, train, compare, and write ``summary.json``."""
    import dataclasses

    from ..core.errors import OptionError
    from ..inference.registry import load_model, load_processor, load_selector
    from ..inference.terminal import err, progress_bars
    from ..inference.terminal import out as console
    from .accuracy import compare, needle_videos
    from .examples import read_examples
    from .run import settled, train, write_json
    from .student import recorded

    first = int(os.environ.get("RANK", "0")) == 0
    if data is None and recipe.videos is None:
        raise OptionError(
            "--data is missing: name the conversations to train on, such as the .yaml of "
            "LLaVA-Video-178K, and with --videos the folder of their videos."
        )
    if "tensorboard" in report_to and not _installed("tensorboard"):
        raise OptionError(
            "--report-to tensorboard needs tensorboard, which is not installed. Run: pip install "
            "'flexselect[train]', or add --report-to none."
        )
    recipe = settled(recipe)
    with progress_bars(quiet or not first) as progress:
        if data is None:
            data = out / "videos" / "train"
            needle_videos(
                data,
                split="train",
                frames=recipe.frames,
                count=recipe.videos,
                questions=recipe.questions,
                progress=progress,
            )
        examples = read_examples(data, videos, limit=limit, seed=recipe.seed)
        trained = train(
            recipe,
            examples,
            out,
            scores=scores,
            device=device,
            dtype=dtype,
            report_to=report_to,
            progress=progress,
            **({} if deepspeed is None else {"deepspeed": str(deepspeed)}),
        )
        if not first:
            return
        summary: dict[str, Any] = {
            "family": recipe.family,
            **trained.metrics,
            "steps": trained.steps,
            "best_step": trained.best_step,
            "samples": len(examples),
            "damaged": len(trained.damaged),
        }
        accuracy = None
        if recipe.videos is not None:
            model = load_model(recipe.teacher, dtype, device)
            accuracy = compare(
                model,
                load_processor(recipe.teacher),
                load_selector(out, model),
                needle_videos(
                    out / "videos" / "test",
                    split="test",
                    frames=recipe.test_frames,
                    count=recipe.test_videos,
                    questions=_TEST_QUESTIONS,
                    progress=progress,
                    stage="test",
                ),
                progress,
            )
            summary["accuracy_lite"] = accuracy.lite
            summary["accuracy_training_free"] = accuracy.training_free
            summary["comparison"] = dataclasses.asdict(accuracy)
        summary["seconds"] = round(trained.seconds, 1)
        models = {"teacher": recorded(recipe.teacher), "student": recorded(recipe.student)}
        summary["recipe"] = {**recipe.record(), **models}
    write_json(out / "summary.json", summary)
    console.print(f"{out}", markup=False, highlight=False)
    console.print(
        f"rho {trained.metrics['spearman']:.3f}  recall@K {trained.metrics['recall_at_k']:.3f} "
        f"against the teacher on held-out samples, best of {trained.steps} steps at "
        f"{trained.best_step}",
        highlight=False,
    )
    if accuracy is not None:
        console.print(
            f"accuracy at {accuracy.frames} frames, {accuracy.kept_tokens:,} of "
            f"{accuracy.visual_tokens:,} visual tokens, {accuracy.questions} questions: "
            f"Lite {accuracy.lite:.1%}, training-free {accuracy.training_free:.1%} "
            f"(needle kept: {accuracy.lite_recall:.1%}, {accuracy.training_free_recall:.1%})",
            highlight=False,
        )
    for reason in trained.damaged:
        err.print(f"left out: {reason}", style="yellow", markup=False, highlight=False)
    if push_to_hub is not None:
        model = load_model(recipe.teacher, dtype, device)
        load_selector(out, model).push_to_hub(push_to_hub)
        console.print(f"pushed to {push_to_hub}", markup=False, highlight=False)


def _dry_run(recipe: Any, data: Path | None, videos: Path | None, limit: int | None) -> None:
    from ..inference.terminal import out as console
    from .dry_run import report
    from .run import settled

    for line in report(settled(recipe), data, videos, limit):
        console.print(line, markup=False, highlight=False)


def _installed(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None


#: Questions of each test video.
_TEST_QUESTIONS = 4
