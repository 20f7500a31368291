"""Tiny models of the three families, built from the real classes, and what differs between them.

A :class:`Family` says what the recipe must know of a family: how its model is built, how frames
become features, and how a frame and the positions look in its language model. Everything else is
shared. Nothing here is used at run time: a finished checkpoint is an ordinary folder that
``from_pretrained`` and ``AutoProcessor`` load.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from ..core.errors import OptionError
from ..llava_video.modeling import LlavaVideoConfig, LlavaVideoForConditionalGeneration
from ..llava_video.processing import build_processor as build_llava_processor
from .locate import FAMILIES
from .processors import build_processor
from .scenes import FRAME, GRID
from .tokenizer import PAD, TURN_END, TURN_START, VISION_TOKENS, build_tokenizer

#: Stand in a frame's slots for a visual token of the tower and for LLaVA-Video's newline.
FEATURE, NEWLINE = -1, -2
#: Visual tokens of a frame that show a cell.
CELLS = GRID * GRID

_PATCH = 14
_INIT = 0.06
_ROPE_THETA = 1e6
_TEXT = {
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 384,
    "max_position_embeddings": 32768,
    "initializer_range": _INIT,
}


class Family(ABC):
    """One family of models, as the training recipe sees it.

    Attributes
    ----------
    name : str
        Folder of the family.
    pictures_per_frame : int
        Pictures that the tower merges into one frame of visual tokens.
    time_units : int
        Rope units a second, where positions know time.
    placeholder : str
        Token that stands for a visual one in expanded ids, by its name in ``VISION_TOKENS``.
    processor, tokenizer : Any
        The real processor and the testbed's tokenizer.
    """

    name: str
    pictures_per_frame: int = 1
    time_units: int = 1
    placeholder: str = "video_token"

    def __init__(self) -> None:
        self.processor = self.make_processor()
        self.tokenizer = self.processor.tokenizer

    def make_processor(self) -> Any:
        """Build the real processor around the testbed's tokenizer."""
        return build_processor(self.name)

    @abstractmethod
    def build(self, **text: Any) -> Any:
        """Build the model with random weights in float32; ``text`` overrides its text config."""

    @abstractmethod
    def encode(self, model: Any, pictures: NDArray[np.uint8]) -> Tensor:
        """Run real processor and tower: pictures ``(n, FRAME, FRAME, 3)`` to features.

        Returns
        -------
        Tensor of shape (n / pictures_per_frame, CELLS, hidden)
            The visual tokens of the cells, row by row, without newlines.
        """

    @abstractmethod
    def tower(self, model: Any) -> list[torch.nn.Module]:
        """List the modules that turn pixels into features."""

    @abstractmethod
    def projector(self, model: Any) -> torch.nn.Module:
        """Return the part of the tower that brings features to the language model's width."""

    @abstractmethod
    def frame_slots(self) -> tuple[list[int], list[bool]]:
        """Lay out one frame: token ids (or FEATURE, NEWLINE), and which of them are ranked."""

    def newline(self, model: Any) -> Tensor | None:
        """Return the newline embedding ``(hidden,)``, None where the family has none."""
        return None

    @abstractmethod
    def around(self) -> tuple[list[int], list[int]]:
        """Token ids before the first frame and between the last frame and the question."""

    def positions(
        self, before: int, times: NDArray[np.int64], cells: NDArray[np.int64], after: int
    ) -> NDArray[np.int64]:
        """Positions of a whole sequence: ``(tokens,)``, or ``(3, tokens)`` with M-RoPE.

        Parameters
        ----------
        before, after : int
            Text tokens before and after the video.
        times, cells : ndarray of shape (tokens of the video,)
            Time of each token's frame in rope units, and its cell.
        """
        return np.arange(before + len(times) + after)

    def config_ids(self) -> dict[str, int]:
        """Ids of the text config's special tokens."""
        ids = self.tokenizer.convert_tokens_to_ids
        return {
            "vocab_size": len(self.tokenizer),
            "bos_token_id": ids(TURN_START),
            "eos_token_id": ids(TURN_END),
            "pad_token_id": ids(PAD),
        }

    def token(self, name: str) -> int:
        """Id of one of the family's vision tokens, by its name in ``VISION_TOKENS``."""
        return int(self.tokenizer.convert_tokens_to_ids(VISION_TOKENS[self.name][name]))

    def ids(self, text: str) -> list[int]:
        """Tokenize text in which special tokens are spelt out."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _pixels(self, pictures: NDArray[np.uint8]) -> Any:
        return self.processor.video_processor(
            videos=[torch.from_numpy(pictures).permute(0, 3, 1, 2)],
            do_sample_frames=False,
            return_tensors="pt",
        )

    def _system(self) -> str:
        """Render what the chat template puts before the first video."""
        turn = [{"role": "user", "content": [{"type": "video"}]}]
        text: str = self.processor.apply_chat_template(turn, tokenize=False)
        return text.split(VISION_TOKENS[self.name]["video_token"])[0]


class Qwen25VL(Family):
    """Qwen2.5-VL: two pictures a frame, M-RoPE, no text between frames."""

    name = "qwen2_5_vl"
    pictures_per_frame = 2
    time_units = 2

    def build(self, **text: Any) -> Any:
        """See `Family.build`."""
        config = Qwen2_5_VLConfig(
            text_config={
                **_TEXT,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": _ROPE_THETA,
                    "mrope_section": [4, 6, 6],
                },
                **self.config_ids(),
                **text,
            },
            vision_config={
                "depth": 2,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_heads": 4,
                "patch_size": _PATCH,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "tokens_per_second": self.time_units,
                "window_size": 112,
                "fullatt_block_indexes": [0, 1],
                "out_hidden_size": text.get("hidden_size", _TEXT["hidden_size"]),
                "initializer_range": _INIT,
            },
            image_token_id=self.token("image_token"),
            video_token_id=self.token("video_token"),
            vision_start_token_id=self.token("vision_bos_token"),
            vision_end_token_id=self.token("vision_eos_token"),
            tie_word_embeddings=True,
        )
        return Qwen2_5_VLForConditionalGeneration(config)

    def encode(self, model: Any, pictures: NDArray[np.uint8]) -> Tensor:
        """See `Family.encode`."""
        pixels = self._pixels(pictures)
        values = pixels["pixel_values_videos"].to(model.dtype)
        features = model.model.visual(values, grid_thw=pixels["video_grid_thw"]).pooler_output
        return features.unflatten(0, (-1, CELLS))

    def tower(self, model: Any) -> list[torch.nn.Module]:
        """See `Family.tower`."""
        return [model.model.visual]

    def projector(self, model: Any) -> torch.nn.Module:
        """See `Family.projector`."""
        merger: torch.nn.Module = model.model.visual.merger
        return merger

    def frame_slots(self) -> tuple[list[int], list[bool]]:
        """See `Family.frame_slots`."""
        return [FEATURE] * CELLS, [True] * CELLS

    def around(self) -> tuple[list[int], list[int]]:
        """See `Family.around`."""
        return self.ids(self._system()), [self.token("vision_eos_token")]

    def positions(
        self, before: int, times: NDArray[np.int64], cells: NDArray[np.int64], after: int
    ) -> NDArray[np.int64]:
        """See `Family.positions`."""
        prefix = np.broadcast_to(np.arange(before), (3, before))
        video = np.stack([times, cells // GRID, cells % GRID]) + before
        # As the released weights learned it: text goes on past the highest of all three axes.
        start = int(video.max(initial=before - 1)) + 1
        suffix = np.broadcast_to(np.arange(start, start + after), (3, after))
        return np.concatenate([prefix, video, suffix], axis=1)


class InternVL(Family):
    """InternVL: every frame between tags, headed by its number, and plain positions."""

    name = "internvl"
    placeholder = "context_image_token"

    def build(self, **text: Any) -> Any:
        """See `Family.build`."""
        config = InternVLConfig(
            text_config={
                "model_type": "qwen2",
                **_TEXT,
                "rope_parameters": {"rope_type": "default", "rope_theta": _ROPE_THETA},
                "tie_word_embeddings": True,
                **self.config_ids(),
                **text,
            },
            vision_config={
                "hidden_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "intermediate_size": 128,
                "image_size": (FRAME, FRAME),
                "patch_size": (_PATCH, _PATCH),
                "attention_bias": True,
                "initializer_range": _INIT,
            },
            image_token_id=self.token("context_image_token"),
            image_seq_length=CELLS,
            tie_word_embeddings=True,
        )
        return InternVLForConditionalGeneration(config)

    def encode(self, model: Any, pictures: NDArray[np.uint8]) -> Tensor:
        """See `Family.encode`."""
        pixels = self._pixels(pictures)["pixel_values_videos"][0]
        features: Tensor = model.model.get_image_features(
            pixel_values=pixels,
            vision_feature_layer=model.config.vision_feature_layer,
            vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        ).pooler_output
        return features

    def tower(self, model: Any) -> list[torch.nn.Module]:
        """See `Family.tower`."""
        return [model.model.vision_tower, model.model.multi_modal_projector]

    def projector(self, model: Any) -> torch.nn.Module:
        """See `Family.projector`."""
        projector: torch.nn.Module = model.model.multi_modal_projector
        return projector

    def frame_slots(self) -> tuple[list[int], list[bool]]:
        """See `Family.frame_slots`."""
        header = self.ids("Frame1:")
        tags = self.token("start_image_token"), self.token("end_image_token")
        slots = [*header, tags[0], *[FEATURE] * CELLS, tags[1]]
        return slots, [False] * len(header) + [True] * (CELLS + 2)

    def around(self) -> tuple[list[int], list[int]]:
        """See `Family.around`."""
        return self.ids(self._system()), []


class LlavaVideo(Family):
    """LLaVA-Video: a newline embedding after every row of every frame, and plain positions."""

    name = "llava_video"

    def make_processor(self) -> Any:
        """See `Family.make_processor`."""
        return build_llava_processor(build_tokenizer(self.name), self._config({}))

    def build(self, **text: Any) -> Any:
        """See `Family.build`."""
        return LlavaVideoForConditionalGeneration(self._config({**self.config_ids(), **text}))

    def encode(self, model: Any, pictures: NDArray[np.uint8]) -> Tensor:
        """See `Family.encode`."""
        pixels = self._pixels(pictures)["pixel_values_videos"][0]
        frames = model.model.frame_features(model.model.encode_pictures(pixels))
        features: Tensor = frames.unflatten(1, (GRID, GRID + 1))[:, :, :GRID].flatten(1, 2)
        return features

    def tower(self, model: Any) -> list[torch.nn.Module]:
        """See `Family.tower`."""
        return [model.model.vision_tower, model.model.multi_modal_projector]

    def projector(self, model: Any) -> torch.nn.Module:
        """See `Family.projector`."""
        projector: torch.nn.Module = model.model.multi_modal_projector
        return projector

    def frame_slots(self) -> tuple[list[int], list[bool]]:
        """See `Family.frame_slots`."""
        slots = [*[FEATURE] * GRID, NEWLINE] * GRID
        return slots, [True] * len(slots)

    def newline(self, model: Any) -> Tensor | None:
        """See `Family.newline`."""
        newline: Tensor = model.model.image_newline
        return newline

    def around(self) -> tuple[list[int], list[int]]:
        """See `Family.around`."""
        return self.ids(self._system()), []

    def _config(self, text: dict[str, Any]) -> LlavaVideoConfig:
        placeholders = {}
        if text:
            placeholders = {
                "image_token_index": self.token("image_token"),
                "video_token_index": self.token("video_token"),
            }
        return LlavaVideoConfig(
            text_config={
                "model_type": "qwen2",
                **_TEXT,
                "rope_parameters": {"rope_type": "default", "rope_theta": _ROPE_THETA},
                "tie_word_embeddings": True,
                **text,
            },
            vision_config={
                "model_type": "siglip_vision_model",
                "hidden_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "intermediate_size": 128,
                "image_size": FRAME,
                "patch_size": _PATCH,
                "vision_use_head": False,
            },
            image_grid_pinpoints=[[FRAME, FRAME]],
            tie_word_embeddings=True,
            **placeholders,
        )


_KINDS: tuple[type[Family], ...] = (Qwen25VL, InternVL, LlavaVideo)
_FAMILIES = {kind.name: kind for kind in _KINDS}


def family_of(name: str) -> Family:
    """Return what the recipe knows of a family.

    Raises
    ------
    OptionError
        If the family is unknown.
    """
    if name not in _FAMILIES:
        raise OptionError(f"family={name!r} is unknown; choose one of {', '.join(FAMILIES)}.")
    return _FAMILIES[name]()
