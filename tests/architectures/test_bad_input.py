"""Input a user can get wrong: a clear error that names it, or a result that is still right."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import flexselect
from flexselect import (
    FlexSelect,
    FlexSelectError,
    Full,
    OptionError,
    PromptError,
    Random,
    Uniform,
    UnsupportedModelError,
)
from flexselect.inference.features import encode

from .factories import Family, Image, Video, knobs

QUESTION = "What is it?"


@pytest.mark.parametrize("method", [FlexSelect, Uniform, Random])
@pytest.mark.parametrize("budget", [0, -1, 1.5, float("nan"), "4096", True, [8], np.float64(8)])
def test_budget(family: Family, model: Any, method: Any, budget: Any) -> None:
    with pytest.raises(OptionError, match="budget must be"):
        flexselect.apply(model, method(budget=budget))
    assert not flexselect.is_applied(model)


@pytest.mark.parametrize("layer", [-1, 4, 99, 1.0, "2", True])
def test_layer(family: Family, model: Any, layer: Any) -> None:
    with pytest.raises(OptionError, match="layer must be a whole number from 0 to 3"):
        flexselect.apply(model, **knobs(24, layer=layer))
    assert not flexselect.is_applied(model)


def test_layer_of_a_selector_counts_its_own_layers(family: Family, model: Any) -> None:
    selector = family.selector(model)
    last = selector.num_layers - 1
    with pytest.raises(OptionError, match=f"from 0 to {last} "):
        flexselect.apply(model, budget=24, selector=selector, layer=last + 1)
    flexselect.apply(model, budget=24, selector=selector)
    assert model.flexselect.method.layer == last


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("aggregation", "median"),
        ("positions", "dense"),
        ("query", "first"),
        ("frames_per_set", 0),
        ("frames_per_set", 2.5),
        ("sets_per_batch", 0),
        ("sets_per_batch", "many"),
    ],
)
def test_other_knobs(family: Family, model: Any, knob: str, value: Any) -> None:
    with pytest.raises(OptionError, match=f"{knob} must be"):
        flexselect.apply(model, **knobs(24, **{knob: value}))
    assert not flexselect.is_applied(model)


def test_unknown_knob(family: Family, model: Any) -> None:
    with pytest.raises(OptionError, match=r"(?s)bugdet.*budget"):
        flexselect.apply(model, bugdet=24)


def test_method_and_knobs(family: Family, model: Any) -> None:
    with pytest.raises(OptionError, match="either a method or"):
        flexselect.apply(model, Full(), budget=24)


@pytest.mark.parametrize("thing", [nn.Linear(2, 2), object(), None])
def test_unsupported_model_names_the_supported_ones(family: Family, model: Any, thing: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=type(model).__name__) as error:
        flexselect.apply(thing, **knobs(24))
    assert type(thing).__name__ in str(error.value)


def test_part_of_a_model_is_not_supported(family: Family, model: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="Supported classes"):
        flexselect.apply(model.model, **knobs(24))


def test_applying_twice(family: Family, model: Any) -> None:
    flexselect.apply(model, **knobs(24))
    applied = model.flexselect
    with pytest.raises(FlexSelectError, match=r"remove\(model\)"):
        flexselect.apply(model, Full())
    assert model.flexselect is applied
    flexselect.apply(flexselect.remove(model), Full())
    assert model.flexselect.method.name == "full"


# -- prompts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(([QUESTION],), id="text"),
        pytest.param(([QUESTION], ["Something rather longer than that."]), id="padded-text"),
        pytest.param(([Image(), QUESTION],), id="image"),
        pytest.param(([Image(), Image(1), QUESTION], ["And none."]), id="images"),
    ],
)
def test_prompts_without_video_pass_through_untouched(
    family: Family, model: Any, select: Callable[..., Any], rows: Any
) -> None:
    inputs = family.inputs(*rows)
    with torch.no_grad():
        logits = model(**inputs).logits
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    select(model, 24)
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, logits)
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), tokens)
        # Nor does it matter that a video was read in between.
        with torch.no_grad():
            model(**family.inputs([Video(7), QUESTION]))


def test_selections_are_those_of_the_latest_call(family: Family, model: Any) -> None:
    flexselect.apply(model, **knobs(24))
    model.generate(**family.inputs([Video(5), QUESTION]), max_new_tokens=2)
    assert len(model.flexselect.selections) == 1
    model.generate(**family.inputs([QUESTION]), max_new_tokens=2)
    assert model.flexselect.selections == [None]
    with torch.no_grad():
        out = model(**family.inputs([Video(5), QUESTION]), use_cache=True)
        model(input_ids=torch.tensor([[1]]), past_key_values=out.past_key_values)
        assert len(model.flexselect.selections[0].kept) == 24
        model(**family.inputs([QUESTION], ["And?"]))
    assert model.flexselect.selections == [None, None]


def test_prompt_cut_within_its_video(family: Family, model: Any) -> None:
    inputs = family.inputs([Video(5), QUESTION])
    flexselect.apply(model, **knobs(24))
    middle = int((inputs["input_ids"][0] == video_token(model, inputs)).nonzero().median())
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if name in inputs:
            inputs[name] = inputs[name][:, :middle]
    with pytest.raises(PromptError):
        model.generate(**inputs, max_new_tokens=2)


def test_more_videos_than_places_and_more_places_than_videos(family: Family, model: Any) -> None:
    one, two = family.inputs([Video(5), QUESTION]), family.inputs([Video(5), Video(5), QUESTION])
    flexselect.apply(model, **knobs(24))
    text = ("input_ids", "attention_mask", "mm_token_type_ids")
    for words, pictures in ((one, two), (two, one)):
        mixed = {
            **{name: value for name, value in pictures.items() if name not in text},
            **{name: value for name, value in words.items() if name in text},
        }
        with pytest.raises(PromptError):
            model.generate(**mixed, max_new_tokens=2)


def video_token(model: Any, inputs: dict[str, Tensor]) -> int:
    """The id that stands most often in a prompt with one video."""
    return int(inputs["input_ids"][0].mode().values)


def test_mask_of_another_shape(family: Family, model: Any) -> None:
    inputs = family.inputs([Video(5), QUESTION])
    flexselect.apply(model, **knobs(24))
    inputs["attention_mask"] = inputs["attention_mask"][:, 1:]
    with pytest.raises(PromptError, match="attention_mask must have the shape"):
        model.generate(**inputs, max_new_tokens=2)


def test_no_mask_means_no_padding(family: Family, model: Any) -> None:
    inputs = family.inputs([Video(5), QUESTION])
    flexselect.apply(model, **knobs(24))
    expected = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    del inputs["attention_mask"]
    assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), expected)


def test_labels(family: Family, model: Any) -> None:
    inputs = family.inputs([Video(5), QUESTION])
    flexselect.apply(model, **knobs(24))
    with pytest.raises(OptionError, match=r"remove\(model\)"):
        model(**inputs, labels=inputs["input_ids"])


def test_new_video_on_a_cached_prompt(family: Family, model: Any) -> None:
    inputs = family.inputs([Video(5), QUESTION])
    flexselect.apply(model, **knobs(24))
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        with pytest.raises(PromptError, match="whole conversation"):
            model(**inputs, past_key_values=cache)


def test_no_room_for_an_answer(family: Family, model: Any) -> None:
    inputs = family.inputs([Video(5), QUESTION])
    flexselect.apply(model, **knobs(24))
    length = inputs["input_ids"].shape[1]
    with pytest.raises(OptionError, match=f"max_length={length} .*max_new_tokens"):
        model.generate(**inputs, max_length=length)


def test_float16_that_overflows(family: Family, model: Any) -> None:
    inputs = family.inputs([Video(7), QUESTION])
    decoder = flexselect.architecture_of(model).decoder
    with torch.no_grad():
        decoder.layers[0].input_layernorm.weight.fill_(float("inf"))
    flexselect.apply(model, **knobs(24))
    with pytest.raises(FlexSelectError, match="not finite"), torch.no_grad():
        model(**inputs)


# -- small budgets and small memory --------------------------------------------------------------


def test_fewer_tokens_in_a_set_than_its_quota(
    family: Family, model: Any, select: Callable[..., Any]
) -> None:
    """Sets of 2, 2 and 1 frames: the last is kept whole, the others share what it leaves."""
    inputs = family.inputs([Video(5), QUESTION])
    per_frame = family.frame_tokens(model)
    select(model, 4 * per_frame, frames_per_set=2)
    model.generate(**inputs, max_new_tokens=1)
    [selection] = model.flexselect.selections
    counts = selection.kept_per_frame()
    assert int(counts[2]) == per_frame
    share = (4 * per_frame - per_frame) // 2
    assert int(counts[0] + counts[3]) == share
    assert int(counts[1] + counts[4]) == share


def test_budget_smaller_than_the_number_of_sets(family: Family, model: Any) -> None:
    """Rounded down to nothing for each set, as in the reference: the text alone answers."""
    inputs = family.inputs([Video(6), QUESTION])
    flexselect.apply(model, Random(budget=1))
    out = model.generate(**inputs, max_new_tokens=2)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 2


class SmallDevice:
    """Stands in for an architecture's ``encode`` on a device where few frames fit."""

    def __init__(self, architecture: Any, fits: int) -> None:
        self.plain, self.fits = architecture.encode, fits
        self.tried: list[int] = []

    def __call__(self, pixels: Any, selector: Any) -> Any:
        self.tried.append(pixels.clip.frames)
        if pixels.clip.frames > self.fits:
            raise torch.OutOfMemoryError("out of memory")
        return self.plain(pixels, selector)


def test_out_of_memory_while_encoding_halves_the_chunk_and_says_so(
    family: Family,
    model: Any,
    select: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    applied = select(model, 24).flexselect
    architecture = applied.architecture
    selector = applied.method.encodes_for
    [request] = architecture.read(family.inputs([Video(7), Video(4, 1), QUESTION]))
    expected = encode(architecture, request.pixels, selector)
    device = SmallDevice(architecture, fits=2)
    monkeypatch.setattr(architecture, "encode", device)
    with caplog.at_level(logging.WARNING, logger="flexselect"):
        got = encode(architecture, request.pixels, selector, frames_per_chunk=8)
    torch.testing.assert_close(got.model, expected.model, rtol=1e-5, atol=1e-5)
    if selector is not None:
        torch.testing.assert_close(got.selector, expected.selector, rtol=1e-5, atol=1e-5)
    # 7 do not fit, 3 do not fit, and from then on no more than what fitted is tried.
    assert device.tried[:3] == [7, 3, 1]
    assert max(device.tried[2:]) == 1
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "7 frames" in messages[0]
    assert "going on with 3" in messages[0]
    assert "going on with 1" in messages[1]


def test_out_of_memory_for_a_single_frame(
    family: Family, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = family.inputs([Video(5), QUESTION])
    flexselect.apply(model, **knobs(24))
    monkeypatch.setattr(
        model.flexselect.architecture, "encode", SmallDevice(model.flexselect.architecture, fits=0)
    )
    with pytest.raises(FlexSelectError, match="single frame"):
        model.generate(**inputs, max_new_tokens=2)
    monkeypatch.undo()
    assert model.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2
