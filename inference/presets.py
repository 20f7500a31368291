"""Presets: the knobs that belong to a model, read from ``shared_configs/models/*.yaml``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args

import yaml

from ..core.architecture import Architecture
from ..core.errors import OptionError
from ..core.relevance import Aggregation
from .methods import Positions, Query
from .policy import SAMPLING, check_sampling
from .registry import FAMILIES

FOLDER = Path(__file__).resolve().parent.parent / "shared_configs" / "models"

_SECTIONS = ("family", "match", "method", "video", "source")

#: Knobs of a preset's ``method`` that are one of a few words.
_WORDS: dict[str, tuple[str, ...]] = {
    "aggregation": get_args(Aggregation),
    "query": get_args(Query),
    "positions": get_args(Positions),
}
#: Knobs of a preset's ``method`` that are whole numbers, and the least of each.
_NUMBERS = {"layer": 0, "budget": 1, "frames_per_set": 1}
_METHOD = (*_NUMBERS, "layer_depth", *_WORDS)
_MATCH = ("hidden_size", "num_hidden_layers")


@dataclass(frozen=True)
class Preset:
    """What a model is run with unless told otherwise.

    Attributes
    ----------
    name : file it came from, without ending.
    family : folder of the family.
    match : fields of the text config that a model of this preset has; empty for the family's
        general preset.
    method : knobs of the methods.
    video : how a video is sampled and sized.
    source : where the values come from.
    """

    name: str
    family: str
    match: Mapping[str, int]
    method: Mapping[str, Any]
    video: Mapping[str, Any]
    source: str


def preset_of(architecture: Architecture) -> Preset:
    """Return the preset that matches a model, the family's general one if none is made for it.

    Raises `OptionError` where there is neither.
    """
    config = architecture.decoder.config
    mine = [preset for preset in load_presets(FOLDER) if preset.family == architecture.family]
    fitting = [
        preset
        for preset in mine
        if all(getattr(config, name, None) == value for name, value in preset.match.items())
    ]
    if not fitting:
        sizes = {name: getattr(config, name, None) for name in _MATCH}
        raise OptionError(
            f"{FOLDER} holds no preset for {architecture.family} of {sizes}, and no general one. "
            "Add a file with that family, and no match to make it general."
        )
    preset = max(fitting, key=lambda preset: len(preset.match))
    method = dict(preset.method)
    if "layer_depth" in method:
        method["layer"] = int(method.pop("layer_depth") * architecture.num_layers)
    return Preset(preset.name, preset.family, preset.match, method, preset.video, preset.source)


@cache
def load_presets(folder: Path) -> tuple[Preset, ...]:
    """Read every preset of a folder.

    Raises `OptionError` naming file, section and key for whatever is unknown, missing or no value
    that the key can have.
    """
    return tuple(_read(path) for path in sorted(folder.glob("*.yaml")))


def _read(path: Path) -> Preset:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise OptionError(f"{path}: not readable as YAML: {reason}") from error
    _check_keys(path, "the file", raw, _SECTIONS)
    missing = [name for name in _SECTIONS if name not in raw and name != "match"]
    if missing:
        raise OptionError(f"{path}: missing {missing}.")
    families = sorted({family for family, _ in FAMILIES.values()})
    _check(path, "family", raw["family"], raw["family"] in families, f"one of {families}")
    source = raw["source"]
    filled = isinstance(source, str) and bool(source.strip())
    _check(path, "source", source, filled, "text that says where the values come from")
    match = raw.get("match", {})
    _check_keys(path, "match", match, _MATCH)
    for name, value in match.items():
        _check(path, f"match.{name}", value, _whole(value, 1), "a whole number of at least 1")
    _check_method(path, raw["method"])
    _check_video(path, raw["video"])
    return Preset(path.stem, raw["family"], match, raw["method"], raw["video"], source)


def _check_method(path: Path, method: Any) -> None:
    _check_keys(path, "method", method, _METHOD)
    for name, value in method.items():
        key = f"method.{name}"
        if name in _WORDS:
            _check(path, key, value, value in _WORDS[name], f"one of {list(_WORDS[name])}")
        elif name in _NUMBERS:
            least = _NUMBERS[name]
            _check(path, key, value, _whole(value, least), f"a whole number of at least {least}")
        else:
            part = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1
            _check(path, key, value, part, "a share of the layers, from 0 to below 1")
    if ("layer" in method) == ("layer_depth" in method):
        raise OptionError(f"{path}: method must have either layer or layer_depth.")
    missing = sorted({*_NUMBERS, *_WORDS} - {"layer", *method})
    if missing:
        raise OptionError(f"{path}: missing {missing} in method.")


def _check_video(path: Path, video: Any) -> None:
    _check_keys(path, "video", video, SAMPLING)
    for name, value in video.items():
        _check(path, f"video.{name}", value, value is not None, "a number")
    try:
        check_sampling(video)
    except OptionError as error:
        raise OptionError(f"{path}: video: {error}") from error
    if not {"fps", "frames"} & set(video):
        raise OptionError(f"{path}: video must have either fps or frames.")


def _check_keys(path: Path, section: str, value: Any, known: Sequence[str]) -> None:
    _check(path, section, value, isinstance(value, dict), f"a mapping with keys of {list(known)}")
    unknown = sorted(str(name) for name in value if name not in known)
    if unknown:
        raise OptionError(f"{path}: unknown keys {unknown} in {section}; known: {list(known)}.")


def _check(path: Path, key: str, value: Any, valid: bool, expected: str) -> None:
    if not valid:
        raise OptionError(f"{path}: {key} must be {expected}, got {value!r}.")


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
