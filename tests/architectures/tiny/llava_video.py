"""A tiny LLaVA-Video: real processor, a newline after every row of pooled patches."""

from __future__ import annotations

from typing import Any

from flexselect.llava_video.modeling import LlavaVideoConfig, LlavaVideoForConditionalGeneration
from flexselect.llava_video.processing import build_processor
from flexselect.llava_video.selector import LlavaVideoSelector, LlavaVideoSelectorConfig

from .common import byte_tokenizer, draw_weights

VISION = {"image_token": "<image>", "video_token": "<video>"}
PATCH = 4
# Pictures are squares of 5 x 5 patches, pooled to 3 x 3: 3 x (3 + 1) visual tokens a frame.
HEIGHT, WIDTH = 20, 20
# Images are cut into two tiles, beside the whole of them.
IMAGE_HEIGHT, IMAGE_WIDTH = 20, 40
OTHER_TOWER = {"vision_hidden_size": 40}


def processor() -> Any:
    return build_processor(byte_tokenizer(VISION), config(None, {}))


def process(processor: Any, **arguments: Any) -> dict[str, Any]:
    return dict(processor(padding=True, return_tensors="pt", **arguments))


def model(tokenizer: Any, seed: int, **overrides: Any) -> Any:
    return model_of(config(tokenizer, overrides), tokenizer, seed)


def model_of(config: LlavaVideoConfig, tokenizer: Any, seed: int) -> Any:
    """Build a model of another kind of packing; see `config`."""
    built = draw_weights(LlavaVideoForConditionalGeneration(config), seed)
    built.generation_config.pad_token_id = tokenizer.pad_token_id
    return built


def config(tokenizer: Any | None, overrides: dict[str, Any], **packing: Any) -> LlavaVideoConfig:
    """Configure a model; without a tokenizer, as much as the processor must know."""
    ids = {}
    if tokenizer is not None:
        ids = {
            "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
            "video_token_index": tokenizer.convert_tokens_to_ids("<video>"),
        }
    vocabulary = 1 if tokenizer is None else len(tokenizer)
    return LlavaVideoConfig(
        text_config={
            "model_type": "qwen2",
            **text_config(vocabulary, {"hidden_size": 64, **overrides}),
        },
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "image_size": HEIGHT,
            "patch_size": PATCH,
            "vision_use_head": False,
        },
        image_grid_pinpoints=[[20, 20], [20, 40], [40, 20], [40, 40]],
        tie_word_embeddings=False,
        **ids,
        **packing,
    )


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
    fields = {
        "vision_hidden_size": model.config.vision_config.hidden_size,
        "video_token_id": model.config.video_token_id,
        **overrides,
    }
    config = LlavaVideoSelectorConfig(
        text_config=text_config(model.config.text_config.vocab_size, small), **fields
    )
    return draw_weights(LlavaVideoSelector(config), seed)
