"""Finds the visual tokens of a long video that matter to the question, and answers from those.

>>> import flexselect
>>> model = flexselect.apply(model)                   # training-free, the model's preset
>>> out = model.generate(**inputs, max_new_tokens=64)  # as before, from a few thousand tokens
"""

from .core.errors import (
    CheckpointError,
    FlexSelectError,
    OptionError,
    PromptError,
    UnsupportedModelError,
    VideoError,
)
from .core.selection import Moment, Selection
from .inference.apply import apply, is_applied, remove
from .inference.methods import FlexSelect, Full, Method, Random, Uniform
from .inference.registry import (
    architecture_of,
    convert_model,
    load_model,
    load_processor,
    load_selector,
)
from .inference.session import Answer, Chat, Video, open_video

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "Chat",
    "CheckpointError",
    "FlexSelect",
    "FlexSelectError",
    "Full",
    "Method",
    "Moment",
    "OptionError",
    "PromptError",
    "Random",
    "Selection",
    "Uniform",
    "UnsupportedModelError",
    "Video",
    "VideoError",
    "apply",
    "architecture_of",
    "convert_model",
    "is_applied",
    "load_model",
    "load_processor",
    "load_selector",
    "open_video",
    "remove",
]
