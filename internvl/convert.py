"""Original OpenGVLab checkpoints, loaded as the stock model or written as a stock checkpoint.

Checkpoints that end in ``-hf`` are in the stock layout already and need none of this.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map
from transformers import (
    GenerationConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
)

from ..core.checkpoint import Checkpoint, load_into, read_json, some
from ..core.checkpoint_writer import write_converted
from ..core.errors import OptionError, UnsupportedModelError
from ..core.hub import local_folder
from .original import (
    convert_config,
    convert_tensor,
    convert_text_config,
    selector_tensor,
)
from .processing import build_processor
from .tokenization import IMAGE_TOKENS, added_tokens, load_tokenizer

__all__ = [
    "convert_checkpoint",
    "convert_config",
    "convert_tensor",
    "convert_text_config",
    "load_original",
    "load_processor",
    "selector_tensor",
]

logger = logging.getLogger(__name__)

#: Ends a turn of every conversation InternVL was trained on, and so an answer.
_TURN_END = "<|im_end|>"

DeviceMap = str | int | torch.device | Mapping[str, str | int | torch.device]


def load_original(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device_map: DeviceMap | None = None,
    attn_implementation: str | None = None,
    image_token_id: int | None = None,
) -> InternVLForConditionalGeneration:
    """Load an original checkpoint as the stock model, streaming it shard by shard.

    Parameters
    ----------
    path : folder with config.json and safetensors, or hub id such as
        ``OpenGVLab/InternVL2_5-8B``.
    dtype : of the parameters; default, as stored.
    device_map : a device, ``"auto"``, or module name to device, as in ``from_pretrained``; default,
        the CPU. Offloading to disk is left to ``from_pretrained`` on a converted checkpoint.
    attn_implementation : as in ``from_pretrained``.
    image_token_id : id of ``<IMG_CONTEXT>``; default, the tokenizer's in the same folder.

    Returns
    -------
    The model in evaluation mode, with the checkpoint's generation config.

    Raises
    ------
    CheckpointError
        A tensor is missing, left over or of the wrong shape, or a file is damaged.
    OptionError, UnsupportedModelError
        As `convert_config`; or ``device_map`` cannot be followed.
    """
    path = local_folder(path)
    checkpoint = Checkpoint(path)
    model = _blank(path, checkpoint, dtype, image_token_id)
    devices = _devices(model, device_map)
    # The frequencies are computed, not stored: they need values before the weights arrive.
    decoder = model.model.language_model
    decoder.rotary_emb = type(decoder.rotary_emb)(config=decoder.config)
    load_into(
        model,
        checkpoint,
        partial(convert_tensor, text_config=decoder.config),
        dtype=dtype,
        device=partial(_device_of, devices=devices),
        tied=_tied(model.config),
    )
    if attn_implementation is not None:
        model.set_attn_implementation(attn_implementation)
    model.eval()
    if len(set(devices.values())) == 1:
        return model.to(next(iter(devices.values())))
    return dispatch_model(model, devices)


def load_processor(path: str | Path, *, template: str | None = None) -> InternVLProcessor:
    """Build the stock processor from an original checkpoint's own tokenizer and picture size.

    Parameters
    ----------
    path : folder, or hub id.
    template : chat template, needed for a checkpoint trained with another conversation than
        ``internvl2_5``.

    Raises
    ------
    UnsupportedModelError
        Its pictures are prepared as no stock processor does, or ``template`` is needed.
    """
    path = local_folder(path)
    original = read_json(path / "config.json")
    if original.get("pad2square") or not original.get("use_thumbnail", True):
        raise UnsupportedModelError(
            f"{path} pads pictures to squares or tiles them without a thumbnail; the stock "
            "processor does neither."
        )
    if template is None and original.get("template") != "internvl2_5":
        raise UnsupportedModelError(
            f"{path} was trained with the conversation {original.get('template')!r}; only "
            "internvl2_5 is known. Pass its chat template as template=."
        )
    tokenizer = load_tokenizer(path)
    return build_processor(
        tokenizer,
        convert_config(original, image_token_id=_image_token_id(path, None)),
        picture_size=original.get("force_image_size"),
        min_patches=original.get("min_dynamic_patch", 1),
        max_patches=original.get("max_dynamic_patch", 12),
        template=template,
    )


def convert_checkpoint(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: torch.dtype | None = None,
    image_token_id: int | None = None,
    template: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write an original checkpoint as one that ``from_pretrained`` loads, processor included.

    Parameters
    ----------
    source : folder, or hub id.
    destination : folder; see `core.checkpoint_writer.write_converted`, also for
        ``overwrite``, ``progress`` and what an interruption leaves.
    dtype, image_token_id : as in `load_original`.
    template : as in `load_processor`. A source without tokenizer files gets no processor.
    """
    source = local_folder(source)
    checkpoint = Checkpoint(source)
    model = _blank(source, checkpoint, dtype, image_token_id)
    processor = load_processor(source, template=template) if added_tokens(source) else None
    if processor is None:
        logger.warning("%s has no tokenizer, so %s gets no processor.", source, destination)

    def finish(folder: Path) -> None:
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        if processor is not None:
            processor.save_pretrained(folder)

    return write_converted(
        model,
        checkpoint,
        destination,
        partial(convert_tensor, text_config=model.config.text_config),
        dtype=dtype,
        tied=_tied(model.config),
        overwrite=overwrite,
        finish=finish,
        progress=progress,
    )


def _blank(
    path: Path, checkpoint: Checkpoint, dtype: torch.dtype | None, image_token_id: int | None
) -> InternVLForConditionalGeneration:
    """Build the stock model on the meta device, configured as the checkpoint says."""
    config = convert_config(
        read_json(path / "config.json"), image_token_id=_image_token_id(path, image_token_id)
    )
    stored = {tensor.dtype for tensor in checkpoint.blank.values() if tensor.is_floating_point()}
    config.dtype = dtype or (stored.pop() if len(stored) == 1 else None)
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(config)
    model.generation_config = _generation_config(path, model.generation_config)
    return model


def _devices(
    model: InternVLForConditionalGeneration, device_map: DeviceMap | None
) -> dict[str, str]:
    """Return module name to device, spelled out; ``""`` stands for the whole model."""
    devices: dict[str, Any]
    if device_map == "auto":
        devices = infer_auto_device_map(
            model,
            no_split_module_classes=sorted(model._no_split_modules or ()),
            dtype=model.config.dtype,
        )
    elif device_map is None:
        devices = {"": "cpu"}
    elif isinstance(device_map, str | int | torch.device):
        devices = {"": device_map}
    else:
        devices = dict(device_map)
    if "disk" in devices.values():
        raise OptionError(
            "The model does not fit the memory of this machine's devices. Convert the checkpoint "
            "and load the result with from_pretrained and an offload_folder."
        )
    uncovered = sorted(name for name, _ in model.named_parameters() if not _covering(name, devices))
    if uncovered:
        raise OptionError(
            f"device_map has no device for {some(uncovered)}. Add an entry for their modules."
        )
    # accelerate compares devices by name and takes any other spelling of the CPU for a GPU.
    return {module: str(torch.device(device)) for module, device in devices.items()}


def _device_of(name: str, devices: Mapping[str, str]) -> str:
    return devices[max(_covering(name, devices), key=len)]


def _covering(name: str, devices: Mapping[str, Any]) -> list[str]:
    return [module for module in devices if not module or f"{name}.".startswith(f"{module}.")]


def _tied(config: InternVLConfig) -> dict[str, str]:
    if not config.tie_word_embeddings:
        return {}
    return {"lm_head.weight": "model.language_model.embed_tokens.weight"}


def _image_token_id(path: Path, chosen: int | None) -> int | None:
    found = [
        i for i, text in added_tokens(path).items() if text == IMAGE_TOKENS["context_image_token"]
    ]
    return chosen if chosen is not None or not found else found[0]


def _generation_config(path: Path, default: GenerationConfig) -> GenerationConfig:
    """Return the checkpoint's own settings, with the end of a turn among the ends of an answer."""
    settings = default
    if (path / "generation_config.json").is_file():
        settings = GenerationConfig.from_pretrained(path)
    ends = settings.eos_token_id if settings.eos_token_id is not None else default.eos_token_id
    stop = [ends] if isinstance(ends, int) else list(ends or [])
    stop += [i for i, text in added_tokens(path).items() if text == _TURN_END and i not in stop]
    settings.eos_token_id = stop or None
    settings.pad_token_id = settings.pad_token_id or default.pad_token_id
    return settings
