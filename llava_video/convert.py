"""Original LLaVA-NeXT checkpoints, loaded as this family's model or written as one of it.

LLaVA-OneVision checkpoints of the same format are read too.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import AutoTokenizer, GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from ..core.checkpoint import Checkpoint, load_into
from ..core.checkpoint_writer import write_converted
from ..core.errors import CheckpointError
from ..core.hub import local_folder
from ..core.loading import stored_dtype
from ..core.placement import DeviceMap, Placement
from .modeling import LlavaVideoConfig, LlavaVideoForConditionalGeneration
from .original import (
    TOKENIZER_FILES,
    convert_config,
    convert_tensor,
    has_tokenizer,
    ignored_keys,
    tied_keys,
)
from .processing import LlavaVideoProcessor, build_processor

logger = logging.getLogger(__name__)


def load_original(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device_map: DeviceMap | None = None,
    attn_implementation: str | None = None,
    spatial_pool_mode: str | None = None,
    newline_position: str | None = None,
) -> LlavaVideoForConditionalGeneration:
    """Load an original checkpoint, streaming it shard by shard.

    Parameters
    ----------
    path : folder, or hub id such as ``lmms-lab/LLaVA-Video-7B-Qwen2``.
    dtype : of the parameters; default, as stored.
    device_map : a device, ``"auto"``, or module name to device, as in ``from_pretrained``; default,
        the CPU. Offloading to disk is left to ``from_pretrained`` on a converted checkpoint.
    attn_implementation : as in ``from_pretrained``.
    spatial_pool_mode, newline_position : override the checkpoint's configuration; see
        `LlavaVideoConfig`. The reference evaluates LLaVA-Video with ``bilinear`` and ``grid``.

    Returns
    -------
    The model in evaluation mode, with the checkpoint's generation config.

    Raises
    ------
    CheckpointError
        The checkpoint is of another kind, incomplete, or fits no supported model.
    OptionError
        ``device_map`` cannot be followed.
    """
    folder = local_folder(path)
    checkpoint = Checkpoint(folder)
    config = convert_config(
        folder, spatial_pool_mode=spatial_pool_mode, newline_position=newline_position
    )
    config.dtype = dtype or stored_dtype(checkpoint)
    model = empty_model(config)
    placement = Placement(model, device_map)
    load_into(
        model,
        checkpoint,
        convert_tensor,
        dtype=dtype,
        device=placement,
        ignored=ignored_keys(config),
        tied=tied_keys(config),
    )
    if (folder / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
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
    spatial_pool_mode: str | None = None,
    newline_position: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write an original checkpoint as one that ``from_pretrained`` loads, processor included.

    `flexselect.llava_video` imported, ``AutoModelForImageTextToText.from_pretrained`` and
    ``AutoProcessor.from_pretrained`` load the result.

    Parameters
    ----------
    source : folder, or hub id.
    destination : folder; see `core.checkpoint_writer.write_converted`, also for ``overwrite``,
        ``progress`` and what an interruption leaves.
    dtype, spatial_pool_mode, newline_position : as in `load_original`. A source without tokenizer
        files gets no processor.

    Returns
    -------
    ``destination``

    Raises
    ------
    CheckpointError
        As `load_original`; or ``destination`` cannot be written.
    """
    folder = local_folder(source)
    checkpoint = Checkpoint(folder)
    config = convert_config(
        folder, spatial_pool_mode=spatial_pool_mode, newline_position=newline_position
    )
    config.dtype = dtype or stored_dtype(checkpoint)
    config.architectures = [LlavaVideoForConditionalGeneration.__name__]
    model = empty_model(config)
    processor = None
    if has_tokenizer(folder):
        processor = load_processor(folder, config)
    else:
        logger.warning("%s has no tokenizer, so no processor is written.", folder)

    def finish(draft: Path) -> None:
        config.save_pretrained(draft)
        if (folder / GENERATION_CONFIG_NAME).is_file():
            shutil.copyfile(folder / GENERATION_CONFIG_NAME, draft / GENERATION_CONFIG_NAME)
        if processor is not None:
            processor.save_pretrained(draft)

    return write_converted(
        model,
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
    path: str | Path, config: LlavaVideoConfig | None = None, *, time_instruction: bool = False
) -> LlavaVideoProcessor:
    """Build the processor of an original checkpoint from the tokenizer beside it.

    Parameters
    ----------
    path : folder or hub id.
    config : default, the checkpoint's own; see `convert_config`.
    time_instruction : see `LlavaVideoProcessor`.

    Raises
    ------
    CheckpointError
        There is no tokenizer.
    """
    folder = local_folder(path)
    if not has_tokenizer(folder):
        raise CheckpointError(f"{folder} has no tokenizer ({' or '.join(TOKENIZER_FILES)}).")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Generation continues a prompt at its right end.
    tokenizer.padding_side = "left"
    config = config or convert_config(folder)
    return build_processor(tokenizer, config, time_instruction=time_instruction)


def empty_model(config: LlavaVideoConfig) -> LlavaVideoForConditionalGeneration:
    """Build the model with its parameters on the meta device and its unstored buffers real."""
    with init_empty_weights(include_buffers=False):
        return LlavaVideoForConditionalGeneration(config)
