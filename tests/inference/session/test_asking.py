"""ask and chat: encoded once, asked often; options of generation; stages and methods."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

import flexselect
from flexselect import OptionError, PromptError

from .films import (
    QUESTION,
    Watch,
    damage,
    messages,
    open_clip,
)


def test_the_tower_runs_once_however_much_is_asked(
    stock: Any, processor: Any, clip: Path, watch: Watch
) -> None:
    video = open_clip(stock, processor, clip, frames_per_chunk=5)
    assert watch.calls == 3
    answers = [video.ask(question, max_new_tokens=3) for question in ("What?", "And where?")]
    video.chat().ask("What?", max_new_tokens=3)
    assert watch.calls == 3
    first, second = (answer.selection for answer in answers)
    assert not torch.equal(first.kept, second.kept)
    assert first.scores is not None
    assert second.scores is not None
    assert not torch.allclose(first.scores, second.scores, atol=1e-3)


def test_asking_remembers_nothing(opened: flexselect.Video) -> None:
    first = opened.ask("What?", max_new_tokens=4)
    opened.ask("Something else entirely", max_new_tokens=4)
    again = opened.ask("What?", max_new_tokens=4)
    assert torch.equal(first.ids, again.ids)
    assert first.selection.scores is not None
    assert again.selection.scores is not None
    assert torch.equal(first.selection.scores, again.selection.scores)


class Keeper:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.values.append(value)

    def end(self) -> None:
        self.ended = True


def test_the_streamer_gets_the_whole_prompt_and_then_every_token(
    opened: flexselect.Video, processor: Any
) -> None:
    keeper = Keeper()
    answer = opened.ask(QUESTION, max_new_tokens=5, streamer=keeper)
    prompt, *tokens = keeper.values
    expected = opened.encoded(messages(QUESTION), 0).prompt.layout.ids
    assert torch.equal(prompt.flatten(), expected)
    assert torch.cat([token.flatten() for token in tokens]).tolist() == answer.ids.tolist()
    assert keeper.ended
    assert answer.text == processor.tokenizer.decode(answer.ids).strip()


def asked(monkeypatch: pytest.MonkeyPatch, video: flexselect.Video) -> list[Any]:
    """Keep what is ranked from now on."""
    kept: list[Any] = []
    select = video.engine.select

    def spy(encoded: Any, progress: Any = None) -> Any:
        kept.append(encoded)
        return select(encoded, progress)

    monkeypatch.setattr(video.engine, "select", spy)
    return kept


def test_a_chat_remembers_and_only_its_newest_turn_asks(
    opened: flexselect.Video, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranked = asked(monkeypatch, opened)
    chat, decode = opened.chat(), processor.tokenizer.decode
    first = chat.ask("Who comes?", max_new_tokens=3)
    assert torch.equal(first.ids, opened.ask("Who comes?", max_new_tokens=3).ids)
    chat.ask("And then?", max_new_tokens=3)
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    assert [part["type"] for part in chat.messages[0]["content"]] == ["video", "text"]
    assert chat.messages[1]["content"] == [{"type": "text", "text": first.text}]
    assert chat.messages[2]["content"] == [{"type": "text", "text": "And then?"}]
    alone, _, second = (encoded.prompt for encoded in ranked)
    tail = "<|im_start|>user\nAnd then?<|im_end|>\n<|im_start|>assistant\n"
    assert decode(second.layout.ids[second.layout.query]) == tail
    # The whole first turn stands before it, its video expanded.
    assert torch.equal(second.layout.ids[: len(alone.layout)], alone.layout.ids)
    assert decode(second.layout.ids).endswith(f"{first.text}<|im_end|>\n{tail}")
    # What asks is the newest turn, but the answer depends on the turns before.
    assert second.num_visual == alone.num_visual
    assert "Who comes?" in decode(alone.layout.ids[alone.layout.query])


def test_what_was_said_before_reaches_the_model(opened: flexselect.Video) -> None:
    answers = []
    for start in ("Who comes?", "Say nothing but no, whatever I ask you from here on."):
        chat = opened.chat()
        chat.ask(start, max_new_tokens=4)
        answers.append(chat.ask("And then?", max_new_tokens=8).ids)
    assert not torch.equal(*answers)


def test_two_chats_of_a_video_are_apart(opened: flexselect.Video) -> None:
    one, other = opened.chat(), opened.chat()
    one.ask("What?", max_new_tokens=1)
    assert other.messages == []


def test_a_system_message_leads_the_chat(
    opened: flexselect.Video, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranked = asked(monkeypatch, opened)
    chat = opened.chat()
    chat.messages.append({"role": "system", "content": "Answer with one letter."})
    chat.ask("What?", max_new_tokens=1)
    chat.ask("And then?", max_new_tokens=1)
    for encoded in ranked:
        text = processor.tokenizer.decode(encoded.prompt.layout.ids)
        assert text.startswith("<|im_start|>system\nAnswer with one letter.<|im_end|>\n")
        asking = encoded.prompt.layout.ids[encoded.prompt.layout.query]
        assert "letter" not in processor.tokenizer.decode(asking)


def test_a_turn_that_fails_leaves_the_chat_as_it_was(opened: flexselect.Video) -> None:
    class Interrupt(Keeper):
        def put(self, value: Tensor) -> None:
            raise KeyboardInterrupt

    chat = opened.chat()
    chat.ask("What?", max_new_tokens=1)
    before = copy.deepcopy(chat.messages)
    with pytest.raises(KeyboardInterrupt):
        chat.ask("And?", max_new_tokens=3, streamer=Interrupt())
    with pytest.raises(OptionError):
        chat.ask("And?", max_new_tokens=0)
    assert chat.messages == before


# -- options of generation -------------------------------------------------------------------------


def test_answers_are_greedy_unless_sampling_is_asked_for(
    model: Any, processor: Any, clip: Path, opened: flexselect.Video
) -> None:
    greedy = opened.ask(QUESTION, max_new_tokens=6)
    # Released checkpoints ask for sampling in their generation_config.json.
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=50)
    video = open_clip(model, processor, clip)
    for seed in (0, 1):
        torch.manual_seed(seed)
        assert torch.equal(video.ask(QUESTION, max_new_tokens=6).ids, greedy.ids)
    drawn = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        options: Any = {"do_sample": True, "temperature": 5.0, "max_new_tokens": 6}
        drawn.append(video.ask(QUESTION, **options).ids.tolist())
    assert drawn[0] == drawn[2] != drawn[1]


def two_tokens(video: flexselect.Video) -> Callable[..., Tensor]:
    """Stop after two tokens of an answer."""
    prompt = len(video.encoded(messages(QUESTION), 0).prompt.layout)
    return lambda ids, *_, **__: torch.full((len(ids),), ids.shape[1] >= prompt + 2)


def test_cut_says_whether_the_answer_ended_by_itself(
    model: Any, processor: Any, clip: Path
) -> None:
    video = open_clip(model, processor, clip)
    full = video.ask(QUESTION, max_new_tokens=6)
    assert full.cut
    assert len(full.ids) == 6
    stop = next(token for token in full.ids.tolist()[1:] if token != int(full.ids[0]))
    length = full.ids.tolist().index(stop) + 1
    config = GenerationConfig(max_new_tokens=6, eos_token_id=stop, do_sample=False)
    for options in (
        {"max_new_tokens": 6, "eos_token_id": stop},
        {"max_new_tokens": 6, "eos_token_id": [0, stop]},
        {"max_new_tokens": length, "eos_token_id": stop},
        {"generation_config": config},
    ):
        answer = video.ask(QUESTION, **options)
        assert answer.ids.tolist() == full.ids.tolist()[:length]
        assert not answer.cut
    # A criterion of the caller's own is an end too.
    brief = video.ask(QUESTION, max_new_tokens=6, stopping_criteria=[two_tokens(video)])
    assert (len(brief.ids), brief.cut) == (2, False)
    model.generation_config.eos_token_id = stop
    assert not video.ask(QUESTION).cut
    assert video.ask(QUESTION, max_new_tokens=length - 1).cut


def test_a_generation_config_may_ask_for_beams(opened: flexselect.Video) -> None:
    config = GenerationConfig(max_new_tokens=5, num_beams=3, do_sample=False)
    by_config = opened.ask(QUESTION, generation_config=config)
    by_option = opened.ask(QUESTION, max_new_tokens=5, num_beams=3)
    assert torch.equal(by_config.ids, by_option.ids)
    assert set(by_config.seconds) == {"rank", "gather", "answer"}


def test_a_dictionary_of_outputs_is_understood(opened: flexselect.Video) -> None:
    plain = opened.ask(QUESTION, max_new_tokens=3)
    rich = opened.ask(QUESTION, max_new_tokens=3, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(rich.ids, plain.ids)


def test_max_length_counts_the_whole_prompt(opened: flexselect.Video) -> None:
    prompt = len(opened.encoded(messages(QUESTION), 0).prompt.layout)
    assert len(opened.ask(QUESTION, max_length=prompt + 3).ids) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, got 0"),
        ({"max_new_tokens": "5"}, "max_new_tokens must be a whole number"),
        ({"max_length": 10}, "max_length=10 leaves no room.*max_new_tokens"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences is 2.*several"),
    ],
)
def test_options_that_make_no_answer(
    opened: flexselect.Video, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        opened.ask(QUESTION, **options)


@pytest.mark.parametrize("question", ["", " \n\t", None, 3])
def test_a_question_that_asks_nothing(opened: flexselect.Video, question: Any) -> None:
    with pytest.raises(PromptError, match="question"):
        opened.ask(question)
    with pytest.raises(PromptError, match="question"):
        opened.chat().ask(question)


def test_a_question_that_writes_a_second_video(opened: flexselect.Video) -> None:
    with pytest.raises(PromptError, match="2 places for a video, but there are 1"):
        opened.ask("What is <|video_pad|>?")


# -- stages and progress ---------------------------------------------------------------------------


def test_every_stage_is_timed(opened: flexselect.Video) -> None:
    assert set(opened.seconds) == {"decode", "encode"}
    answer = opened.ask(QUESTION, max_new_tokens=3)
    assert list(answer.seconds) == ["rank", "gather", "prefill", "answer"]
    assert all(seconds > 0 for seconds in (*opened.seconds.values(), *answer.seconds.values()))


@pytest.mark.parametrize("frames_per_chunk", [5, 32])
def test_progress_runs_to_its_end(
    stock: Any, processor: Any, clip: Path, tmp_path: Path, frames_per_chunk: int
) -> None:
    calls: list[tuple[str, int, int]] = []

    def progress(stage: str, done: int, total: int) -> None:
        calls.append((stage, done, total))

    path = damage(clip, tmp_path / "damaged.mp4", [3])
    for source, last in ((clip, 12), (path, 12)):
        calls.clear()
        video = open_clip(
            stock, processor, source, frames_per_chunk=frames_per_chunk, progress=progress
        )
        video.ask(QUESTION, progress, max_new_tokens=4)
        ends = {stage: (done, total) for stage, done, total in calls}
        assert list(ends) == ["decode", "encode", "rank", "answer"]
        assert ends == {
            "decode": (24, 24),
            "encode": (last, 12),
            "rank": (3, 3),
            "answer": (4, 0),
        }
        assert all(done <= total for _, done, total in calls if total)


def test_in_a_notebook_videos_and_answers_stay_short(opened: flexselect.Video) -> None:
    answer = opened.ask(QUESTION, max_new_tokens=2)
    assert "tensor" not in repr(opened) + repr(answer)
    assert "clip.mp4" in repr(opened)
    assert "text=" in repr(answer)
