"""Original LLaVA-NeXT checkpoints, loaded and converted: LLaVA-Video, OneVision, Lite selectors."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map, init_empty_weights
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig

from ..core.checkpoint import Checkpoint, load_into, rename_prefix
from ..core.checkpoint_writer import write_converted
from ..core.errors import CheckpointError
from .convert_config import TOKENIZER_FILES, has_tokenizer, original_config
from .modeling import LlavaVideoConfig, LlavaVideoForConditionalGeneration
from .processing import LlavaVideoProcessor, build_processor

logger = logging.getLogger(__name__)

_KEYS = {
    "model.vision_tower.vision_tower.vision_model.": "model.vision_tower.",
    "model.mm_projector.0.": "model.multi_modal_projector.linear_1.",
    "model.mm_projector.2.": "model.multi_modal_projector.linear_2.",
    "model.embed_tokens.": "model.language_model.embed_tokens.",
    "model.layers.": "model.language_model.layers.",
    "model.norm.": "model.language_model.norm.",
}
_SELECTOR_KEYS = {
    "mm_projector.0.": "multi_modal_projector.linear_1.",
    "mm_projector.2.": "multi_modal_projector.linear_2.",
    "embed_tokens.": "language_model.embed_tokens.",
    "layers.": "language_model.layers.",
    "norm.": "language_model.norm.",
}


def load_original(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device_map: str | torch.device | Mapping[str, Any] | None = None,
    spatial_pool_mode: str | None = None,
    newline_position: str | None = None,
) -> LlavaVideoForConditionalGeneration:
    """Load a checkpoint in LLaVA-NeXT's format, converted on the fly.

    Parameters
    ----------
    source : folder, or hub id such as ``lmms-lab/LLaVA-Video-7B-Qwen2``.
    dtype : dtype of the weights; default, as stored.
    device_map : a device, ``"auto"`` to spread the model over the GPUs, or a mapping from module to
        device. Default: the CPU.
    spatial_pool_mode, newline_position : override the checkpoint's configuration; see
        `LlavaVideoConfig`. The reference evaluates LLaVA-Video with ``bilinear`` and ``grid``.

    Returns
    -------
    The model in evaluation mode, with the checkpoint's generation config.

    Raises
    ------
    CheckpointError
        The checkpoint is of another kind, incomplete, or fits no supported model.
    """
    folder = _local(source)
    checkpoint = Checkpoint(folder)
    config = original_config(
        folder, spatial_pool_mode=spatial_pool_mode, newline_position=newline_position
    )
    config.dtype = dtype or _stored_dtype(checkpoint)
    model = _skeleton(config)
    placement = _placement(model, device_map, config.dtype)
    load_into(
        model,
        checkpoint,
        convert_tensor,
        dtype=dtype,
        device=lambda name: _device_of(name, placement),
        ignored=ignored_keys(config),
        tied=tied_keys(config),
    )
    generation = _generation_config(folder)
    if generation is not None:
        model.generation_config = generation
    model.eval()
    if len(set(placement.values())) > 1:
        dispatch_model(model, device_map=dict(placement))
    return model


def convert_checkpoint(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    spatial_pool_mode: str | None = None,
    newline_position: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a checkpoint in LLaVA-NeXT's format as a transformers model with its processor.

    `flexselect.llava_video` imported, ``AutoModelForImageTextToText.from_pretrained`` and
    ``AutoProcessor.from_pretrained`` load the result. Parameters are those of `load_original` and
    `core.checkpoint_writer.write_converted`.

    Returns
    -------
    ``destination``

    Raises
    ------
    CheckpointError
        As `load_original`; or ``destination`` cannot be written.
    """
    folder = _local(source)
    checkpoint = Checkpoint(folder)
    config = original_config(
        folder, spatial_pool_mode=spatial_pool_mode, newline_position=newline_position
    )
    config.dtype = dtype or _stored_dtype(checkpoint)
    config.architectures = [LlavaVideoForConditionalGeneration.__name__]
    processor = None
    if has_tokenizer(folder):
        processor = load_processor(folder, config)
    else:
        logger.warning("%s has no tokenizer, so no processor is written.", folder)

    def finish(draft: Path) -> None:
        config.save_pretrained(draft)
        generation = _generation_config(folder)
        if generation is not None:
            generation.save_pretrained(draft)
        if processor is not None:
            processor.save_pretrained(draft)

    return write_converted(
        _skeleton(config),
        checkpoint,
        destination,
        convert_tensor,
        dtype=dtype,
        ignored=ignored_keys(config),
        tied=tied_keys(config),
        overwrite=overwrite,
        finish=finish,
        progress=progress,
    )


def load_processor(
    source: str | Path, config: LlavaVideoConfig, *, time_instruction: bool = False
) -> LlavaVideoProcessor:
    """Build the processor of an original checkpoint from the tokenizer beside it.

    Raises `CheckpointError` where there is none.
    """
    folder = _local(source)
    if not has_tokenizer(folder):
        raise CheckpointError(f"{folder} has no tokenizer ({' or '.join(TOKENIZER_FILES)}).")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Generation continues a prompt at its right end.
    tokenizer.padding_side = "left"
    return build_processor(tokenizer, config, time_instruction=time_instruction)


def convert_tensor(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """Rename one tensor of an original checkpoint; see `core.checkpoint.Convert`."""
    return [(rename_prefix(name, _KEYS), tensor)]


def selector_key(name: str) -> str:
    """Rename a parameter of a published Lite selector.

    The stored model is a Qwen2 without a head, with its own projector and newline. Here the Qwen2
    is ``language_model``, the projector ``multi_modal_projector`` as in the stock model, and the
    newline keeps its name, ``image_newline``.
    """
    return rename_prefix(name, _SELECTOR_KEYS)


def convert_selector_tensor(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """Rename one tensor of a published Lite selector; see `selector_key`."""
    return [(selector_key(name), tensor)]


def ignored_keys(config: LlavaVideoConfig) -> list[str]:
    """Name the tables that older releases stored and newer ones compute: without a use here."""
    return [
        "model.vision_tower.vision_tower.vision_model.embeddings.position_ids",
        *(
            f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
            for layer in range(config.text_config.num_hidden_layers)
        ),
    ]


def tied_keys(config: LlavaVideoConfig) -> dict[str, str]:
    """Map the parameters that share another's weight to that other."""
    if not config.tie_word_embeddings:
        return {}
    return {"lm_head.weight": "model.language_model.embed_tokens.weight"}


def _local(source: str | Path) -> Path:
    """Return the folder of a checkpoint, downloading it where ``source`` is a hub id."""
    path = Path(source)
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        return path
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors", "merges.txt"])
    )


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    return next(tensor.dtype for tensor in checkpoint.blank.values() if tensor.is_floating_point())


def _generation_config(folder: Path) -> GenerationConfig | None:
    if not (folder / "generation_config.json").is_file():
        return None
    return GenerationConfig.from_pretrained(folder)


def _skeleton(config: LlavaVideoConfig) -> LlavaVideoForConditionalGeneration:
    """Build the model with its parameters on the meta device and its unstored buffers real."""
    with init_empty_weights(include_buffers=False):
        return LlavaVideoForConditionalGeneration(config)


def _placement(
    model: LlavaVideoForConditionalGeneration, device_map: Any, dtype: torch.dtype | None
) -> dict[str, Any]:
    """Return module to device; the empty name stands for the whole model."""
    if isinstance(device_map, Mapping):
        return dict(device_map)
    if device_map != "auto":
        return {"": device_map or "cpu"}
    placement = infer_auto_device_map(
        model, no_split_module_classes=sorted(model._no_split_modules or ()), dtype=dtype
    )
    if "disk" in placement.values():
        raise CheckpointError(
            "The model fits neither the GPUs nor the host memory. Convert it, and load the result "
            "with from_pretrained and an offload folder."
        )
    return placement


def _device_of(name: str, placement: Mapping[str, Any]) -> Any:
    """Return the device of the longest module name that holds the parameter ``name``."""
    inside = [m for m in placement if not m or name == m or name.startswith(f"{m}.")]
    if not inside:
        raise CheckpointError(f"device_map has no device for {name}.")
    return placement[max(inside, key=len)]
