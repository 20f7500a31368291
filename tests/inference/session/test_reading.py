"""ask listens to itself: moments are of the pass that answered, and the answer is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import flexselect
from flexselect import FlexSelect, Uniform
from flexselect.core.relevance import relevance
from flexselect.inference import session
from flexselect.inference.engine import kept_rows
from flexselect.inference.reading import Reading

from .films import FAMILY, QUESTION, messages, open_clip


def hooks(model: Any) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def read_again(video: flexselect.Video, conversation: list[dict[str, Any]], answer: Any) -> Any:
    """Compute the reading of a conversation on a walk of its own."""
    encoded = video.encoded(conversation, 0)
    layout = encoded.prompt.layout.take(kept_rows(encoded.prompt, answer.selection.kept))
    columns, last = layout.visual.nonzero()[:, 0], torch.tensor([len(layout) - 1])
    embeds, positions = video.engine.gather(encoded, answer.selection)
    architecture = video.engine.architecture
    layers = range(architecture.num_layers)
    with torch.no_grad():
        walk = architecture.layer_states(embeds[None], positions.unsqueeze(-2), layers, last)
        parts = [relevance(s.query, s.key, last, columns, aggregation="mean")[0] for s in walk]
    return torch.stack(parts).mean(0)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="greedy"),
        pytest.param({"num_beams": 3}, id="beams"),
        pytest.param({"do_sample": True, "temperature": 2.0}, id="sampling"),
        pytest.param({"use_cache": False}, id="no-cache"),
        pytest.param({"cache_implementation": "static"}, id="static-cache"),
    ],
)
def test_an_answer_is_what_it_is_without_a_listener(
    opened: flexselect.Video, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    before = hooks(opened.engine.model)
    torch.manual_seed(0)
    answer = opened.ask(QUESTION, max_new_tokens=6, **options)
    assert hooks(opened.engine.model) == before
    monkeypatch.setattr(session, "hearing", lambda *_: Deaf())
    torch.manual_seed(0)
    silent = opened.ask(QUESTION, max_new_tokens=6, **options)
    assert torch.equal(answer.ids, silent.ids)
    assert torch.equal(answer.selection.kept, silent.selection.kept)
    assert silent.selection.reading is None
    assert answer.selection.reading is not None
    expected = read_again(opened, messages(QUESTION), answer)
    torch.testing.assert_close(answer.selection.reading, expected, rtol=1e-4, atol=1e-6)


class Deaf:
    """Listens to nothing."""

    def __enter__(self) -> Reading:
        return Reading(0)

    def __exit__(self, *_: Any) -> None: ...


def test_moments_are_of_what_was_read(opened: flexselect.Video) -> None:
    answer = opened.ask(QUESTION, max_new_tokens=1)
    selection = answer.selection
    assert selection.reading is not None
    assert selection.scores is not None
    worth = (selection.reading * selection.scores[selection.kept]).sqrt()
    best = int(selection.frame[selection.kept[worth.argmax()]])
    first = answer.moments[0]
    assert first.first_frame <= best <= first.last_frame
    assert first.score == pytest.approx(float(worth.max()))


def test_every_turn_of_a_chat_has_a_reading_of_its_own(opened: flexselect.Video) -> None:
    chat = opened.chat()
    for question in ("Who comes?", "And then?"):
        answer = chat.ask(question, max_new_tokens=3)
        expected = read_again(opened, chat.messages[:-1], answer)
        torch.testing.assert_close(answer.selection.reading, expected, rtol=1e-4, atol=1e-6)
    assert hooks(opened.engine.model) == 0


def test_an_answer_that_fails_leaves_no_hook(opened: flexselect.Video) -> None:
    class Broken:
        def put(self, _: Any) -> None:
            raise KeyboardInterrupt

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    model = opened.engine.model
    with pytest.raises(KeyboardInterrupt):
        opened.ask(QUESTION, max_new_tokens=3, streamer=Broken())
    assert hooks(model) == 0
    handle = opened.engine.architecture.decoder.layers[0].register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        opened.ask(QUESTION, max_new_tokens=3)
    handle.remove()
    assert hooks(model) == 0


def test_a_selector_ranks_and_the_model_is_listened_to(
    stock: Any, processor: Any, clip: Path, selector_folder: Path
) -> None:
    method = FlexSelect(budget=24, selector=selector_folder, layer=1, frames_per_set=4)
    video = open_clip(stock, processor, clip, method=method)
    answer = video.ask(QUESTION, max_new_tokens=1)
    expected = read_again(video, messages(QUESTION), answer)
    torch.testing.assert_close(answer.selection.reading, expected, rtol=1e-4, atol=1e-6)


def test_sliding_windows_are_not_listened_to(processor: Any, clip: Path) -> None:
    """What a token does not see has no relevance to compare."""
    windows: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 8}
    for first, heard in ((0, False), (2, True)):
        model = FAMILY.model(**windows, max_window_layers=first)
        video = open_clip(model, processor, clip, method=Uniform(budget=40))
        answer = video.ask(QUESTION, max_new_tokens=2)
        assert len(answer.ids) == 2
        assert (answer.selection.reading is not None) == heard
        assert bool(answer.moments) == heard
