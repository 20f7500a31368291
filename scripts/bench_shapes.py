"""Models of a benchmark: the trained tiny ones, or real architectures with random weights.

Speed does not depend on the values of weights, so a model of 7 billion parameters is made where it
will run, without a checkpoint. Sizes:

- ``tiny``: the checkpoint that comes with the project.
- ``small``: hidden 512, 8 layers. A seventh of the 7B models in width, and their selectors a
  seventh of the 0.5B ones, so that a CPU shows the same proportions.
- ``7b``: LLaVA-Video-7B, Qwen2.5-VL-7B, InternVL2.5-8B and selectors of Qwen2-0.5B's size.

Tokenizers and chat templates are the testbed's: they only write the prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from flexselect.core.errors import FlexSelectError, OptionError
from flexselect.inference.methods import FlexSelect, Full, Method, Uniform
from flexselect.inference.registry import load_model, load_processor, load_selector
from flexselect.internvl.selector import InternVLSelector, InternVLSelectorConfig
from flexselect.llava_video.modeling import LlavaVideoConfig, LlavaVideoForConditionalGeneration
from flexselect.llava_video.processing import build_processor as build_llava_processor
from flexselect.llava_video.selector import LlavaVideoSelector, LlavaVideoSelectorConfig
from flexselect.qwen2_5_vl.selector import Qwen2_5_VLSelector, Qwen2_5_VLSelectorConfig
from flexselect.scripts.bench_sizes import SIZES, Shape
from flexselect.testbed.locate import checkpoint_folder, selector_folder
from flexselect.testbed.processors import build_processor
from flexselect.testbed.tokenizer import VISION_TOKENS, build_tokenizer

SHAPES = ("tiny", "small", "7b")
METHODS = ("full", "flexselect", "flexselect-lite", "uniform")


@dataclass(frozen=True, eq=False)
class Subject:
    """What is measured.

    Attributes
    ----------
    model, processor : as a user would load them.
    selector : a Lite selector, or None where there is none; `selector_missing` says why.
    side : height and width of a picture, in pixels.
    knobs : of the methods that have them: ``layer``, ``budget``, ``frames_per_set``.
    source : what the weights are.
    """

    model: Any
    processor: Any
    selector: Any
    side: int
    knobs: dict[str, Any]
    source: str
    selector_missing: str = ""

    def method(self, name: str) -> Method:
        """Return the method called ``name`` in tables."""
        layer = {"layer": self.knobs["layer"]} if "layer" in self.knobs else {}
        own = {key: value for key, value in self.knobs.items() if key != "layer"}
        budget = {key: value for key, value in own.items() if key == "budget"}
        if name == "full":
            return Full()
        if name == "uniform":
            return Uniform(**budget)
        if name == "flexselect":
            return FlexSelect(**own, **layer)
        if self.selector is None:
            raise OptionError(self.selector_missing)
        return FlexSelect(selector=self.selector, **own)


_PATCH = 14
_ROOT = Path(__file__).resolve().parents[1]


def build_subject(
    family: str,
    shape: str,
    *,
    device: str,
    dtype: torch.dtype | None = None,
    attention: str | None = None,
    selector_device: str | None = None,
) -> Subject:
    """Load or make what is measured.

    Parameters
    ----------
    family : folder of the family.
    shape : ``"tiny"``, ``"small"`` or ``"7b"``.
    device : where the model is made; never made elsewhere and moved. ``"meta"`` makes it without
        values, to look at.
    dtype : default: as stored for the tiny models on a GPU, float32 on a CPU; bfloat16 else.
    attention : attention kernel; default sdpa.
    selector_device : where the selector is made; default: beside the model.

    Raises
    ------
    OptionError
        The shape is unknown, or is ``"7b"`` and ``device`` is a CPU.
    CheckpointError
        There is no tiny checkpoint of the family.
    """
    if shape not in SHAPES:
        raise OptionError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}.")
    kind = torch.device(device).type
    if dtype is None:
        dtype = torch.float32 if kind == "cpu" else torch.bfloat16
    if shape == "tiny":
        return _tiny(family, device, dtype, attention)
    if shape == "7b" and kind == "cpu":
        raise OptionError(
            "shape '7b' makes a model of 7 to 8 billion parameters and needs a CUDA GPU with 24 GB "
            "or more; this run has none. Use shape 'small', or run scripts/bench_gpu.sh where "
            "there is one."
        )
    sizes = SIZES[family, shape]
    config, model_class = _CONFIGS[family](sizes)
    with _made_on(device):
        model = model_class._from_config(
            config, dtype=dtype, attn_implementation=attention or "sdpa"
        )
    with _made_on(selector_device or device):
        selector = _SELECTORS[family](sizes, config, dtype, attention or "sdpa")
    for made in (model, selector):
        made.eval()
        _draw(made)
    # A benchmark decides how long answers are, not the weights.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    knobs = {"layer": sizes.layer, "budget": sizes.budget, "frames_per_set": sizes.frames_per_set}
    processor = _processor(family, config, sizes.side)
    return Subject(model, processor, selector, sizes.side, knobs, f"random weights, shape {shape}")


def _tiny(family: str, device: str, dtype: torch.dtype, attention: str | None) -> Subject:
    folder = checkpoint_folder(family)
    model = load_model(folder, dtype, device, attn_implementation=attention)
    processor = load_processor(folder)
    selector, missing = None, ""
    try:
        place: Path = selector_folder(family)
        selector = load_selector(str(place), model)
    except FlexSelectError as error:
        # Results are compared between machines, so nothing of this one's folders.
        missing = str(error).replace(f"{_ROOT}/", "")
    model.generation_config.eos_token_id = None
    return Subject(model, processor, selector, 56, {}, f"testbed/checkpoints/{family}", missing)


def _text(sizes: dict[str, Any], ids: dict[str, int], **more: Any) -> dict[str, Any]:
    return {
        **sizes,
        "max_position_embeddings": 1 << 20,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, **more},
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        **ids,
    }


def _ids(family: str) -> dict[str, int]:
    """Look up the ids of a family's vision tokens in the testbed's tokenizer."""
    look_up = build_tokenizer(family).convert_tokens_to_ids
    return {name: look_up(token) for name, token in VISION_TOKENS[family].items()}


_NO_SPECIAL: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def _qwen_sections(sizes: dict[str, Any]) -> list[int]:
    """Split the rotated half of a head between time, rows and columns as the 7B does: 2:3:3."""
    half = sizes["hidden_size"] // sizes["num_attention_heads"] // 2
    side = half * 3 // 8
    return [half - 2 * side, side, side]


def _qwen(shape: Shape) -> tuple[Any, Any]:
    ids = _ids("qwen2_5_vl")
    sections = _qwen_sections(shape.text)
    config = Qwen2_5_VLConfig(
        text_config=_text(shape.text, _NO_SPECIAL, mrope_section=sections),
        vision_config={
            **shape.vision,
            "patch_size": _PATCH,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "out_hidden_size": shape.text["hidden_size"],
        },
        image_token_id=ids["image_token"],
        video_token_id=ids["video_token"],
        vision_start_token_id=ids["vision_bos_token"],
        vision_end_token_id=ids["vision_eos_token"],
        tie_word_embeddings=False,
    )
    return config, Qwen2_5_VLForConditionalGeneration


def _llava(shape: Shape) -> tuple[Any, Any]:
    ids = _ids("llava_video")
    config = LlavaVideoConfig(
        text_config={"model_type": "qwen2", **_text(shape.text, _NO_SPECIAL)},
        vision_config={
            **shape.vision,
            "model_type": "siglip_vision_model",
            "image_size": shape.side,
            "patch_size": _PATCH,
            "vision_use_head": False,
        },
        image_grid_pinpoints=[[shape.side, shape.side]],
        image_token_index=ids["image_token"],
        video_token_index=ids["video_token"],
        tie_word_embeddings=False,
    )
    return config, LlavaVideoForConditionalGeneration


def _internvl(shape: Shape) -> tuple[Any, Any]:
    text = _text(shape.text, _NO_SPECIAL)
    text.pop("use_sliding_window")
    config = InternVLConfig(
        text_config={"model_type": "llama", **text},
        vision_config={
            **shape.vision,
            "image_size": [shape.side, shape.side],
            "patch_size": [_PATCH, _PATCH],
            "attention_bias": True,
        },
        image_token_id=_ids("internvl")["context_image_token"],
        image_seq_length=(shape.side // _PATCH // 2) ** 2,
        tie_word_embeddings=False,
    )
    return config, InternVLForConditionalGeneration


def _qwen_selector(shape: Shape, config: Any, dtype: torch.dtype, attention: str) -> Any:
    sections = _qwen_sections(shape.selector)
    own = Qwen2_5_VLSelectorConfig(
        text_config=_text(shape.selector, _NO_SPECIAL, mrope_section=sections),
        vision_hidden_size=shape.vision["hidden_size"],
    )
    return Qwen2_5_VLSelector._from_config(own, dtype=dtype, attn_implementation=attention)


def _llava_selector(shape: Shape, config: Any, dtype: torch.dtype, attention: str) -> Any:
    own = LlavaVideoSelectorConfig(
        text_config=_text(shape.selector, _NO_SPECIAL),
        vision_hidden_size=shape.vision["hidden_size"],
        video_token_id=config.video_token_id,
    )
    return LlavaVideoSelector._from_config(own, dtype=dtype, attn_implementation=attention)


def _internvl_selector(shape: Shape, config: Any, dtype: torch.dtype, attention: str) -> Any:
    own = InternVLSelectorConfig(
        text_config={"model_type": "qwen2", **_text(shape.selector, _NO_SPECIAL)},
        vision_hidden_size=4 * shape.vision["hidden_size"],
    )
    return InternVLSelector._from_config(own, dtype=dtype, attn_implementation=attention)


_CONFIGS: dict[str, Callable[[Shape], tuple[Any, Any]]] = {
    "qwen2_5_vl": _qwen,
    "llava_video": _llava,
    "internvl": _internvl,
}
_SELECTORS: dict[str, Callable[[Shape, Any, torch.dtype, str], Any]] = {
    "qwen2_5_vl": _qwen_selector,
    "llava_video": _llava_selector,
    "internvl": _internvl_selector,
}


def _processor(family: str, config: Any, side: int) -> Any:
    if family == "llava_video":
        return build_llava_processor(build_tokenizer(family), config)
    processor = build_processor(family)
    if family == "internvl":
        processor.image_seq_length = config.image_seq_length
    return processor


def _made_on(device: str) -> AbstractContextManager[Any]:
    """Let tensors be made on ``device``: a model of 15 GB never lies in host memory."""
    return torch.device(device)


@torch.no_grad()
def _draw(model: Any) -> None:
    """Fill matrices with numbers of a size that keeps activations finite through every layer."""
    if next(model.parameters()).is_meta:
        return
    draw = torch.Generator(next(model.parameters()).device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.normal_(std=0.02, generator=draw)
