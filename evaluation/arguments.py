"""What the plug-in is told in ``--model_args``: strings made into values, checked, none ignored.

The harness hands over ``"None"``, lists and sometimes numbers as text. The names of the reference's
scripts are taken as well, so that its commands keep working.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..core.errors import OptionError
from ..inference.apply import method_from
from ..inference.methods import METHODS, FlexSelect, Method
from ..inference.policy import SAMPLING, check_sampling

#: The method that ranks with a selector, in tables and options.
LITE = "flexselect-lite"

#: Arguments that are knobs of a method.
KNOBS = (
    "budget",
    "layer",
    "selector",
    "aggregation",
    "query",
    "frames_per_set",
    "sets_per_batch",
    "positions",
    "seed",
)


@dataclass(frozen=True)
class Arguments:
    """Everything the plug-in can be told.

    Attributes
    ----------
    pretrained : folder or hub id of the model.
    method : ``"full"``, ``"uniform"``, ``"random"``, ``"flexselect"`` or ``"flexselect-lite"``.
    knobs : of the method; what is missing comes from the model's preset.
    sampling : how a video is looked at, as in `open_video`; the rest from the preset.
    batch_size : questions answered at a time.
    max_new_tokens : longest answer; default: what the task says.
    system_prompt : put before every conversation; default: what the chat template says.
    prompts : ``"published"``, those of the published figures, or ``"task"``, the harness's own.
    run_folder : where answers are kept, so that an interrupted run continues; none by default.
    record_selection : also keep, for every question, how many tokens of each frame stayed and the
        moments the answer was read from.
    cache_gb : host memory for the features of videos that may be asked about again.
    backend, frames_per_chunk, dtype, device, device_map, attn_implementation : as in
        `open_video` and `load_model`.
    """

    pretrained: str
    method: str = FlexSelect.name
    knobs: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 1
    max_new_tokens: int | None = None
    system_prompt: str | None = None
    prompts: str = "published"
    run_folder: str | None = None
    record_selection: bool = False
    cache_gb: float = 8.0
    backend: str = "pyav"
    frames_per_chunk: int | None = None
    dtype: str = "auto"
    device: str | None = None
    device_map: str | None = None
    attn_implementation: str | None = None

    def build_method(self) -> Method:
        """Make the method; raises `OptionError` for a knob it does not have."""
        return method_from(METHODS[_plain(self.method)], self.knobs)


def parse_arguments(given: Mapping[str, Any]) -> Arguments:
    """Make `Arguments` of what the harness hands over.

    Raises
    ------
    OptionError
        A name is unknown, a value cannot be read, or two names say different things.
    """
    values = {name: coerce(value) for name, value in given.items()}
    named: dict[str, tuple[str, Any]] = {}
    for name, value in values.items():
        for ours, meant in _translate(name, value, values).items():
            if ours in named and named[ours][1] != meant:
                raise OptionError(
                    f"{named[ours][0]} and {name} both decide {ours}, and say {named[ours][1]!r} "
                    f"and {meant!r}. Give one of them."
                )
            named[ours] = (name, meant)
    chosen = {name: value for name, (_, value) in named.items() if value is not None}
    if not isinstance(chosen.get("pretrained"), str):
        raise OptionError("pretrained is missing: name the folder or hub id of the model.")
    for name, value in chosen.items():
        if name in _KINDS:
            _check_kind(name, value)
    knobs = {name: chosen.pop(name) for name in KNOBS if name in chosen}
    sampling = {name: chosen.pop(name) for name in SAMPLING if name in chosen}
    check_sampling(sampling)
    arguments = Arguments(knobs=knobs, sampling=sampling, **chosen)
    _check_method(arguments)
    arguments.build_method()
    return arguments


def coerce(value: Any) -> Any:
    """Read a value that came as text: None, true and false, numbers, and JSON lists or objects."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text in ("", "None", "none", "null"):
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return coerce(float(text))
    except ValueError:
        pass
    if text[0] in "[{":
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise OptionError(f"{value!r} starts like JSON but is none: {error}.") from error
    return text


def _translate(name: str, value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Say what an argument means in our own names."""
    if name in _NAMES:
        return {name: value}
    if name in _SAME:
        return {_SAME[name]: value}
    if name in _FIXED:
        if value not in _FIXED[name]:
            expected = " or ".join(repr(v) for v in _FIXED[name] if v is not None)
            raise OptionError(
                f"{name} can only be {expected} here, got {value!r}: other values belong to "
                "experiments of the reference that are not part of this project."
            )
        return {}
    if name in _MEANINGS:
        return _MEANINGS[name](value, given)
    known = ", ".join(sorted(_NAMES))
    reference = ", ".join(sorted({*_SAME, *_FIXED, *_MEANINGS}))
    raise OptionError(
        f"There is no model argument {name!r}. Arguments: {known}. Also taken, from the "
        f"reference: {reference}."
    )


def _use_selector(value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(value, bool):
        raise OptionError(f"use_token_selector must be True or False, got {value!r}.")
    return {} if value else {"method": "full"}


def _use_flash_attention(value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(value, bool | None):
        raise OptionError(f"use_flash_attention_2 must be True or False, got {value!r}.")
    return {"attn_implementation": "flash_attention_2"} if value else {}


def _of_selection(ours: str, read: Callable[[Any, Mapping[str, Any]], Any]) -> Any:
    """Make the meaning of an argument that counts for nothing where no token is selected."""

    def meaning(value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        if given.get("use_token_selector") is False:
            return {}
        return {ours: read(value, given)}

    return meaning


def _read_layer(value: Any, given: Mapping[str, Any]) -> Any:
    """-1 is how the reference says "not given"; a selector always ranks at its last layer there."""
    if given.get("token_selector_path", "self") != "self":
        return None
    return None if value == -1 else value


_NAMES = {f.name for f in fields(Arguments)} - {"knobs", "sampling"} | {*KNOBS, *SAMPLING}

#: The reference's (and the harness's) names of arguments that we have under another.
_SAME = {
    "attn_impl": "attn_implementation",
    "max_frames_num": "frames",
    "max_num_frames": "max_frames",
    "num_frame": "frames",
    "num_frames": "frames",
    "num_segments": "frames",
    "torch_dtype": "dtype",
    "video_decode_backend": "backend",
}

#: Arguments of the reference's scripts of which only one value is meaningful.
_FIXED: dict[str, tuple[Any, ...]] = {
    "conv_template": ("qwen_1_5", None),
    "max_batch_size": (None,),
    "mm_newline_position": ("grid", None),
    "mm_spatial_pool_mode": ("bilinear", None),
    "mm_spatial_pool_stride": (2, None),
    "modality": ("video", None),
    "overwrite": (True, False, None),
    "token_selector_type": ("qwen2", "internlm2", "InternLM2", None),
    "use_cache": (True, None),
}

_MEANINGS: dict[str, Callable[[Any, Mapping[str, Any]], dict[str, Any]]] = {
    "drop_func_name": _of_selection("aggregation", lambda value, _: value),
    "tkn_budget": _of_selection("budget", lambda value, _: value),
    "token_selector_layer": _of_selection("layer", _read_layer),
    "token_selector_path": _of_selection(
        "selector", lambda value, _: None if value == "self" else value
    ),
    "use_flash_attention_2": _use_flash_attention,
    "use_token_selector": _use_selector,
}

#: What an argument must be: how to say it, and the check.
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "batch_size": ("a whole number of at least 1", lambda v: _whole(v, 1)),
    "budget": ("a whole number of at least 1", lambda v: _whole(v, 1)),
    "cache_gb": ("a finite number of at least 0", lambda v: _number(v) and 0 <= v < math.inf),
    "frames_per_chunk": ("a whole number of at least 1", lambda v: _whole(v, 1)),
    "layer": ("a whole number of at least 0", lambda v: _whole(v, 0)),
    "max_new_tokens": ("a whole number of at least 1", lambda v: _whole(v, 1)),
    "prompts": ("published or task", lambda v: v in ("published", "task")),
    "record_selection": ("true or false", lambda v: isinstance(v, bool)),
    "selector": ("the folder or hub id of a Lite selector", lambda v: isinstance(v, str | Path)),
    **{
        name: ("text", lambda v: isinstance(v, str))
        for name in (
            *("aggregation", "attn_implementation", "backend", "device", "device_map", "dtype"),
            *("method", "positions", "pretrained", "query", "run_folder", "system_prompt"),
        )
    },
}


def _check_kind(name: str, value: Any) -> None:
    expected, fits = _KINDS[name]
    if not fits(value):
        raise OptionError(f"{name} must be {expected}, got {value!r}.")


def _check_method(arguments: Arguments) -> None:
    name = arguments.method
    if name not in (*METHODS, LITE):
        raise OptionError(f"method must be one of {', '.join([*METHODS, LITE])}, got {name!r}.")
    if name == LITE and "selector" not in arguments.knobs:
        raise OptionError(f"method={LITE} needs selector=, the folder or hub id of one.")


def _plain(name: str) -> str:
    return FlexSelect.name if name == LITE else name


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
