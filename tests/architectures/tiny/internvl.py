"""A tiny InternVL: stock classes, real processor, every frame between tags and behind a label."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
)

from flexselect.internvl.selector import InternVLSelector, InternVLSelectorConfig

from .common import byte_tokenizer, chat_template, draw_weights

VISION = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
PATCH = 4
# Pictures are squares of 6 x 6 patches, shuffled to 3 x 3: with the tags 11 visual tokens a frame.
HEIGHT, WIDTH = 24, 24
# Images are cut into two tiles, beside the whole of them.
IMAGE_HEIGHT, IMAGE_WIDTH = 24, 48
OTHER_TOWER = {"vision_hidden_size": 40}


def processor() -> Any:
    size = {"size": {"height": HEIGHT, "width": WIDTH}}
    return InternVLProcessor(
        GotOcr2ImageProcessor(**size, crop_to_patches=True, min_patches=1, max_patches=4),
        byte_tokenizer(VISION),
        InternVLVideoProcessor(**size),
        image_seq_length=9,
        chat_template=chat_template(image="<IMG_CONTEXT>\n", video="<video>\n"),
    )


def process(
    processor: Any,
    text: list[str],
    images: list[Tensor] | None = None,
    videos: list[Tensor] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Run the processor on each video by itself, as it takes no two of different length."""
    options.pop("video_metadata", None)
    waiting_images, waiting_videos = iter(images or []), iter(videos or [])
    rows, pixels = [], []
    for prompt in text:
        row = []
        # Cut after a video, so that every piece has one video at most.
        for piece in re.findall(".*?<video>|.+$", prompt, re.DOTALL):
            own = {
                "images": [next(waiting_images) for _ in range(piece.count("<IMG_CONTEXT>"))],
                "videos": [next(waiting_videos) for _ in range(piece.count("<video>"))],
            }
            given = {name: pictures for name, pictures in own.items() if pictures}
            out = processor(text=piece, return_tensors="pt", **given, **options)
            row.append(out["input_ids"][0])
            pixels += [out["pixel_values"]] if given else []
        rows.append(torch.cat(row))
    padded = processor.tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    return {**padded, **({"pixel_values": torch.cat(pixels)} if pixels else {})}


def model(tokenizer: Any, seed: int, **overrides: Any) -> Any:
    config = InternVLConfig(
        text_config={
            "model_type": "qwen2",
            **text_config(len(tokenizer), {"hidden_size": 64, **overrides}),
        },
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "image_size": [HEIGHT, WIDTH],
            "patch_size": [PATCH, PATCH],
            "attention_bias": True,
            "layer_scale_init_value": 1.0,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=9,
        tie_word_embeddings=False,
    )
    built = draw_weights(InternVLForConditionalGeneration(config), seed)
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
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **overrides,
    }


def selector(model: Any, seed: int, **overrides: Any) -> Any:
    small = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6}
    vision = model.config.vision_config
    fields = {"vision_hidden_size": 4 * vision.hidden_size, **overrides}
    config = InternVLSelectorConfig(
        text_config=text_config(model.config.text_config.vocab_size, small), **fields
    )
    return draw_weights(InternVLSelector(config), seed)
