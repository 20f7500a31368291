"""Measure one method on one length of video, stage by stage, the way `open_video` and `ask` run.

Stages, one after the other and each waited for: decode (the file to pictures of the model's size),
prepare (the processor's normalisation), encode (tower, projector, features to host memory), prompt
(template, tokens, layout), score, gather, prefill (to the first token), further (all other tokens).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from flexselect.core.architecture import Pixels
from flexselect.inference.engine import Engine
from flexselect.inference.features import FRAMES_PER_CHUNK, encode
from flexselect.inference.methods import FlexSelect
from flexselect.inference.registry import architecture_of
from flexselect.inference.scoring import split_prompt
from flexselect.inference.session import Video, open_video
from flexselect.inference.video import probe, read_frames
from flexselect.scripts import bench_flops
from flexselect.scripts.bench_meter import FirstToken, Meter, Peak
from flexselect.scripts.bench_shapes import Subject

#: Words of a question; each is one token of the testbed's tokenizer.
QUESTION = ["what", "number", "is", "on", "the", "red", "star", "?"]
#: Pictures a second of the films made here.
_FPS = 2


@dataclass(frozen=True)
class Plan:
    """How a measurement is run.

    Attributes
    ----------
    repeats : of every stage, after one that is not counted.
    new_tokens : length of an answer.
    words : length of the question, in words.
    """

    repeats: int = 5
    new_tokens: int = 9
    words: int = 40

    @property
    def question(self) -> str:
        """The question."""
        return " ".join(QUESTION[i % len(QUESTION)] for i in range(self.words))


def make_film(path: Path, pictures: int, side: int) -> Path:
    """Write a h264 video of moving texture, twice as large as the model will look at it."""
    size = 2 * side
    ramp = np.arange(size, dtype=np.float32)
    noise = np.random.default_rng(0).integers(0, 24, (size, size, 3), dtype=np.uint8)
    part = path.with_name(f".{path.name}")
    with av.open(str(part), "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=Fraction(_FPS))
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "23", "preset": "veryfast", "x264-params": "keyint=48"}
        for number in range(pictures):
            waves = 100 + 60 * np.sin(ramp / 17 + number / 3)[:, None]
            waves = waves + 60 * np.cos(ramp / 23 - number / 5)
            shifted = np.roll(noise, 3 * number, axis=1)
            picture = np.clip(waves[..., None] + shifted, 0, 255).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    part.replace(path)
    return path


def measure_opening(
    subject: Subject, film: Path, frames: int, plan: Plan, with_selector: bool
) -> dict[str, Any]:
    """Time decoding, preparing and encoding one after the other, then `open_video` as a whole."""
    architecture = architecture_of(subject.model)
    device = subject.model.device
    info = probe(film)
    size = (subject.side, subject.side)
    pictures = frames * architecture.pictures_per_frame
    spacing = info.duration / pictures
    meter = Meter(device)
    selectors = {"encode": None}
    if with_selector:
        selectors["encode, with selector"] = subject.selector

    def chunks() -> Iterator[Pixels]:
        chunk = FRAMES_PER_CHUNK * architecture.pictures_per_frame
        stream = read_frames(info, np.arange(pictures), chunk=chunk, size=size)
        since = meter.now()
        for part in stream:
            since = meter.add("decode", since)
            pixels = architecture.pixels(subject.processor, part.frames, spacing)
            meter.add("prepare", since)
            yield pixels
            since = meter.now()

    flops: dict[str, float] = {}
    for repeat in range(plan.repeats + 1):
        meter.next_run()
        for pixels in chunks():
            for stage, selector in selectors.items():
                with meter(stage):
                    encode(architecture, [pixels], selector)
                if not repeat and stage not in flops:
                    each = bench_flops.encode_flops(architecture, pixels, selector)
                    flops[stage] = frames * each
            if not repeat:
                # Once is enough to warm up.
                break
    del meter.runs[0]
    whole = Meter(device)
    with Peak(device) as peak:
        # At most twice after warming up: it repeats what was measured above, less what overlaps.
        for _ in range(1 + min(2, plan.repeats)):
            whole.next_run()
            with whole("open"):
                opened(subject, film, frames, with_selector)
    del whole.runs[0]
    return {
        "stages": {**meter.medians(), **whole.medians()},
        "flops": flops,
        "host_peak_mib": peak.host,
        "device_peak_mib": peak.device,
    }


def opened(subject: Subject, film: Path, frames: int, with_selector: bool) -> Video:
    """Open the film as a user would."""
    architecture = architecture_of(subject.model)
    sampling: dict[str, Any] = {"frames": frames * architecture.pictures_per_frame}
    if "min_pixels" in architecture.sampling_options:
        sampling |= {"min_pixels": subject.side**2, "max_pixels": subject.side**2}
    method = subject.method("flexselect-lite" if with_selector else "full")
    return open_video(subject.model, subject.processor, film, method=method, **sampling)


def measure_method(subject: Subject, video: Video, name: str, plan: Plan) -> dict[str, Any]:
    """Time one method from encoded features to the last token of an answer."""
    engine = Engine(subject.model, subject.method(name))
    model, device = subject.model, subject.model.device
    message = {"type": "text", "text": plan.question}
    messages = [{"role": "user", "content": [{"type": "video"}, message]}]
    view = replace(video, engine=engine)
    meter = Meter(device)
    with Peak(device) as peak, torch.no_grad():
        for _ in range(plan.repeats + 1):
            meter.next_run()
            with meter("prompt"):
                encoded = view.encoded(messages, 0)
            with meter("score"):
                selection = engine.select(encoded)
            with meter("gather"):
                prefill = engine.prefill([engine.gather(encoded, selection)])
            ids = encoded.prompt.layout.ids[None].to(device)
            with engine.architecture.reading(prefill) as inputs:
                out = model.generate(
                    input_ids=ids,
                    **inputs,
                    do_sample=False,
                    min_new_tokens=plan.new_tokens,
                    max_new_tokens=plan.new_tokens,
                    streamer=FirstToken(meter),
                )
            assert out.shape[1] - ids.shape[1] == plan.new_tokens
    del meter.runs[0]
    assert selection is not None
    tokens = prefill["inputs_embeds"].shape[1]
    return {
        "stages": meter.medians(),
        "flops": _flops(engine, encoded, len(selection.kept), tokens, plan),
        "visual_tokens": selection.num_visual,
        "kept_tokens": len(selection.kept),
        "prompt_tokens": tokens,
        "host_peak_mib": peak.host,
        "device_peak_mib": peak.device,
        "settings": {key: str(value) for key, value in engine.method.record().items()},
    }


def _flops(engine: Engine, encoded: Any, kept: int, tokens: int, plan: Plan) -> dict[str, float]:
    """Count the operations of score, prefill and further tokens; see `bench_flops`."""
    config = engine.architecture.decoder.config
    flops = {
        "score": 0.0,
        "prefill": float(bench_flops.prefill_flops(config, tokens)),
        "further": float(
            sum(bench_flops.token_flops(config, tokens + i) for i in range(plan.new_tokens - 1))
        ),
    }
    method = engine.method
    if isinstance(method, FlexSelect) and kept < encoded.prompt.num_visual:
        assert method.layer is not None
        assert method.frames_per_set is not None
        scorer: Any = method.selector or engine.architecture
        prompt = method.selector.localise(encoded.prompt) if method.selector else encoded.prompt
        sets = split_prompt(prompt, scorer, method.frames_per_set, method.query == "last")
        decoder = method.selector.language_model if method.selector else scorer.decoder
        sizes = [(len(part.rows), len(part.query_rows)) for part in sets]
        flops["score"] = float(bench_flops.score_flops(decoder.config, method.layer, sizes))
    return flops


def exponent(sizes: list[int], seconds: list[float]) -> float | None:
    """Fit ``seconds ~ sizes ** exponent`` by least squares of logarithms; None for too few."""
    points = [
        (math.log(x), math.log(y)) for x, y in zip(sizes, seconds, strict=True) if x > 0 and y > 0
    ]
    if len(points) < 2:
        return None
    xs, ys = zip(*points, strict=True)
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    if not spread:
        return None
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
