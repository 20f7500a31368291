"""How options and presets become a sampling policy: what wins, what is refused, and who said it."""

from __future__ import annotations

from typing import Any

import pytest

from flexselect.core.errors import OptionError
from flexselect.inference.policy import SAMPLING, check_sampling, resolve_sampling
from flexselect.inference.presets import Preset
from flexselect.internvl.architecture import InternVL
from flexselect.llava_video.architecture import LlavaVideo
from flexselect.qwen2_5_vl.architecture import Qwen2_5_VL

QWEN, LLAVA, INTERNVL = (family(None) for family in (Qwen2_5_VL, LlavaVideo, InternVL))
RATE = {"fps": 2, "min_frames": 4, "max_frames": 1024}
NUMBER = {"frames": 512}


def resolve(video: dict[str, Any], given: dict[str, Any], architecture: Any = QWEN) -> Any:
    """Resolve against a preset with this video section."""
    preset = Preset("studied", architecture.family, {}, {}, video, "this test")
    return resolve_sampling(architecture, preset, given)


@pytest.mark.parametrize(
    ("video", "given", "policy"),
    [
        (RATE, {}, RATE),
        (RATE, {"fps": 1.5}, {**RATE, "fps": 1.5}),
        (RATE, {"max_frames": 8}, {**RATE, "max_frames": 8}),
        (RATE, {"min_frames": 8, "max_frames": 8}, {**RATE, "min_frames": 8, "max_frames": 8}),
        (RATE, {"frames": 16}, {"frames": 16}),
        (RATE, {"fps": None, "frames": None}, RATE),
        (RATE, {"max_pixels": 50_176}, {**RATE, "max_pixels": 50_176}),
        (NUMBER, {}, NUMBER),
        (NUMBER, {"frames": 2}, {"frames": 2}),
        (NUMBER, {"fps": 1}, {"fps": 1}),
        (NUMBER, {"fps": 1, "max_frames": 9}, {"fps": 1, "max_frames": 9}),
    ],
)
def test_what_is_given_replaces_what_it_stands_for(
    video: dict[str, Any], given: dict[str, Any], policy: dict[str, Any]
) -> None:
    assert resolve(video, given) == policy


@pytest.mark.parametrize(
    ("video", "given", "policy"),
    [
        (RATE, {"max_frames": 2}, {**RATE, "min_frames": 2, "max_frames": 2}),
        (
            {**RATE, "min_pixels": 900},
            {"max_pixels": 800},
            {**RATE, "min_pixels": 800, "max_pixels": 800},
        ),
    ],
)
def test_a_given_maximum_lowers_the_preset_minimum_and_the_record_says_so(
    video: dict[str, Any], given: dict[str, Any], policy: dict[str, Any]
) -> None:
    before = dict(video)
    assert resolve(video, given) == policy
    assert video == before


@pytest.mark.parametrize(
    ("video", "given", "message"),
    [
        (
            RATE,
            {"min_frames": 2000},
            r"max_frames \(1024, preset studied\) is below min_frames \(2000, given\)",
        ),
        (
            {**RATE, "max_pixels": 800},
            {"min_pixels": 900},
            r"max_pixels \(800, preset studied\) is below min_pixels \(900, given\)",
        ),
        (RATE, {"min_frames": 9, "max_frames": 8}, r"max_frames \(8\) is below min_frames \(9\)"),
        (RATE, {"max_frames": 1}, "max_frames must be at least 2, which .* got 1"),
        (RATE, {"frames": 1}, "frames must be at least 2, which .* got 1"),
        (NUMBER, {"max_frames": 8}, "max_frames bound fps, .* studied looks at 512 pictures"),
    ],
)
def test_what_cannot_be_met(video: dict[str, Any], given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        resolve(video, given)


@pytest.mark.parametrize("architecture", [LLAVA, INTERNVL], ids=lambda family: family.family)
@pytest.mark.parametrize("name", ["min_pixels", "max_pixels"])
def test_a_limit_that_a_family_does_not_take(architecture: Any, name: str) -> None:
    message = rf"{name} \(800, given\) decides nothing for {architecture.family}, .*frames"
    with pytest.raises(OptionError, match=message):
        resolve(NUMBER, {name: 800}, architecture)
    with pytest.raises(OptionError, match=rf"{name} \(800, preset studied\)"):
        resolve({**NUMBER, name: 800}, {}, architecture)
    assert resolve(RATE, {name: 800}, QWEN)[name] == 800


@pytest.mark.parametrize("architecture", [LLAVA, INTERNVL], ids=lambda family: family.family)
def test_one_picture_where_a_picture_is_a_frame(architecture: Any) -> None:
    assert resolve(NUMBER, {"frames": 1}, architecture) == {"frames": 1}
    assert resolve(NUMBER, {"fps": 1, "max_frames": 1}, architecture)["max_frames"] == 1


@pytest.mark.parametrize("architecture", [QWEN, LLAVA, INTERNVL], ids=lambda family: family.family)
def test_families_take_options_that_there_are(architecture: Any) -> None:
    assert set(architecture.sampling_options) <= set(SAMPLING)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"fsp": 2}, r"Unknown options \['fsp'\]"),
        ({"fps": float("nan")}, "fps must be positive and finite"),
        ({"fps": "2"}, "fps must be a number, got '2'"),
        ({"frames": 2.0}, "frames must be a whole number, got 2.0"),
        ({"max_pixels": True}, "max_pixels must be a whole number, got True"),
        ({"fps": 1, "frames": 2}, "either fps or frames"),
        ({"frames": 4, "min_frames": 2}, "leave out min_frames"),
    ],
)
def test_options_that_are_wrong_for_any_model(given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        check_sampling(given)
