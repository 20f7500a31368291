"""Listening to the pass that answers: what is heard is what it computes, and changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor

from flexselect import FlexSelect, Full, Uniform
from flexselect.core.decoder import LayerStates, listening
from flexselect.inference.engine import Engine, kept_rows
from flexselect.inference.features import Encoded
from flexselect.inference.reading import Reading, hearing

from .factories import LAYER, Family, Image, Video, knobs

CONVERSATION = [Image(), Video(7), "What is it?"]


def engine_of(
    family: Family, model: Any, method: Any, conversation: Any = CONVERSATION
) -> tuple[Engine, Encoded, Any]:
    """(engine, the encoded prompt, what the method keeps of it)."""
    engine = Engine(model, method)
    [request] = engine.architecture.read(family.inputs(conversation))
    encoded = engine.encode(request)
    return engine, encoded, engine.select(encoded)


def generate(engine: Engine, encoded: Encoded, selection: Any, **options: Any) -> Tensor:
    """Answer as `Chat.ask` does."""
    prefill = engine.prefill([engine.gather(encoded, selection)])
    options = {"max_new_tokens": 4, "do_sample": False, **options}
    ids = encoded.prompt.layout.ids[None]
    with engine.architecture.reading(prefill) as inputs:
        return engine.model.generate(input_ids=ids, **inputs, **options)


def hooks(model: Any) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


@contextmanager
def states_heard(engine: Engine, tokens: int, rows: Tensor) -> Iterator[list[LayerStates]]:
    heard: list[LayerStates] = []
    with listening(engine.architecture.decoder, [LAYER], tokens, rows, heard.append):
        yield heard


def states_of(engine: Engine, encoded: Encoded, selection: Any, rows: Tensor) -> Any:
    """Query and key states of what stays, on a walk of their own."""
    embeds, positions = engine.gather(encoded, selection)
    with torch.no_grad():
        return engine.architecture.states(embeds[None], positions.unsqueeze(-2), LAYER, rows)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_states_heard_are_those_of_a_walk_of_their_own(
    family: Family, model: Any, positions: str, beams: int
) -> None:
    method = FlexSelect(**knobs(24, positions=positions))
    engine, encoded, selection = engine_of(family, model, method)
    tokens = len(kept_rows(encoded.prompt, selection.kept))
    rows = torch.tensor([tokens - 3, tokens - 1])
    before = hooks(model)
    silent = generate(engine, encoded, selection, num_beams=beams)
    with states_heard(engine, tokens, rows) as heard:
        assert torch.equal(generate(engine, encoded, selection, num_beams=beams), silent)
        # It stopped listening before the first new token was read.
        assert hooks(model) == before
    [states] = heard
    assert states.layer == LAYER
    query, key = states_of(engine, encoded, selection, rows)
    torch.testing.assert_close(states.query, query, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(states.key, key, rtol=1e-4, atol=1e-5)


def lite(family: Family, model: Any) -> FlexSelect:
    selector = family.selector(model)
    return FlexSelect(budget=24, selector=selector, layer=0, query="last", frames_per_set=3)


METHODS: dict[str, Callable[[Family, Any], Any]] = {
    "training-free": lambda *_: FlexSelect(**knobs(24)),
    "lite": lite,
    "full": lambda *_: Full(),
    "uniform": lambda *_: Uniform(budget=48),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_reading_is_how_the_last_token_looks_at_what_was_kept(
    family: Family, model: Any, name: str
) -> None:
    """The stock attention weights, over all layers and heads, whatever the method."""
    engine, encoded, selection = engine_of(family, model, METHODS[name](family, model))
    silent = generate(engine, encoded, selection)
    with hearing(engine, encoded.prompt, selection) as reading:
        assert torch.equal(generate(engine, encoded, selection), silent)
    found = reading.added_to(selection)
    assert selection.reading is None
    visual = encoded.prompt.layout.take(kept_rows(encoded.prompt, selection.kept)).visual
    model.set_attn_implementation("eager")
    prefill = engine.prefill([engine.gather(encoded, selection)])
    with torch.no_grad(), engine.architecture.reading(prefill) as inputs:
        weights = torch.stack(model(**inputs, output_attentions=True).attentions)
    assert weights.shape[0] == engine.architecture.num_layers
    assert found.reading is not None
    assert found.reading.dtype == torch.float32
    torch.testing.assert_close(
        found.reading, weights[:, 0, :, -1].mean((0, 1))[visual], rtol=1e-4, atol=1e-6
    )
    assert found.moments()


def test_offloaded_weights_are_heard(family: Family, model: Any) -> None:
    found = []
    offloaded = copy.deepcopy(model)
    cpu_offload(offloaded, execution_device=torch.device("cpu"))
    for each in (model, offloaded):
        engine, encoded, selection = engine_of(family, each, FlexSelect(**knobs(24)))
        with hearing(engine, encoded.prompt, selection) as reading:
            generate(engine, encoded, selection)
        found.append(reading.added_to(selection).reading)
    whole, elsewhere = found
    assert whole is not None
    assert elsewhere is not None
    assert torch.equal(whole, elsewhere)


def failing(*_: Any) -> Tensor:
    raise KeyboardInterrupt


OTHERWISE: dict[str, Callable[[Engine, Encoded, Any], Any]] = {
    "another length": lambda engine, encoded, selection: generate(engine, encoded, None),
    "nothing": lambda *_: None,
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_is_not_heard_is_left_out(family: Family, model: Any, name: str) -> None:
    engine, encoded, selection = engine_of(family, model, FlexSelect(**knobs(24)))
    before = hooks(model)
    with hearing(engine, encoded.prompt, selection) as reading:
        OTHERWISE[name](engine, encoded, selection)
    assert hooks(model) == before
    assert reading.heard == 0
    assert reading.added_to(selection) is selection


def test_a_family_that_cannot_listen_answers_the_same(
    family: Family, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, encoded, selection = engine_of(family, model, FlexSelect(**knobs(24)))
    silent = generate(engine, encoded, selection)
    monkeypatch.setattr(type(engine.architecture), "listening", lambda *_: nullcontext())
    with hearing(engine, encoded.prompt, selection) as reading:
        assert torch.equal(generate(engine, encoded, selection), silent)
    assert reading.added_to(selection) is selection


@pytest.mark.parametrize("where", ["before", "after"])
def test_an_error_leaves_no_hook(family: Family, model: Any, where: str) -> None:
    """Before any layer was heard, or after some: a part of a reading is none."""
    engine, encoded, selection = engine_of(family, model, FlexSelect(**knobs(24)))
    before = hooks(model)
    layer = engine.architecture.decoder.layers[0 if where == "before" else LAYER + 1]
    handle = layer.register_forward_pre_hook(failing)
    with pytest.raises(KeyboardInterrupt), hearing(engine, encoded.prompt, selection) as reading:
        generate(engine, encoded, selection)
    handle.remove()
    assert hooks(model) == before
    assert reading.heard == (0 if where == "before" else LAYER + 1)
    assert reading.added_to(selection) is selection


def test_relevance_that_overflowed_says_nothing(family: Family, model: Any) -> None:
    _, _, selection = engine_of(family, model, FlexSelect(**knobs(24)))
    values = torch.zeros(len(selection.kept))
    assert Reading(1, 1, values).added_to(selection).reading is not None
    values[3] = torch.nan
    assert Reading(1, 1, values).added_to(selection) is selection
