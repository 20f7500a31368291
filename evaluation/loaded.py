"""What is loaded once for several methods: the model, its processor, and opened videos."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from ..core.errors import OptionError
from ..inference.registry import load_model, load_processor
from .arguments import Arguments
from .videos import OpenVideos


@dataclass(frozen=True, eq=False)
class Loaded:
    """What several methods share: the model, its processor, and the videos opened with it."""

    model: Any
    processor: Any
    videos: OpenVideos

    @classmethod
    def of(cls, arguments: Arguments) -> Loaded:
        """Load what ``arguments`` name; each of several processes onto its own GPU."""
        # First the processor: where it is missing, that should not cost loading the weights.
        processor = load_processor(arguments.pretrained)
        model = load_model(
            arguments.pretrained,
            arguments.dtype,
            _own_device(arguments),
            arguments.device_map,
            arguments.attn_implementation,
        )
        return cls(model, processor, OpenVideos(arguments.cache_gb))


def _own_device(arguments: Arguments) -> str | None:
    """Choose the device of this process among several, or raise `OptionError`."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return arguments.device
    if arguments.device_map is not None:
        raise OptionError(
            f"device_map={arguments.device_map} spreads the model over the GPUs, but several "
            "processes were started, one for each GPU. Do one of the two."
        )
    if arguments.device in (None, "cuda") and torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return arguments.device
