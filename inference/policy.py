"""How a video is looked at: the caller's sampling options, and the preset's for the rest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..core.architecture import Architecture
from ..core.errors import OptionError

if TYPE_CHECKING:  # presets check their own sampling here
    from .presets import Preset

#: Options that decide which pictures of a video are looked at, and at what size.
SAMPLING = ("fps", "frames", "min_frames", "max_frames", "min_pixels", "max_pixels")


def check_sampling(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of ``sampling`` that are given, or raise `OptionError`.

    Parameters
    ----------
    sampling : as in `open_video`; None stands for not given.
    """
    unknown = sorted(set(sampling) - set(SAMPLING))
    if unknown:
        raise OptionError(f"Unknown options {unknown}; sampling has {list(SAMPLING)}.")
    chosen = {name: value for name, value in sampling.items() if value is not None}
    for name, value in chosen.items():
        whole = name != "fps"
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            raise OptionError(f"{name} must be a {'whole ' if whole else ''}number, got {value!r}.")
        if not 0 < value < math.inf:
            raise OptionError(f"{name} must be positive and finite, got {value}.")
    if "fps" in chosen and "frames" in chosen:
        raise OptionError("Give either fps or frames, not both.")
    bounds = [name for name in ("min_frames", "max_frames") if name in chosen]
    if "frames" in chosen and bounds:
        raise OptionError(f"frames is the number itself; leave out {' and '.join(bounds)}.")
    for what in ("frames", "pixels"):
        least, most = chosen.get(f"min_{what}"), chosen.get(f"max_{what}")
        if least is not None and most is not None and most < least:
            raise OptionError(f"max_{what} ({most}) is below min_{what} ({least}).")
    return chosen


def resolve_sampling(
    architecture: Architecture, preset: Preset, sampling: Mapping[str, Any]
) -> dict[str, Any]:
    """Fill what ``sampling`` leaves open from ``preset``, or raise `OptionError`.

    A number of pictures replaces the preset's rate and its bounds, and a rate its number. A maximum
    that is given lowers the preset's minimum; a minimum never raises the preset's maximum, which is
    there to limit memory.
    """
    chosen = check_sampling(sampling)
    replaced: tuple[str, ...] = ()
    if "fps" in chosen:
        replaced = ("frames",)
    elif "frames" in chosen:
        replaced = ("fps", "min_frames", "max_frames")
    kept = {name: value for name, value in preset.video.items() if name not in replaced}
    policy = {**kept, **chosen}

    def named(name: str) -> str:
        origin = "given" if name in chosen else f"preset {preset.name}"
        return f"{name} ({policy[name]}, {origin})"

    for name in policy:
        if name not in architecture.sampling_options:
            raise OptionError(
                f"{named(name)} decides nothing for {architecture.family}, which takes "
                f"{', '.join(architecture.sampling_options)}. Leave it out."
            )
    bounds = [name for name in ("min_frames", "max_frames") if name in chosen]
    if "frames" in policy and bounds:
        raise OptionError(
            f"{' and '.join(bounds)} bound fps, but the preset {preset.name} looks at "
            f"{policy['frames']} pictures. Give fps too, or frames alone."
        )
    group = architecture.pictures_per_frame
    for name in ("frames", "max_frames"):
        if name in policy and policy[name] < group:
            raise OptionError(
                f"{name} must be at least {group}, which this model reads as one, got "
                f"{policy[name]}."
            )
    for what in ("frames", "pixels"):
        least, most = f"min_{what}", f"max_{what}"
        if least not in policy or most not in policy:
            continue
        if most in chosen and least not in chosen:
            policy[least] = min(policy[least], policy[most])
        if policy[most] < policy[least]:
            raise OptionError(
                f"{named(most)} is below {named(least)}. Raise the first or lower the second."
            )
    return policy
