"""A tiny Qwen3-VL: stock classes, real processor, two levels of the tower added in the decoder."""

from __future__ import annotations

from typing import Any

from transformers import (
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from flexselect.qwen3_vl.selector import Qwen3VLSelector, Qwen3VLSelectorConfig

from .common import byte_tokenizer, chat_template, draw_weights

VISION = {
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
}
PATCH = 4
HEIGHT, WIDTH = 24, 32
IMAGE_HEIGHT, IMAGE_WIDTH = HEIGHT, WIDTH
OTHER_TOWER = {"vision_hidden_size": 40}


def processor() -> Any:
    # Pictures of 24 x 32 pixels stay as they are, however many: 3 x 4 visual tokens.
    image = {"shortest_edge": HEIGHT * WIDTH, "longest_edge": HEIGHT * WIDTH}
    video = {"shortest_edge": HEIGHT * WIDTH, "longest_edge": 1000 * HEIGHT * WIDTH}
    return Qwen3VLProcessor(
        Qwen2VLImageProcessor(size=image, patch_size=PATCH),
        byte_tokenizer(VISION),
        Qwen3VLVideoProcessor(size=video, patch_size=PATCH, cap_pixels_per_frame=False),
        chat_template=chat_template(
            image="<|vision_start|><|image_pad|><|vision_end|>",
            video="<|vision_start|><|video_pad|><|vision_end|>",
        ),
    )


def process(processor: Any, **arguments: Any) -> dict[str, Any]:
    return dict(processor(padding=True, return_tensors="pt", **arguments))


def model(tokenizer: Any, seed: int, **overrides: Any) -> Any:
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in VISION.values()}
    config = Qwen3VLConfig(
        text_config=text_config(len(tokenizer), {"hidden_size": 64, **overrides}),
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": PATCH,
            "num_position_embeddings": 16,
            "out_hidden_size": overrides.get("hidden_size", 64),
            # Added after layers 0 and 1, so that the suite's reference layer, 2, sees both.
            "deepstack_visual_indexes": [0, 1],
        },
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
    )
    built = draw_weights(Qwen3VLForConditionalGeneration(config), seed)
    built.generation_config.pad_token_id = tokenizer.pad_token_id
    return built


def text_config(vocabulary: int, overrides: dict[str, Any]) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
        },
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **overrides,
    }


def selector(model: Any, seed: int, **overrides: Any) -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    small = {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "head_dim": 8,
        "rope_parameters": rope,
    }
    fields = {"vision_hidden_size": model.config.vision_config.hidden_size, **overrides}
    config = Qwen3VLSelectorConfig(
        text_config=text_config(model.config.text_config.vocab_size, small), **fields
    )
    return draw_weights(Qwen3VLSelector(config), seed)
