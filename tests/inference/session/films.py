"""Films to ask about, whole and damaged, and the stock path to compare with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

import flexselect
from flexselect import FlexSelect
from flexselect.tests.architectures.factories import FAMILIES

FAMILY = next(family for family in FAMILIES if family.name == "qwen2_5_vl")
QUESTION = "Where does it begin?"
#: Pictures of 3 to 24 visual tokens: as small as the patches of the tiny model allow.
SIZE: dict[str, Any] = {"min_pixels": 768, "max_pixels": 1536}
#: 24 pictures at 4 a second.
PICTURES, RATE = 24, 4
#: Three sets of the 12 frames that the 24 pictures become.
KNOBS: dict[str, Any] = {"budget": 24, "layer": 2, "frames_per_set": 4}


def film(path: Path, pictures: int, height: int = 48, width: int = 64) -> Path:
    """Write pictures of smooth noise, each a keyframe, so that damage to one costs no other."""
    draw = np.random.default_rng(7)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=RATE)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.options = {"g": "1", "crf": "10", "x264-params": "keyint=1"}
        for _ in range(pictures):
            coarse = draw.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
            noise = coarse.repeat(8, 0).repeat(8, 1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
        container.mux(stream.encode())
    return path


def damage(source: Path, target: Path, lost: list[int]) -> Path:
    """Overwrite the packets ``lost``, counted in the order of the file."""
    with av.open(str(source)) as container:
        packets: list[Any] = [packet for packet in container.demux(video=0) if packet.size]
        places = [(packet.pos, packet.size) for packet in packets]
    data = bytearray(source.read_bytes())
    for number in lost:
        place, size = places[number]
        data[place : place + size] = b"\xff" * size
    target.write_bytes(data)
    return target


def open_clip(model: Any, processor: Any, path: Path, **options: Any) -> flexselect.Video:
    """Open every picture of a video, to be selected from in three sets."""
    options = {"method": FlexSelect(**KNOBS), "fps": RATE, **SIZE, **options}
    return flexselect.open_video(model, processor, path, **options)


def messages(question: str) -> list[dict[str, Any]]:
    content = [{"type": "video"}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def stock_inputs(processor: Any, pictures: Tensor, fps: float, question: str = QUESTION) -> Any:
    """What the processor's own call makes of pictures sampled at ``fps``."""
    text = processor.apply_chat_template(
        messages(question), tokenize=False, add_generation_prompt=True
    )
    metadata = {
        "total_num_frames": len(pictures),
        "fps": fps,
        "frames_indices": list(range(len(pictures))),
    }
    return processor(
        text=[text],
        videos=[pictures],
        video_metadata=[metadata],
        do_sample_frames=False,
        do_resize=False,
        return_tensors="pt",
    )


def stock_features(model: Any, inputs: Any) -> Tensor:
    with torch.no_grad():
        found = model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
    return torch.cat(list(found.pooler_output))


class Watch:
    """Counts the pictures' way through the vision tower."""

    def __init__(self, model: Any) -> None:
        self.calls = 0
        self.handle = model.model.visual.register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.calls += 1
