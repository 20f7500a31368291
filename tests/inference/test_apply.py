"""The parts of applying a method that need no model: what stays, padding, lengths, knobs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig

from flexselect.core.errors import OptionError
from flexselect.core.layout import NONE
from flexselect.inference.apply import count_new_tokens, is_applied, method_from, remove
from flexselect.inference.engine import Engine, kept_rows
from flexselect.inference.methods import FlexSelect, Full
from flexselect.tests.core.handmade import make, text_of


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        ([], "ss[]m()iiqq"),
        ([0], "ss[tA]m()iiqq"),
        ([1, 5], "ss[tAtA]m()iiqq"),
        ([2, 3, 6], "ss[tAA]m(B)iiqq"),
        (list(range(10)), "ss[tAAtAAtAA]m(BBBB)iiqq"),
    ],
)
def test_text_of_a_frame_stays_with_any_of_its_tokens(kept: list[int], expected: str) -> None:
    prompt = make()
    rows = kept_rows(prompt, torch.tensor(kept, dtype=torch.long))
    assert text_of(prompt, rows) == expected


@given(st.sets(st.integers(0, 9)))
def test_a_frames_text_stays_exactly_when_a_token_of_it_does(kept: set[int]) -> None:
    prompt = make()
    layout = prompt.layout
    visual = prompt.visual_rows().tolist()
    shown = {(int(layout.video[visual[k]]), int(layout.frame[visual[k]])) for k in kept}
    rows = set(kept_rows(prompt, torch.tensor(sorted(kept), dtype=torch.long)).tolist())
    for row in range(len(layout)):
        if layout.visual[row]:
            stays = row in {visual[k] for k in kept}
        elif layout.frame[row] != NONE:
            stays = (int(layout.video[row]), int(layout.frame[row])) in shown
        else:
            stays = True
        assert (row in rows) == stays


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("axes", [(), (3,)])
def test_prefill_pads_to_the_longest(left: bool, axes: tuple[int, ...]) -> None:
    parts = []
    for length in (2, 4):
        positions = torch.arange(1, length + 1).expand(*axes, length)
        parts.append((torch.full((length, 5), float(length)), positions))
    decoder = SimpleNamespace(rotary_emb=SimpleNamespace(rope_type="default"))
    engine: Any = SimpleNamespace(architecture=SimpleNamespace(decoder=decoder))
    out = Engine.prefill(engine, parts, left)
    assert out["inputs_embeds"].shape == (2, 4, 5)
    assert out["position_ids"].shape == (*axes, 2, 4)
    where = [0, 0, 1, 1] if left else [1, 1, 0, 0]
    assert out["attention_mask"].tolist() == [where, [1, 1, 1, 1]]
    assert out["attention_mask"].dtype == torch.long
    assert out["inputs_embeds"][0, :, 0].tolist() == [2.0 * one for one in where]
    expected = [0, 0, 1, 2] if left else [1, 2, 0, 0]
    flat = out["position_ids"].reshape(-1, 2, 4)
    assert flat[-1].tolist() == [expected, [1, 2, 3, 4]]


DEFAULT = GenerationConfig()


@pytest.mark.parametrize(
    ("options", "default", "expected"),
    [
        ({}, {}, {}),
        ({"max_new_tokens": 5}, {}, {"max_new_tokens": 5}),
        ({"max_length": 107}, {}, {"max_new_tokens": 7}),
        ({"max_length": 107, "do_sample": True}, {}, {"max_new_tokens": 7, "do_sample": True}),
        ({"max_length": 3, "max_new_tokens": 5}, {}, {"max_length": 3, "max_new_tokens": 5}),
        ({}, {"max_length": 104}, {"max_new_tokens": 4}),
        ({"max_length": 107}, {"max_length": 104}, {"max_new_tokens": 7}),
        ({"max_length": 107}, {"max_new_tokens": 4}, {"max_length": 107}),
        ({"min_length": 103}, {}, {"min_new_tokens": 3}),
        ({"min_length": 3}, {}, {"min_new_tokens": 0}),
        ({"min_length": 103, "min_new_tokens": 9}, {}, {"min_length": 103, "min_new_tokens": 9}),
        (
            {"min_length": 103, "max_length": 110},
            {},
            {"min_new_tokens": 3, "max_new_tokens": 10},
        ),
    ],
)
def test_lengths_count_new_tokens(
    options: dict[str, Any], default: dict[str, Any], expected: dict[str, Any]
) -> None:
    given_options = dict(options)
    assert count_new_tokens(options, GenerationConfig(**default), 100) == expected
    assert options == given_options


def test_lengths_of_a_callers_config() -> None:
    config = GenerationConfig(max_length=107, min_length=104, top_k=7)
    found = count_new_tokens({"generation_config": config, "streamer": 1}, DEFAULT, 100)
    changed = found.pop("generation_config")
    assert found == {"streamer": 1}
    assert (changed.max_new_tokens, changed.min_new_tokens, changed.top_k) == (7, 4, 7)
    assert changed.max_length is None
    assert changed.min_length is None
    assert (config.max_length, config.min_length, config.max_new_tokens) == (107, 104, None)
    same = GenerationConfig(max_new_tokens=3)
    assert count_new_tokens({"generation_config": same}, DEFAULT, 100) == {
        "generation_config": same
    }


@pytest.mark.parametrize("limit", [1, 100])
def test_no_room_for_an_answer(limit: int) -> None:
    with pytest.raises(OptionError, match=f"max_length={limit} .*100 tokens"):
        count_new_tokens({"max_length": limit}, DEFAULT, 100)


def test_methods_from_knobs() -> None:
    assert method_from(FlexSelect, {"budget": 3}) == FlexSelect(budget=3)
    with pytest.raises(OptionError, match=r"flexselect has no knob budgte, lyaer; .*'budget'"):
        method_from(FlexSelect, {"budgte": 3, "lyaer": 2})
    with pytest.raises(OptionError, match="full has no knob budget"):
        method_from(Full, {"budget": 3})


def test_things_that_are_no_model() -> None:
    for thing in (None, 3, object()):
        assert not is_applied(thing)
        assert remove(thing) is thing
