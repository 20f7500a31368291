"""An original checkpoint's configuration and keys in the stock model's terms, as pure functions.

The original model is InternViT with a fused ``qkv``, the two-layer ``mlp1`` and InternLM2 (fused
``wqkv``), Llama, Qwen2 or Qwen3. InternLM2 computes what Llama does, so it becomes a ``llama`` text
model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from ..core.checkpoint import read_json
from ..core.errors import CheckpointError, OptionError, UnsupportedModelError

#: ``model_type`` of an original checkpoint's config.json.
ORIGINAL = "internvl_chat"

#: Id of ``<IMG_CONTEXT>`` in every released checkpoint with InternLM2; others store it.
_INTERNLM2_IMAGE_TOKEN = 92546

_TEXT_CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "internlm2": LlamaConfig,
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
_TEXT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "attention_bias",
    "attention_dropout",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "use_sliding_window",
    "sliding_window",
    "max_window_layers",
)
_VISION_FIELDS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_channels": "num_channels",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "hidden_act": "hidden_act",
    "norm_type": "norm_type",
    "layer_norm_eps": "layer_norm_eps",
    "qkv_bias": "attention_bias",
    "qk_normalization": "use_qk_norm",
    "attention_dropout": "attention_dropout",
    "dropout": "projection_dropout",
    "initializer_factor": "layer_scale_init_value",
    "initializer_range": "initializer_range",
}

_VISION = {
    "embeddings.class_embedding": "embeddings.cls_token",
    "embeddings.position_embedding": "embeddings.position_embeddings",
    "embeddings.patch_embedding.weight": "embeddings.patch_embeddings.projection.weight",
    "embeddings.patch_embedding.bias": "embeddings.patch_embeddings.projection.bias",
}
_VISION_LAYER = {
    "ls1": "lambda_1",
    "ls2": "lambda_2",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.projection_layer",
    "attn.q_norm": "attention.q_norm",
    "attn.k_norm": "attention.k_norm",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_PROJECTOR = {"0": "layer_norm", "1": "linear_1", "3": "linear_2"}
_INTERNLM2 = {"tok_embeddings": "embed_tokens"}
_INTERNLM2_LAYER = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
}


def is_original(folder: str | Path) -> bool:
    """Whether a folder holds a checkpoint in OpenGVLab's layout."""
    path = Path(folder) / "config.json"
    return path.is_file() and read_json(path).get("model_type") == ORIGINAL


# -- configuration -----------------------------------------------------------------------------


def convert_config(
    original: Mapping[str, Any], *, image_token_id: int | None = None
) -> InternVLConfig:
    """Translate an original checkpoint's config.json.

    Parameters
    ----------
    original : the JSON object.
    image_token_id : id of ``<IMG_CONTEXT>``. The original keeps it in its tokenizer only, so it
        may be left out where the language model is InternLM2 with the released vocabulary.

    Raises
    ------
    UnsupportedModelError
        Not an original InternVL checkpoint, or one that no stock class computes.
    OptionError
        ``image_token_id`` is needed.
    """
    if original.get("model_type") != ORIGINAL:
        raise UnsupportedModelError(
            f"Expected model_type {ORIGINAL} in config.json, got {original.get('model_type')!r}. "
            "A checkpoint with model_type internvl is in the stock layout: load it with "
            "InternVLForConditionalGeneration.from_pretrained."
        )
    if original.get("ps_version") != "v2":
        raise UnsupportedModelError(
            f"ps_version is {original.get('ps_version')!r}; the stock pixel shuffle is v2 only. "
            "Use InternVL 1.5 or later."
        )
    text = convert_text_config(original["llm_config"])
    if image_token_id is None:
        if (
            original["llm_config"].get("model_type") != "internlm2"
            or text.vocab_size <= _INTERNLM2_IMAGE_TOKEN
        ):
            raise OptionError(
                "config.json does not say which id <IMG_CONTEXT> has, and it is the released one "
                "only for InternLM2. Pass image_token_id, or keep the tokenizer files beside it."
            )
        image_token_id = _INTERNLM2_IMAGE_TOKEN
    if not 0 <= image_token_id < text.vocab_size:
        raise OptionError(
            f"image_token_id must be below the vocabulary size {text.vocab_size}, got "
            f"{image_token_id}."
        )
    vision = _vision_config(original["vision_config"])
    ratio = original.get("downsample_ratio", 0.5)
    side = original.get("force_image_size") or vision.image_size[0]
    return InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=image_token_id,
        image_seq_length=int((side // vision.patch_size[0]) ** 2 * ratio**2),
        downsample_ratio=ratio,
        vision_feature_layer=original.get("select_layer", -1),
        tie_word_embeddings=text.tie_word_embeddings,
        architectures=[InternVLForConditionalGeneration.__name__],
    )


def convert_text_config(original: Mapping[str, Any]) -> PreTrainedConfig:
    """Translate ``llm_config``, or the flat config.json of a published Lite selector (I10).

    Dynamic-NTK rope becomes the stock one: the same frequencies for a sequence that a fresh model
    sees. Up to ``max_position_embeddings`` positions it is the plain rope.

    Raises
    ------
    UnsupportedModelError
        The language model is none of InternLM2, Llama, Qwen2 and Qwen3.
    """
    original = original.get("llm_config", original)
    kind = original.get("model_type")
    if kind not in _TEXT_CONFIGS:
        raise UnsupportedModelError(
            f"The language model has model_type {kind!r}; expected one of "
            f"{', '.join(_TEXT_CONFIGS)}."
        )
    rope = dict(original.get("rope_scaling") or {})
    rope_type = rope.pop("type", "default")
    rope.setdefault("rope_type", rope_type)
    rope["rope_theta"] = float(original.get("rope_theta", 10000.0))
    fields = {name: original[name] for name in _TEXT_FIELDS if original.get(name) is not None}
    if kind == "internlm2":
        fields["attention_bias"] = bool(original.get("bias", False))
    return _TEXT_CONFIGS[kind](
        **fields,
        rope_parameters=rope,
        tie_word_embeddings=bool(original.get("tie_word_embeddings", False)),
    )


def _vision_config(original: Mapping[str, Any]) -> InternVLVisionConfig:
    config = InternVLVisionConfig(
        **{new: original[old] for old, new in _VISION_FIELDS.items() if old in original}
    )
    if config.use_qk_norm and config.layer_norm_eps != 1e-6:
        raise UnsupportedModelError(
            f"qk_normalization with layer_norm_eps {config.layer_norm_eps} has no stock class: it "
            "normalises queries and keys with 1e-6."
        )
    return config


# -- keys --------------------------------------------------------------------------------------


def convert_tensor(
    name: str, tensor: Tensor, text_config: PreTrainedConfig
) -> list[tuple[str, Tensor]]:
    """Turn one stored tensor of an original checkpoint into the stock model's.

    Parameters
    ----------
    name, tensor : as stored; the tensor may be on the meta device.
    text_config : of the converted language model; its heads say how ``wqkv`` is cut.

    Returns
    -------
    (parameter, tensor) pairs, three for a fused projection. A name that no original checkpoint has
    is returned unchanged, and so fits no parameter.
    """
    if name.startswith("vision_model."):
        return _vision_tensor(name, tensor)
    if name.startswith("mlp1."):
        return [(_projector_key(name, "model.multi_modal_projector"), tensor)]
    for head in ("language_model.output.", "language_model.lm_head."):
        if name.startswith(head):
            return [(f"lm_head.{name[len(head) :]}", tensor)]
    return _text_tensor(name, tensor, text_config, "model.language_model")


def selector_tensor(
    name: str, tensor: Tensor, text_config: PreTrainedConfig
) -> list[tuple[str, Tensor]]:
    """Turn one stored tensor of a published Lite selector into ours.

    The text model goes to ``language_model.*`` and ``mlp1`` to ``projector.*``, which has the
    layers of the stock projector; parameters as in `convert_tensor`.
    """
    if name.startswith("mlp1."):
        return [(_projector_key(name, "projector"), tensor)]
    return _text_tensor(name, tensor, text_config, "language_model")


def tied_keys(config: InternVLConfig) -> dict[str, str]:
    """Map the parameters that share another's weight to that other."""
    if not config.tie_word_embeddings:
        return {}
    return {"lm_head.weight": "model.language_model.embed_tokens.weight"}


def _vision_tensor(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    rest = name.removeprefix("vision_model.")
    if rest in _VISION:
        return [(f"model.vision_tower.{_VISION[rest]}", tensor)]
    number, _, part = rest.removeprefix("encoder.layers.").partition(".")
    layer = f"model.vision_tower.encoder.layer.{number}"
    module, _, leaf = part.rpartition(".")
    if module == "attn.qkv":
        return [
            (f"{layer}.attention.{which}_proj.{leaf}", third)
            for which, third in zip("qkv", tensor.tensor_split(3), strict=True)
        ]
    if part in _VISION_LAYER:
        return [(f"{layer}.{_VISION_LAYER[part]}", tensor)]
    if module in _VISION_LAYER:
        return [(f"{layer}.{_VISION_LAYER[module]}.{leaf}", tensor)]
    return [(name, tensor)]


def _projector_key(name: str, prefix: str) -> str:
    _, number, leaf = name.split(".", 2)
    return f"{prefix}.{_PROJECTOR[number]}.{leaf}" if number in _PROJECTOR else name


def _text_tensor(
    name: str, tensor: Tensor, config: PreTrainedConfig, prefix: str
) -> list[tuple[str, Tensor]]:
    root = "language_model.model."
    if not name.startswith(root):
        return [(name, tensor)]
    rest = name.removeprefix(root)
    head, _, leaf = rest.rpartition(".")
    if head in _INTERNLM2:
        return [(f"{prefix}.{_INTERNLM2[head]}.{leaf}", tensor)]
    if not head.startswith("layers."):
        return [(f"{prefix}.{rest}", tensor)]
    _, number, module = head.split(".", 2)
    layer = f"{prefix}.layers.{number}"
    if module == "attention.wqkv":
        parts = zip("qkv", _split_wqkv(name, tensor, config), strict=True)
        return [(f"{layer}.self_attn.{which}_proj.{leaf}", part) for which, part in parts]
    return [(f"{layer}.{_INTERNLM2_LAYER.get(module, module)}.{leaf}", tensor)]


def _split_wqkv(name: str, fused: Tensor, config: PreTrainedConfig) -> tuple[Tensor, ...]:
    """Cut InternLM2's projection ``(kv heads × (groups + 2) × head_dim, …)`` into q, k and v.

    Each key-value head's rows are those of its query heads, then its key, then its value (I9).
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = config.hidden_size // heads
    rows = (heads + 2 * kv_heads) * head_dim
    if len(fused) != rows:
        raise CheckpointError(
            f"{name} has {len(fused)} rows; {heads} heads and {kv_heads} key-value heads of "
            f"{head_dim} in config.json make {rows}."
        )
    cut = fused.unflatten(0, (kv_heads, heads // kv_heads + 2, head_dim))
    query, key, value = cut.split([heads // kv_heads, 1, 1], dim=1)
    return query.flatten(0, 2), key.flatten(0, 2), value.flatten(0, 2)
