"""Sizes of the models that a benchmark makes: the published ones, and small ones in proportion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """Sizes of a family's model and selector.

    Attributes
    ----------
    text, vision, selector : sizes of the language model, the tower and the selector, by the names
        of transformers' configs.
    side : height and width of a picture, in pixels.
    layer : reference layer.
    budget : visual tokens that stay.
    frames_per_set : most frames of a set.
    """

    text: dict[str, Any]
    vision: dict[str, Any]
    selector: dict[str, Any]
    side: int
    layer: int
    budget: int
    frames_per_set: int = 64


_QWEN_7B = {
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
}
_QWEN_SMALL = {
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 2688,
    "vocab_size": 2048,
}
_SELECTOR_HALF_B = {
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 151936,
}
_SELECTOR_SMALL = {
    "hidden_size": 128,
    "num_hidden_layers": 7,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 704,
    "vocab_size": 2048,
}
_INTERNLM = {**_QWEN_7B, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
_INTERNLM |= {"num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 92553}
_INTERNLM_SMALL = {**_QWEN_SMALL, "intermediate_size": 1792}

#: Layers and budgets are the published ones; a small model's, at the same depth and share.
SIZES: dict[tuple[str, str], Shape] = {
    ("qwen2_5_vl", "7b"): Shape(
        text=_QWEN_7B,
        vision={
            "hidden_size": 1280,
            "depth": 32,
            "num_heads": 16,
            "intermediate_size": 3420,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        selector=_SELECTOR_HALF_B,
        side=392,
        layer=20,
        budget=7040,
    ),
    ("qwen2_5_vl", "small"): Shape(
        text=_QWEN_SMALL,
        vision={
            "hidden_size": 192,
            "depth": 8,
            "num_heads": 3,
            "intermediate_size": 512,
            "window_size": 56,
            "fullatt_block_indexes": [3, 7],
        },
        selector=_SELECTOR_SMALL,
        side=112,
        layer=5,
        budget=512,
    ),
    ("llava_video", "7b"): Shape(
        text=_QWEN_7B,
        vision={
            "hidden_size": 1152,
            "num_hidden_layers": 26,
            "num_attention_heads": 16,
            "intermediate_size": 4304,
        },
        selector=_SELECTOR_HALF_B,
        side=384,
        layer=19,
        budget=6720,
    ),
    ("llava_video", "small"): Shape(
        text=_QWEN_SMALL,
        vision={
            "hidden_size": 192,
            "num_hidden_layers": 8,
            "num_attention_heads": 3,
            "intermediate_size": 640,
        },
        selector=_SELECTOR_SMALL,
        side=112,
        layer=5,
        budget=640,
    ),
    ("internvl", "7b"): Shape(
        text=_INTERNLM,
        vision={
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
        },
        selector={**_SELECTOR_HALF_B, "vocab_size": 151674},
        side=448,
        layer=15,
        budget=8256,
    ),
    ("internvl", "small"): Shape(
        text=_INTERNLM_SMALL,
        vision={
            "hidden_size": 192,
            "num_hidden_layers": 8,
            "num_attention_heads": 3,
            "intermediate_size": 768,
        },
        selector=_SELECTOR_SMALL,
        side=112,
        layer=4,
        budget=576,
    ),
}
