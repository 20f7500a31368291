"""Prompts are ``qwen_1_5`` conversations, pictures SigLIP's, placeholders as many as features."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, Qwen2Tokenizer
from transformers.video_utils import VideoMetadata

from flexselect.core.errors import PromptError
from flexselect.core.layout import NONE, Clip
from flexselect.llava_video import encode
from flexselect.llava_video.modeling import (
    LlavaVideoConfig,
    LlavaVideoForConditionalGeneration,
    frame_grid,
)
from flexselect.llava_video.processing import (
    LlavaVideoProcessor,
    build_processor,
    time_instruction,
)

from .conftest import tiny_config, tiny_model

QUESTION = [
    {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What happens?"}]}
]
PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<video>\nWhat happens?<|im_end|>\n"
    "<|im_start|>assistant\n"
)
TIMES = {"fps": 30.0, "total_num_frames": 310, "frames_indices": [0, 75, 309]}
INSTRUCTION = (
    "The video lasts for 10.33 seconds, and 3 frames are uniformly sampled from it. These frames "
    "are located at 0.00s,2.50s,10.30s.Please answer the following questions related to this video."
)


def video(frames: int, height: int = 24, width: int = 36) -> torch.Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.randint(0, 256, (frames, 3, height, width), dtype=torch.uint8, generator=generator)


@pytest.fixture
def processor(tokenizer: Qwen2Tokenizer) -> LlavaVideoProcessor:
    return build_processor(tokenizer, tiny_config())


class TestConversation:
    def test_a_question_about_a_video(self, processor: LlavaVideoProcessor) -> None:
        assert processor.apply_chat_template(QUESTION, add_generation_prompt=True) == PROMPT

    def test_turns_a_system_prompt_and_plain_text(self, processor: LlavaVideoProcessor) -> None:
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": [{"type": "text", "text": "Hi"}]},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Compare "},
                    {"type": "image"},
                    {"type": "video"},
                    {"type": "text", "text": "please."},
                ],
            },
        ]
        assert processor.apply_chat_template(messages) == (
            "<|im_start|>system\nBe brief.<|im_end|>\n"
            "<|im_start|>user\nHello<|im_end|>\n"
            "<|im_start|>assistant\nHi<|im_end|>\n"
            "<|im_start|>user\nCompare <image><video>\nplease.<|im_end|>\n"
        )


class TestPlaceholders:
    @pytest.mark.parametrize("mode", ["bilinear", "average", "max"])
    @pytest.mark.parametrize("position", ["grid", "frame", "one_token", "no_token"])
    def test_as_many_as_the_model_puts_in(
        self, tokenizer: Qwen2Tokenizer, mode: str, position: str
    ) -> None:
        packing = {"spatial_pool_mode": mode, "newline_position": position}
        model = tiny_model(**packing)
        processor = build_processor(tokenizer, model.config)
        model.config.video_token_index = processor.video_token_id
        inputs = processor(text=PROMPT, videos=[video(3)], return_tensors="pt")
        count = int((inputs["input_ids"] == processor.video_token_id).sum())
        with torch.no_grad():
            features = model.get_video_features(inputs["pixel_values_videos"]).pooler_output
            assert features.shape[1] == count
            assert model(**inputs).logits.isfinite().all()

    def test_the_real_frame_is_210_tokens(self, tokenizer: Qwen2Tokenizer) -> None:
        processor = build_processor(tokenizer, LlavaVideoConfig())
        inputs = processor(text=PROMPT, videos=[video(2)], return_tensors="pt")
        assert int((inputs["input_ids"] == processor.video_token_id).sum()) == 2 * 210
        assert inputs["pixel_values_videos"].shape == (1, 2, 3, 384, 384)

    def test_videos_of_different_lengths_stay_apart(self, processor: LlavaVideoProcessor) -> None:
        inputs = processor(
            text=[PROMPT, PROMPT],
            videos=[[video(2)], [video(3)]],
            padding=True,
            return_tensors="pt",
        )
        assert [v.shape for v in inputs["pixel_values_videos"]] == [(2, 3, 20, 20), (3, 3, 20, 20)]
        tokens = (inputs["input_ids"] == processor.video_token_id).sum(-1)
        assert tokens.tolist() == [2 * 12, 3 * 12]
        inputs = inputs.to(torch.bfloat16)
        assert {v.dtype for v in inputs["pixel_values_videos"]} == {torch.bfloat16}

    def test_a_padded_batch_answers_as_one_at_a_time(self, tokenizer: Qwen2Tokenizer) -> None:
        model = tiny_model()
        tokenizer.padding_side = "left"
        processor = build_processor(tokenizer, model.config)
        model.config.video_token_index = processor.video_token_id
        clips = [video(2), video(3)]

        def answer(text: list[str], videos: list[Any]) -> list[list[int]]:
            inputs = processor(text=text, videos=videos, padding=True, return_tensors="pt")
            out = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
            return out[:, inputs["input_ids"].shape[1] :].tolist()

        together = answer([PROMPT, PROMPT], [[clip] for clip in clips])
        assert together == [answer([PROMPT], [[clip]])[0] for clip in clips]

    def test_an_image_takes_the_stock_path(self, tokenizer: Qwen2Tokenizer) -> None:
        model: LlavaVideoForConditionalGeneration = tiny_model()
        processor = build_processor(tokenizer, model.config)
        model.config.image_token_index = processor.image_token_id
        inputs = processor(
            text=PROMPT.replace("video", "image"), images=video(1)[0], return_tensors="pt"
        )
        with torch.no_grad():
            assert model(**inputs).logits.isfinite().all()


class TestPictures:
    def test_are_what_pillow_makes_of_them(self, processor: LlavaVideoProcessor) -> None:
        """Resized without cropping, bicubic, at most one grey level off, and scaled to [-1, 1]."""
        pictures = video(2, 70, 110)
        inputs = processor(text=PROMPT, videos=[pictures], return_tensors="pt")
        for picture, values in zip(pictures, inputs["pixel_values_videos"][0], strict=True):
            image = Image.fromarray(picture.permute(1, 2, 0).numpy())
            resized = np.asarray(image.resize((20, 20), Image.Resampling.BICUBIC))
            expected = torch.from_numpy(resized.copy()).permute(2, 0, 1) / 127.5 - 1
            assert float((values - expected).abs().max()) <= 1.001 / 127.5

    def test_frames_are_never_sampled_again(self, processor: LlavaVideoProcessor) -> None:
        inputs = processor(
            text=PROMPT,
            videos=[video(3)],
            video_metadata=[TIMES],
            do_sample_frames=False,
            return_tensors="pt",
        )
        assert inputs["pixel_values_videos"].shape[1] == 3


class TestTimes:
    def test_the_instruction_follows_the_placeholder(self, processor: LlavaVideoProcessor) -> None:
        inputs = processor(
            text=PROMPT, videos=[video(3)], video_metadata=[TIMES], time_instruction=True
        )
        text = processor.tokenizer.decode(inputs["input_ids"][0])
        assert text == PROMPT.replace("<video>", "<video>" * 36 + "\n" + INSTRUCTION)

    def test_a_saved_setting_applies_and_a_call_overrides_it(
        self, processor: LlavaVideoProcessor
    ) -> None:
        processor.time_instruction = True
        call: dict[str, Any] = {
            "text": PROMPT,
            "videos": [video(3)],
            "video_metadata": VideoMetadata(**TIMES),
        }
        with_times = processor(**call)["input_ids"][0]
        without = processor(**call, time_instruction=False)["input_ids"][0]
        assert len(with_times) > len(without)
        # A prompt without a video needs no times.
        processor(text="<|im_start|>user\nHello<|im_end|>\n")

    def test_each_video_has_its_own_times(self, processor: LlavaVideoProcessor) -> None:
        other = {"fps": 1.0, "total_num_frames": 2, "frames_indices": [1]}
        inputs = processor(
            text=["<video><video>\nCompare.", "<video>\nWhat?"],
            videos=[[video(3), video(1)], [video(1)]],
            video_metadata=[[TIMES, other], [other]],
            time_instruction=True,
        )
        decoded = [processor.tokenizer.decode(ids) for ids in inputs["input_ids"]]
        second = time_instruction(other)
        assert "2.00 seconds, and 1 frames" in second
        first, last = "<video>" * 36, "<video>" * 12
        assert decoded == [
            f"{first}\n{INSTRUCTION}\n{last}\n{second}\nCompare.",
            f"{last}\n{second}\nWhat?",
        ]

    @pytest.mark.parametrize(
        "metadata",
        [None, [TIMES, TIMES], TIMES | {"fps": None}, TIMES | {"frames_indices": None}],
    )
    def test_unknown_times_are_refused(self, processor: LlavaVideoProcessor, metadata: Any) -> None:
        with pytest.raises(PromptError, match="video_metadata"):
            processor(
                text=PROMPT, videos=[video(3)], video_metadata=metadata, time_instruction=True
            )


def test_saved_and_loaded_by_auto_processor(tokenizer: Qwen2Tokenizer, tmp_path: Path) -> None:
    config = tiny_config(spatial_pool_mode="average", newline_position="frame")
    processor = build_processor(tokenizer, config, time_instruction=True)
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is LlavaVideoProcessor
    call: dict[str, Any] = {"text": PROMPT, "videos": [video(3)], "video_metadata": [TIMES]}
    expected, actual = (p(**call, return_tensors="pt") for p in (processor, loaded))
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    assert loaded.apply_chat_template(QUESTION, add_generation_prompt=True) == PROMPT


@pytest.mark.parametrize(
    ("position", "cells"),
    [
        ("grid", [0, 1, NONE, 2, 3, NONE]),
        ("frame", [0, 1, 2, 3, NONE]),
        ("one_token", [0, 1, 2, 3]),
        ("no_token", [0, 1, 2, 3]),
    ],
)
def test_newlines_show_no_part_of_a_picture(position: str, cells: list[int]) -> None:
    rows, columns = frame_grid(4, "bilinear", 2, position)
    grid = encode.frame_grid(Clip(3, rows, columns), SimpleNamespace(newline_position=position))
    assert (grid.rows, grid.columns, grid.cells.tolist()) == (2, 2, cells)
