"""What only Qwen3-VL has: several depths of the tower, and times that stand in words."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flexselect
from flexselect import FlexSelect, FlexSelectError, Full, PromptError, UnsupportedModelError
from flexselect.core.layout import NONE, Clip
from flexselect.inference.engine import kept_rows
from flexselect.inference.pictures import read_pixels
from flexselect.tests.architectures.factories import FAMILIES, Family, Image, Video, encoded, knobs
from flexselect.tests.inference.session.films import film

[FAMILY] = [family for family in FAMILIES if family.name == "qwen3_vl"]
QUESTION = "What is it?"
HIDDEN, LEVELS = 64, 2


@pytest.fixture
def model() -> Any:
    return FAMILY.model()


def text_of(rows: Tensor) -> str:
    """Decode ids, every run of visual tokens as one *."""
    return re.sub(r"(<\|video_pad\|>)+", "*", FAMILY.processor().tokenizer.decode(rows))


# -- several depths of the tower -----------------------------------------------------------------


def test_a_row_holds_what_the_stock_model_takes_from_the_tower(model: Any) -> None:
    inputs = FAMILY.inputs([Video(5), QUESTION])
    with torch.no_grad():
        stock = model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
    # One tensor for all videos in some releases of transformers, one a video in others.
    levels = [f if isinstance(f, Tensor) else torch.cat(list(f)) for f in stock.deepstack_features]
    expected = torch.cat((torch.cat(list(stock.pooler_output)), *levels), -1)
    applied = flexselect.apply(model, Full()).flexselect
    [row] = encoded(applied, inputs)
    assert row.features.model.shape == (60, (1 + LEVELS) * HIDDEN)
    torch.testing.assert_close(row.features.model, expected, rtol=1e-5, atol=1e-5)


def test_the_decoder_gets_every_level_of_the_kept_rows_and_of_no_other(model: Any) -> None:
    inputs = FAMILY.inputs([Video(7), QUESTION])
    flexselect.apply(model, **knobs(24))
    calls: list[dict[str, Any]] = []
    decoder = model.model.language_model
    decoder.register_forward_hook(lambda _, __, kw, ___: calls.append(kw), with_kwargs=True)
    with flexselect.architecture_of(model).reading({"inputs_embeds": torch.zeros(1, 3, HIDDEN)}):
        # Rows of the usual width have nothing to add.
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    [row] = encoded(model.flexselect, inputs)
    [selection] = model.flexselect.selections
    rows = kept_rows(row.prompt, selection.kept)
    wanted = (row.prompt.layout.feature.cumsum(0) - 1)[row.prompt.visual_rows()[selection.kept]]
    visual = row.prompt.layout.visual[rows]
    prefill, *steps = [call for call in calls if call.get("inputs_embeds") is not None]
    assert len(steps) == 2
    assert all(call.get("deepstack_visual_embeds") is None for call in steps)
    for number, level in enumerate(prefill["deepstack_visual_embeds"]):
        own = row.features.model[wanted, (1 + number) * HIDDEN : (2 + number) * HIDDEN]
        torch.testing.assert_close(level[visual], own)
        assert not bool(level[~visual].any())
    assert not decoder._forward_pre_hooks


def test_what_is_added_decides_scores_and_answers(model: Any) -> None:
    """With the tower's lower mergers silenced, both change: neither reads only the embeddings."""
    inputs = FAMILY.inputs([Video(7), QUESTION])
    found = []
    for silent in (False, True):
        if silent:
            with torch.no_grad():
                for merger in model.model.visual.deepstack_merger_list:
                    merger.linear_fc2.weight.zero_()
                    merger.linear_fc2.bias.zero_()
        with FlexSelect(**knobs(24))(model):
            with torch.no_grad():
                logits = model(**inputs).logits
            found.append((model.flexselect.selections[0].scores, logits[0, -1]))
    assert not torch.allclose(found[0][0], found[1][0], rtol=1e-2)
    assert not torch.allclose(found[0][1], found[1][1], rtol=1e-2)


def test_all_tokens_answer_as_the_stock_model_with_its_own_positions(model: Any) -> None:
    """No position is passed to the stock model: its own rule is the one the weights learned."""
    inputs = FAMILY.inputs(
        [Video(5), QUESTION], [Image(), Video(3, 1), "Or", Video(2, 2), "What, and where?"]
    )
    expected = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    flexselect.apply(model, Full())
    assert torch.equal(model.generate(**inputs, max_new_tokens=12, do_sample=False), expected)


def test_positions_are_the_stock_models(model: Any) -> None:
    inputs = FAMILY.inputs([Image(), "First.", Video(3, 1), "Then", Video(2, 2), QUESTION])
    expected, _ = model.model.get_rope_index(
        inputs["input_ids"],
        mm_token_type_ids=inputs["mm_token_type_ids"],
        image_grid_thw=inputs["image_grid_thw"],
        video_grid_thw=inputs["video_grid_thw"].clone(),
    )
    architecture = flexselect.architecture_of(model)
    [request] = architecture.read(inputs)
    assert torch.equal(architecture.positions(request.prompt), expected[:, 0])


def test_two_threads_answer_from_one_model(model: Any) -> None:
    """Each adds its own prompt's levels: the answers are those given one after the other."""
    flexselect.apply(model, **knobs(24))
    prompts = [FAMILY.inputs([Video(7, 1), QUESTION]), FAMILY.inputs([Video(7, 2), QUESTION])]
    options = {"max_new_tokens": 8, "do_sample": False}
    alone = [model.generate(**prompt, **options) for prompt in prompts]
    assert not torch.equal(*alone)
    answers: list[list[Tensor]] = [[], []]

    def answer(index: int) -> None:
        for _ in range(4):
            answers[index].append(model.generate(**prompts[index], **options))

    threads = [threading.Thread(target=answer, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for expected, given in zip(alone, answers, strict=True):
        assert len(given) == 4
        assert all(torch.equal(expected, each) for each in given)


def test_a_prompt_read_in_pieces_is_an_error(model: Any) -> None:
    applied = flexselect.apply(model, **knobs(24)).flexselect
    [row] = encoded(applied, FAMILY.inputs([Video(7), QUESTION]))
    prefill = applied.engine.prefill([applied.engine.gather(row, applied.engine.select(row))])
    with (
        applied.architecture.reading(prefill) as inputs,
        pytest.raises(FlexSelectError, match="in one piece"),
        torch.no_grad(),
    ):
        applied.architecture.decoder(inputs_embeds=inputs["inputs_embeds"][:, :5])
    assert not applied.architecture.decoder._forward_pre_hooks


# -- times in words ------------------------------------------------------------------------------


def test_a_frames_stamp_and_tags_leave_with_it(model: Any) -> None:
    inputs = FAMILY.inputs(["Look:", Video(7), QUESTION])
    [request] = flexselect.architecture_of(model).read(inputs)
    layout = request.prompt.layout
    frame = layout.frame[layout.visual]
    kept = ((frame == 2) | (frame == 5)).nonzero()[::5, 0]
    shown = text_of(layout.ids[kept_rows(request.prompt, kept)])
    one = "{} seconds><|vision_start|>*<|vision_end|>"
    frames = "<" + one.format(3.4) + "<" + one.format(7.9)
    assert f"user\nLook:<|vision_start|>{frames}<|vision_end|>{QUESTION}" in shown


def test_a_set_shows_its_frames_with_their_own_stamps(model: Any) -> None:
    [request] = flexselect.architecture_of(model).read(FAMILY.inputs([Video(16), QUESTION]))
    prompt = request.prompt
    frames = torch.tensor([1, 8, 15])
    rows = prompt.rows_of_frames(0, frames)
    alone = prompt.as_clip(0, frames, rows)
    assert re.findall(r"<([\d.]+) seconds>", text_of(alone.layout.ids)) == ["1.9", "12.4", "22.9"]
    asking = text_of(alone.layout.ids[alone.layout.query])
    assert asking.startswith(f"<|vision_end|><|vision_end|>{QUESTION}")
    assert asking.count("<|vision_end|>") == 2
    # The same tags are there of frames whose set goes on behind them, and do not ask.
    assert text_of(prompt.layout.ids[prompt.layout.query]).count("<|vision_end|>") == 17


@pytest.mark.parametrize("frames", [1, 2, 12])
def test_prompts_without_tags_around_the_video(model: Any, frames: int) -> None:
    """As transformers 4 wrote them, and as a template without such tags does."""
    one = "<{:.1f} seconds><|vision_start|>" + 12 * "<|video_pad|>" + "<|vision_end|>"
    video = "".join(one.format(1.5 * number + 0.4) for number in range(frames))
    text = f"<|im_start|>user\nIs a < b?{video}{QUESTION}<|im_end|>\n"
    ids = FAMILY.processor().tokenizer(text, return_tensors="pt")["input_ids"][0]
    architecture = flexselect.architecture_of(model)
    layout = architecture.layout(ids, [Clip(frames, 3, 4)], []).layout
    for number in range(frames):
        own = text_of(ids[layout.frame == number])
        stamp = f"<{1.5 * number + 0.4:.1f} seconds>"
        # Nothing tells where the stamp of a lone frame begins: it stays, as text.
        assert own == ("" if frames == 1 else stamp) + "<|vision_start|>*<|vision_end|>"
    stays = text_of(ids[layout.frame == NONE])
    assert stays.startswith("<|im_start|>user\nIs a < b?")
    assert stays.endswith(f"{QUESTION}<|im_end|>\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("<|video_pad|>", "", 1), "of 11 to 12 tokens"),
        (
            lambda text: text.replace("<|vision_end|>", 12 * "<|image_pad|>", 1),
            "of 12 to 24 tokens",
        ),
    ],
)
def test_frames_that_do_not_fit_are_an_error(model: Any, change: Any, message: str) -> None:
    one = "<1.0 seconds><|vision_start|>" + 12 * "<|video_pad|>" + "<|vision_end|>"
    ids = FAMILY.processor().tokenizer(change(3 * one + "?"), return_tensors="pt")["input_ids"][0]
    with pytest.raises(PromptError, match=message):
        flexselect.architecture_of(model).layout(ids, [Clip(3, 3, 4)], [])


@pytest.mark.parametrize("pictures", [24, 7])
def test_a_file_becomes_what_the_processor_makes_of_its_pictures(
    model: Any, tmp_path: Path, pictures: int
) -> None:
    """Ids with their stamps, and the answer; a lone last picture has its own time for a stamp."""
    path = film(tmp_path / "clip.mp4", pictures)
    limits: Any = {"min_pixels": 768, "max_pixels": 768}
    processor = FAMILY.processor()
    opened = flexselect.open_video(model, processor, path, method=Full(), fps=4, **limits)
    assert len(opened.pictures) == pictures
    at_once, _ = read_pixels(opened.engine.architecture, processor, path, {"fps": 4, **limits})
    assert at_once.clip == opened.clip
    answer = opened.ask(QUESTION, max_new_tokens=6)
    shown = flexselect.architecture_of(model).expand(
        processor, FAMILY.templated([("user", [Video(1), QUESTION])]), [opened.clip]
    )
    video = stock_pictures(path, (24, 32))
    inputs = stock_inputs(processor, video)
    assert torch.equal(shown, inputs["input_ids"][0])
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert torch.equal(answer.ids, expected[0, -6:])


def stock_pictures(path: Path, size: tuple[int, int]) -> Tensor:
    from flexselect.inference.video import probe, read_frames

    info = probe(path)
    stream = read_frames(info, list(range(info.num_frames)), size=size)
    return torch.cat([part.frames for part in stream])


def stock_inputs(processor: Any, pictures: Tensor) -> Any:
    return processor(
        text=[FAMILY.templated([("user", [Video(1), QUESTION])])],
        videos=[pictures],
        video_metadata=[
            {
                "total_num_frames": len(pictures),
                "fps": 4,
                "frames_indices": list(range(len(pictures))),
            }
        ],
        do_sample_frames=False,
        do_resize=False,
        return_tensors="pt",
    )


def test_a_selector_of_another_family_is_refused_and_none_is_said_to_be_published(
    model: Any, tmp_path: Path
) -> None:
    other: Family = next(family for family in FAMILIES if family.name == "qwen2_5_vl")
    other.selector(other.model()).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="None is published"):
        flexselect.load_selector(tmp_path, model)
