"""A tiny tokenizer of Qwen2's kind, tiny models, and the golden cases of LLaVA-Video."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import Qwen2Tokenizer

from flexselect.llava_video.modeling import LlavaVideoConfig, LlavaVideoForConditionalGeneration
from tests.paths import FIXTURES

CASES = ["a_single", "b_multi_seed0", "c_budget_ge_total"]


@dataclass
class Golden:
    """One golden case: its folder, inputs, and what the reference made of them."""

    folder: Path
    inputs: dict[str, Tensor]
    expected: dict[str, Tensor]

    @property
    def placeholder(self) -> int:
        """Position of the one placeholder of the video in the prompt."""
        return int((self.inputs["input_ids"][0] == 151646).nonzero())

    def around(self, embed: Any) -> tuple[Tensor, Tensor]:
        """Embed the text before and after the video."""
        ids = self.inputs["input_ids"][0]
        return embed(ids[: self.placeholder]), embed(ids[self.placeholder + 1 :])


@pytest.fixture(params=CASES)
def golden(request: pytest.FixtureRequest) -> Golden:
    folder = FIXTURES / "llava_video" / request.param
    if not folder.is_dir():
        pytest.skip(f"no golden data at {folder}; set FLEXSELECT_SHARED")
    inputs, expected = (
        load_file(folder / f"{name}.safetensors") for name in ("inputs", "expected")
    )
    return Golden(folder, inputs, expected)


@pytest.fixture
def tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE with the special tokens of Qwen2 and no placeholder."""
    text = "system user assistant You are a helpful assistant. What happens? The video lasts for"
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = byte_level
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trained.train_from_iterator(
        [text],
        trainers.BpeTrainer(
            vocab_size=300,
            initial_alphabet=byte_level.alphabet(),
            special_tokens=specials,
            show_progress=False,
        ),
    )
    model = json.loads(trained.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        additional_special_tokens=specials[1:],
    )


def tiny_config(**changes: Any) -> LlavaVideoConfig:
    """Configure a model of 5 × 5 patches: 3 × 3 pooled, 12 tokens a frame."""
    fields: dict[str, Any] = {
        "text_config": {
            "model_type": "qwen2",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "vocab_size": 400,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "image_size": 20,
            "patch_size": 4,
            "vision_use_head": False,
        },
        "image_token_index": 398,
        "video_token_index": 399,
        "image_grid_pinpoints": [[20, 20], [20, 40], [40, 20], [40, 40]],
    }
    return LlavaVideoConfig(**(fields | changes))


def tiny_model(**changes: Any) -> LlavaVideoForConditionalGeneration:
    """Build a tiny model with weights large enough that every part of the input matters."""
    torch.manual_seed(0)
    model = LlavaVideoForConditionalGeneration(tiny_config(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    return model


def prompt(model: LlavaVideoForConditionalGeneration, *frames: int) -> Tensor:
    """Return ids of a prompt with a video of each length, with text around and between them."""
    ids = [5, 6]
    rows, columns = model.config.frame_grid
    for i, count in enumerate(frames):
        tail = int(model.config.newline_position == "one_token")
        ids += [model.config.video_token_index] * (count * rows * columns + tail) + [7 + i]
    return torch.tensor([[*ids, 20, 21]])
