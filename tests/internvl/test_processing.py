"""Prompt styles: the words of InternVL2.5's conversation, and a video's frames in them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import InternVLProcessor

from flexselect.core.errors import OptionError, PromptError, UnsupportedModelError
from flexselect.internvl.convert import load_processor
from flexselect.internvl.processing import (
    SYSTEM_PROMPT,
    chat_template,
    expand_videos,
    with_frame_style,
)

PICTURE = "<img>" + "<IMG_CONTEXT>" * 4 + "</img>"


@pytest.fixture
def processor(original: Path) -> InternVLProcessor:
    return load_processor(original)


def talk(*content: str | dict[str, str]) -> list[dict[str, Any]]:
    parts = [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]
    return [{"role": "user", "content": parts}]


def video(frames: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.randint(0, 256, (frames, 3, 24, 40), dtype=torch.uint8, generator=generator)


def text_of(processor: InternVLProcessor, inputs: Any) -> str:
    return processor.tokenizer.decode(inputs["input_ids"][0])


def test_conversation(processor: InternVLProcessor) -> None:
    messages = [*talk({"type": "video"}, "which shape?"), {"role": "assistant", "content": "star"}]
    text = processor.apply_chat_template([*messages, *talk("red?")], add_generation_prompt=True)
    assert text == (
        f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n"
        "<|im_start|>user\n<video>\nwhich shape?<|im_end|>\n"
        "<|im_start|>assistant\nstar<|im_end|>\n"
        "<|im_start|>user\nred?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    own = processor.apply_chat_template([{"role": "system", "content": "Be brief."}, *messages])
    assert own.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert own.endswith("star<|im_end|>\n")


def test_framed_is_the_stock_text(processor: InternVLProcessor) -> None:
    text = processor.apply_chat_template(talk({"type": "video"}, "red?"))
    inputs = processor(text=text, videos=[video(3)], return_tensors="pt")
    frames = "\n".join(f"Frame{i}: {PICTURE}" for i in (1, 2, 3))
    assert text_of(processor, inputs) == "<s>" + text.replace("<video>", frames)
    assert type(with_frame_style(processor, "framed")) is InternVLProcessor


def test_joined_has_no_text_between_frames(processor: InternVLProcessor) -> None:
    joined = with_frame_style(processor, "joined")
    text = joined.apply_chat_template(talk({"type": "video"}, "red?"), add_generation_prompt=True)
    inputs = joined(text=text, videos=[video(3)], return_tensors="pt")
    assert f"user\n{PICTURE * 3}red?<|im_end|>" in text_of(joined, inputs)
    framed = processor(text=text, videos=[video(3)], return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], framed["pixel_values"])
    assert processor.chat_template == chat_template("framed")


@pytest.mark.parametrize("style", ["framed", "joined"])
@pytest.mark.parametrize("counts", [(1,), (5,), (2, 2)])
def test_expanding_ahead_equals_the_processor(
    processor: InternVLProcessor, style: Any, counts: tuple[int, ...]
) -> None:
    chosen = with_frame_style(processor, style)
    content = [part for i in range(len(counts)) for part in ({"type": "video"}, f"and {i}?")]
    text = chosen.apply_chat_template(talk(*content), add_generation_prompt=True)
    expected = chosen(text=text, videos=[video(n) for n in counts], return_tensors="pt")
    ahead = chosen.tokenizer(expand_videos(chosen, text, counts), return_tensors="pt")
    assert torch.equal(ahead["input_ids"], expected["input_ids"])


def test_one_bos_whichever_way(processor: InternVLProcessor) -> None:
    messages = talk({"type": "video"}, "red?")
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    ids = processor(text=text, videos=[video(2)], return_tensors="pt")["input_ids"]
    assert ids[0, 0] == 1
    assert (ids == 1).sum() == 1


def test_pictures_are_prepared_as_the_tower_was_trained(processor: InternVLProcessor) -> None:
    """448-pixel squares there, 8 here; ImageNet mean and deviation."""
    white = torch.full((2, 3, 24, 40), 255, dtype=torch.uint8)
    values = processor(text="<video>", videos=[white], return_tensors="pt")["pixel_values"]
    assert values.shape == (2, 3, 8, 8)
    expected = [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    torch.testing.assert_close(values.mean((0, 2, 3)), torch.tensor(expected), atol=1e-4, rtol=0)
    tiles = processor(text="<IMG_CONTEXT>", images=[white[0]], return_tensors="pt")
    assert tiles["pixel_values"].shape[0] > 1


def test_style_is_not_saved(processor: InternVLProcessor, tmp_path: Path) -> None:
    with_frame_style(processor, "joined").save_pretrained(tmp_path / "saved")
    again = InternVLProcessor.from_pretrained(tmp_path / "saved")
    text = expand_videos(again, "<video>", [2])
    assert text == f"Frame1: {PICTURE}\nFrame2: {PICTURE}"


def test_foreign_template_is_kept(original: Path) -> None:
    processor = load_processor(original, template="{{ messages[0]['content'] }}")
    joined = with_frame_style(processor, "joined")
    assert joined.apply_chat_template([{"role": "user", "content": "hi"}]) == "hi"


def test_mistakes_are_named(processor: InternVLProcessor, original: Path) -> None:
    with pytest.raises(OptionError, match="framed, joined, got 'stacked'"):
        with_frame_style(processor, "stacked")  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="2 <video> placeholders for 1 videos"):
        expand_videos(processor, "<video><video>", [3])
    config = original / "config.json"
    for old, new, said in (
        ('"template": "internvl2_5"', '"template": "phi3-chat"', "template="),
        ('"pad2square": false', '"pad2square": true', "squares"),
    ):
        text = config.read_text()
        config.write_text(text.replace(old, new))
        with pytest.raises(UnsupportedModelError, match=said):
            load_processor(original)
        config.write_text(text)
