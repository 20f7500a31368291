"""A tiny Qwen2.5-VL: stock classes, real processor, several attention windows in the tower."""

from __future__ import annotations

from typing import Any

from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from flexselect.qwen2_5_vl.selector import Qwen2_5_VLSelector, Qwen2_5_VLSelectorConfig

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
    # Pictures of 24 x 32 pixels stay as they are: 3 x 4 visual tokens.
    sizes = {
        "size": {"shortest_edge": HEIGHT * WIDTH, "longest_edge": HEIGHT * WIDTH},
        "patch_size": PATCH,
    }
    return Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**sizes),
        byte_tokenizer(VISION),
        Qwen2VLVideoProcessor(**sizes, cap_pixels_per_frame=False),
        chat_template=chat_template(
            image="<|vision_start|><|image_pad|><|vision_end|>",
            video="<|vision_start|><|video_pad|><|vision_end|>",
        ),
    )


def process(processor: Any, **arguments: Any) -> dict[str, Any]:
    return dict(processor(padding=True, return_tensors="pt", **arguments))


def model(tokenizer: Any, seed: int, **overrides: Any) -> Any:
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in VISION.values()}
    config = Qwen2_5_VLConfig(
        text_config=text_config(len(tokenizer), {"hidden_size": 64, **overrides}),
        # A window is 2 x 2 visual tokens, a frame 3 x 4: four windows, two of them cut.
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": PATCH,
            "spatial_patch_size": PATCH,
            "window_size": 4 * PATCH,
            "fullatt_block_indexes": [1],
            "out_hidden_size": overrides.get("hidden_size", 64),
            "tokens_per_second": 2,
        },
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
    )
    built = draw_weights(Qwen2_5_VLForConditionalGeneration(config), seed)
    built.generation_config.pad_token_id = tokenizer.pad_token_id
    return built


def text_config(vocabulary: int, overrides: dict[str, Any]) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "use_sliding_window": False,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [2, 3, 3],
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
        "rope_parameters": rope,
    }
    vision = model.config.vision_config
    fields = {
        "vision_hidden_size": vision.hidden_size,
        "tokens_per_second": vision.tokens_per_second,
        **overrides,
    }
    config = Qwen2_5_VLSelectorConfig(
        text_config=text_config(model.config.text_config.vocab_size, small), **fields
    )
    return draw_weights(Qwen2_5_VLSelector(config), seed)
