"""Original OpenGVLab checkpoints, loaded as this family's model or written as one of it.

Checkpoints that end in ``-hf`` are in the stock layout already and need none of this.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import (
    GenerationConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
)
from transformers.utils import GENERATION_CONFIG_NAME

from ..core.checkpoint import Checkpoint, load_into, read_json
from ..core.checkpoint_writer import write_converted
from ..core.errors import UnsupportedModelError
from ..core.hub import local_folder
from ..core.loading import stored_dtype
from ..core.placement import DeviceMap, Placement
from .original import (
    convert_config,
    convert_tensor,
    tied_keys,
)
from .processing import build_processor
from .tokenization import IMAGE_TOKENS, added_tokens, load_tokenizer

logger = logging.getLogger(__name__)

#: Ends a turn of every conversation InternVL was trained on, and so an answer.
_TURN_END = "<|im_end|>"


def load_original(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device_map: DeviceMap | None = None,
    attn_implementation: str | None = None,
    image_token_id: int | None = None,
) -> InternVLForConditionalGeneration:
    """Load an original checkpoint, streaming it shard by shard.

    Parameters
    ----------
    path : folder, or hub id such as ``OpenGVLab/InternVL2_5-8B``.
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
    folder = local_folder(path)
    checkpoint = Checkpoint(folder)
    config = _config(folder, image_token_id)
    config.dtype = dtype or stored_dtype(checkpoint)
    model = empty_model(config)
    placement = Placement(model, device_map)
    load_into(
        model,
        checkpoint,
        partial(convert_tensor, text_config=config.text_config),
        dtype=dtype,
        device=placement,
        tied=tied_keys(config),
    )
    model.generation_config = _generation_config(folder, model.generation_config)
    model.config._name_or_path = model.name_or_path = str(path)
    if attn_implementation is not None:
        model.set_attn_implementation(attn_implementation)
    return placement.spread(model.eval())


def convert_checkpoint(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    image_token_id: int | None = None,
    template: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write an original checkpoint as one that ``from_pretrained`` loads, processor included.

    Parameters
    ----------
    source : folder, or hub id.
    destination : folder; see `core.checkpoint_writer.write_converted`, also for ``overwrite``,
        ``progress`` and what an interruption leaves.
    dtype, image_token_id : as in `load_original`. A source without tokenizer files gets no
        processor.
    template : as in `load_processor`.

    Returns
    -------
    ``destination``

    Raises
    ------
    CheckpointError, OptionError, UnsupportedModelError
        As `load_original`; or ``destination`` cannot be written.
    """
    folder = local_folder(source)
    checkpoint = Checkpoint(folder)
    config = _config(folder, image_token_id)
    config.dtype = dtype or stored_dtype(checkpoint)
    model = empty_model(config)
    processor = None
    if added_tokens(folder):
        processor = load_processor(folder, template=template)
    else:
        logger.warning("%s has no tokenizer, so no processor is written.", folder)

    def finish(draft: Path) -> None:
        config.save_pretrained(draft)
        _generation_config(folder, model.generation_config).save_pretrained(draft)
        if processor is not None:
            processor.save_pretrained(draft)

    return write_converted(
        model,
        checkpoint,
        destination,
        partial(convert_tensor, text_config=config.text_config),
        dtype=dtype,
        tied=tied_keys(config),
        overwrite=overwrite,
        finish=finish,
        progress=progress,
    )


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
    folder = local_folder(path)
    original = read_json(folder / "config.json")
    if original.get("pad2square") or not original.get("use_thumbnail", True):
        raise UnsupportedModelError(
            f"{folder} pads pictures to squares or tiles them without a thumbnail; the stock "
            "processor does neither."
        )
    if template is None and original.get("template") != "internvl2_5":
        raise UnsupportedModelError(
            f"{folder} was trained with the conversation {original.get('template')!r}; only "
            "internvl2_5 is known. Pass its chat template as template=."
        )
    tokenizer = load_tokenizer(folder)
    return build_processor(
        tokenizer,
        _config(folder, None),
        picture_size=original.get("force_image_size"),
        min_patches=original.get("min_dynamic_patch", 1),
        max_patches=original.get("max_dynamic_patch", 12),
        template=template,
    )


def empty_model(config: InternVLConfig) -> InternVLForConditionalGeneration:
    """Build the model with its parameters on the meta device and its unstored buffers real."""
    with init_empty_weights(include_buffers=False):
        return InternVLForConditionalGeneration(config)


def _config(folder: Path, image_token_id: int | None) -> InternVLConfig:
    original = read_json(folder / "config.json")
    return convert_config(original, image_token_id=_image_token_id(folder, image_token_id))


def _image_token_id(path: Path, chosen: int | None) -> int | None:
    found = [
        i for i, text in added_tokens(path).items() if text == IMAGE_TOKENS["context_image_token"]
    ]
    return chosen if chosen is not None or not found else found[0]


def _generation_config(path: Path, default: GenerationConfig) -> GenerationConfig:
    """Return the checkpoint's own settings, with the end of a turn among the ends of an answer."""
    settings = default
    if (path / GENERATION_CONFIG_NAME).is_file():
        settings = GenerationConfig.from_pretrained(path)
    ends = settings.eos_token_id if settings.eos_token_id is not None else default.eos_token_id
    stop = [ends] if isinstance(ends, int) else list(ends or [])
    stop += [i for i, text in added_tokens(path).items() if text == _TURN_END and i not in stop]
    settings.eos_token_id = stop or None
    settings.pad_token_id = settings.pad_token_id or default.pad_token_id
    return settings
