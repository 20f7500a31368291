"""Measure time, memory and operations by stage, for full, FlexSelect, Lite and uniform.

    python scripts/bench.py --model qwen --shape small --frames 64 128 256 512

Prints Markdown and stores it with the numbers as JSON in the folder of --out. Shapes: tiny (the
project's checkpoints), small (hidden 512, 8 layers; for a CPU), 7b (the real architectures with
random weights, made on the GPU). `--micro` measures the parts instead: relevance, the Spearman
loss, mapping back; `--check` ends with exit code 1 where a bar is missed.

Times are medians over repeats, the device waited for at every change of stage. Elapsed time is
what a user waits; processor time counts all threads and stays meaningful on a CPU that others use.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from flexselect.core.errors import FlexSelectError, OptionError
from flexselect.inference.features import release_cache
from flexselect.inference.registry import architecture_of, family_named
from flexselect.inference.session import Video
from flexselect.scripts import bench_flops, bench_micro
from flexselect.scripts.bench_report import bars, markdown
from flexselect.scripts.bench_shapes import METHODS, SHAPES, Subject, build_subject
from flexselect.scripts.bench_stages import (
    Plan,
    make_film,
    measure_method,
    measure_opening,
    opened,
)

#: Frames of a shape's range, and repeats of its stages.
FRAMES = {"tiny": [64, 128, 256, 512], "small": [64, 128, 256, 512], "7b": [128, 256, 512, 1024]}
REPEATS = {"tiny": 5, "small": 3, "7b": 5}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for, print and store it, and return the exit code."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers.utils.logging.disable_progress_bar()
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        record = run_micro(options) if options.micro else run_stages(options)
    except FlexSelectError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    record["bars"] = bars(record)
    text = markdown(record)
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    name = "micro" if options.micro else f"{record['family']}-{record['shape']}"
    name = options.name or f"{name}-{record['machine']['kind']}"
    _write(options.out / f"{name}.json", json.dumps(record, indent=1) + "\n")
    _write(options.out / f"{name}.md", text + "\n")
    print(f"\nStored as {options.out / name}.json and .md", file=sys.stderr)
    missed = [bar for bar in record["bars"] if not bar["holds"]]
    return 1 if options.check and missed else 0


def run_stages(options: argparse.Namespace) -> dict[str, Any]:
    """Measure opening and every method at every length."""
    family = family_named(options.model)
    device = _device(options)
    dtype = getattr(torch, options.dtype) if options.dtype else None
    subject = build_subject(
        family,
        options.shape,
        device=device,
        dtype=dtype,
        attention=options.attention,
        selector_device=options.selector_device,
    )
    if options.compile:
        compile_layers(subject)
    lengths = options.frames or FRAMES[options.shape]
    plan = Plan(options.repeats or REPEATS[options.shape], options.new_tokens, options.words)
    rate = bench_flops.matrix_rate(subject.model.device, subject.model.dtype)
    methods = [name for name in options.methods if name != "flexselect-lite" or subject.selector]
    if len(methods) < len(options.methods):
        _say(f"Without flexselect-lite: {subject.selector_missing}")
    record = {
        "family": family,
        "shape": options.shape,
        "weights": subject.source,
        "machine": _machine(subject.model.device),
        "dtype": str(subject.model.dtype).removeprefix("torch."),
        "attention": subject.model.config._attn_implementation,
        "compiled": options.compile,
        "memory_limit_gib": options.memory_gib,
        "repeats": plan.repeats,
        "new_tokens": plan.new_tokens,
        "matrix_rate": rate,
        "weights_mib": _weights(subject),
        "missing": {} if subject.selector else {"flexselect-lite": subject.selector_missing},
        "lengths": [],
    }
    with_selector = "flexselect-lite" in methods
    with tempfile.TemporaryDirectory() as folder:
        for frames in lengths:
            record["lengths"].append(
                _one_length(subject, frames, methods, plan, with_selector, Path(folder))
            )
    return record


def _one_length(
    subject: Subject,
    frames: int,
    methods: Sequence[str],
    plan: Plan,
    with_selector: bool,
    folder: Path,
) -> dict[str, Any]:
    _say(f"{frames} frames: film")
    pictures = frames * architecture_of(subject.model).pictures_per_frame
    film = make_film(folder / f"{pictures}.mp4", pictures, subject.side)
    _say(f"{frames} frames: decode, encode")
    opening = measure_opening(subject, film, frames, plan, with_selector)
    video = opened(subject, film, frames, with_selector)
    film.unlink()
    found: dict[str, Any] = {"frames": frames, "opening": opening, "methods": {}}
    for name in methods:
        _say(f"{frames} frames: {name}")
        found["methods"][name] = _fitting(subject, video, name, plan)
        if found["methods"][name] is None:
            release_cache()
    return found


def _fitting(subject: Subject, video: Video, name: str, plan: Plan) -> dict[str, Any] | None:
    """Measure a method; None where it does not fit the device, which is a result, too."""
    try:
        return measure_method(subject, video, name, plan)
    except torch.OutOfMemoryError:
        return None
    except FlexSelectError as error:
        if not isinstance(error.__cause__, torch.OutOfMemoryError):
            raise
        return None


def run_micro(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the parts, each against its plain formulation."""
    device = torch.device(_device(options))
    repeats = options.repeats or 3
    measured = {}
    for name, measure in bench_micro.PARTS.items():
        _say(name)
        measured[name] = measure(device, repeats)
    return {
        "family": "",
        "shape": "parts",
        "machine": _machine(device),
        "repeats": repeats,
        "parts": measured,
    }


def _device(options: argparse.Namespace) -> str:
    """Choose the device, and limit its memory where that is asked for."""
    device = str(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if torch.device(device).type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise OptionError(
            f"--device {device}: there is no CUDA GPU, or no driver for it. Leave --device out to "
            "measure on the CPU."
        )
    if options.memory_gib:
        whole = torch.cuda.get_device_properties(device).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.memory_gib / whole), device)
    return device


def compile_layers(subject: Subject, backend: str = "inductor") -> None:
    """Compile every decoder layer in place; one that fails to compile runs as it is.

    Relevance calls the layers like the model itself does, so both profit.
    """
    torch._dynamo.config.suppress_errors = True
    decoders = [architecture_of(subject.model).decoder]
    if subject.selector is not None:
        decoders.append(subject.selector.language_model)
    for decoder in decoders:
        for layer in decoder.layers:
            layer.compile(dynamic=True, backend=backend)


def _machine(device: torch.device) -> dict[str, Any]:
    """Name what decides the times."""
    found: dict[str, Any] = {
        "kind": device.type,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        found["device"] = about.name
        found["device_memory_mib"] = about.total_memory / 2**20
        found["cuda"] = torch.version.cuda
    return found


def _processor() -> str:
    """Name the processor as the system does."""
    about = Path("/proc/cpuinfo")
    if about.exists():
        for line in about.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':')[1].strip()} ({platform.machine()})"
    return platform.processor() or platform.machine()


def _weights(subject: Subject) -> dict[str, float]:
    parts = {"model": subject.model, "selector": subject.selector}
    return {
        name: sum(p.numel() * p.element_size() for p in part.parameters()) / 2**20
        for name, part in parts.items()
        if part is not None
    }


def _write(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}")
    part.write_text(text)
    part.replace(path)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="qwen", help="family: qwen, llava or internvl")
    parser.add_argument("--shape", default="tiny", choices=SHAPES)
    parser.add_argument("--frames", type=_count, nargs="+", help="lengths of video to measure")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--repeats", type=_count, help="of every stage, after one to warm up")
    parser.add_argument("--new-tokens", type=_count, default=9, help="length of an answer")
    parser.add_argument("--words", type=_count, default=40, help="length of the question")
    parser.add_argument("--threads", type=_count, help="default: what torch takes")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--selector-device", help="default: beside the model")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--attention", help="attention kernel; default sdpa")
    parser.add_argument("--memory-gib", type=float, help="use no more of a GPU's memory than this")
    parser.add_argument("--compile", action="store_true", help="compile the decoder layers")
    parser.add_argument("--micro", action="store_true", help="measure the parts instead")
    parser.add_argument("--check", action="store_true", help="exit code 1 where a bar is missed")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench"))
    parser.add_argument("--name", help="of the files; default: family, shape and kind of device")
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


if __name__ == "__main__":
    sys.exit(main())
