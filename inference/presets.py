"""Presets: the knobs that belong to a model, read from ``shared_configs/models/*.yaml``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ..core.architecture import Architecture
from ..core.errors import OptionError

FOLDER = Path(__file__).resolve().parent.parent / "shared_configs" / "models"

_SECTIONS = {
    "family": {},
    "match": {"hidden_size", "num_hidden_layers"},
    "method": {
        "layer",
        "layer_depth",
        "budget",
        "aggregation",
        "query",
        "frames_per_set",
        "positions",
    },
    "video": {"fps", "frames", "min_frames", "max_frames", "min_pixels", "max_pixels"},
    "source": {},
}


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
    """Return the preset that matches a model, the family's general one if none is made for it."""
    config = architecture.decoder.config
    mine = [preset for preset in load_presets(FOLDER) if preset.family == architecture.family]
    fitting = [
        preset
        for preset in mine
        if all(getattr(config, name, None) == value for name, value in preset.match.items())
    ]
    preset = max(fitting, key=lambda preset: len(preset.match))
    method = dict(preset.method)
    if "layer_depth" in method:
        method["layer"] = int(method.pop("layer_depth") * architecture.num_layers)
    return Preset(preset.name, preset.family, preset.match, method, preset.video, preset.source)


@cache
def load_presets(folder: Path) -> tuple[Preset, ...]:
    """Read every preset of a folder. Raises `OptionError` for an unknown or missing key."""
    presets = []
    for path in sorted(folder.glob("*.yaml")):
        raw = yaml.safe_load(path.read_text())
        _check(path, raw)
        presets.append(
            Preset(
                path.stem,
                raw["family"],
                raw.get("match", {}),
                raw["method"],
                raw["video"],
                raw["source"],
            )
        )
    return tuple(presets)


def _check(path: Path, raw: Any) -> None:
    if not isinstance(raw, dict):
        raise OptionError(f"{path}: expected the sections {sorted(_SECTIONS)}.")
    for name in raw:
        if name not in _SECTIONS:
            raise OptionError(f"{path}: unknown section {name!r}; known: {sorted(_SECTIONS)}.")
        unknown = set(raw[name]) - set(_SECTIONS[name]) if isinstance(raw[name], dict) else set()
        if unknown:
            raise OptionError(
                f"{path}: unknown keys {sorted(unknown)} in {name}; known: "
                f"{sorted(_SECTIONS[name])}."
            )
    missing = {"family", "method", "video", "source"} - set(raw)
    if missing:
        raise OptionError(f"{path}: missing {sorted(missing)}.")
