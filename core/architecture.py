"""The contract: what a model family answers so that every method works on it.

The engine knows layouts, features and scores. All it asks of a model goes through an
`Architecture`, and all it asks of a Lite selector through a `Selector`. Both can rank a prompt, so
both are a `Scorer`. ``PORTING.md`` walks through a new family file by file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from .decoder import LayerStates, layer_states, listening
from .errors import PromptError, UnsupportedModelError
from .layout import Clip, Grid, Prompt


@dataclass(frozen=True, eq=False)
class Pixels:
    """One clip ready for the vision tower.

    Attributes
    ----------
    values : the family's own tensor, frame after frame along the first axis (a frame may take
        several rows of it).
    clip : the visual tokens it becomes.
    picture_size : (height, width) an image had before it was cut into tiles, where the family
        needs to know; None for videos.
    """

    values: Tensor
    clip: Clip
    picture_size: tuple[int, int] | None = None

    def frames(self, start: int, stop: int) -> Pixels:
        """Return frames ``start`` … ``stop`` - 1."""
        rows = len(self.values) // self.clip.frames
        clip = replace(self.clip, frames=stop - start)
        return replace(self, values=self.values[start * rows : stop * rows], clip=clip)


@dataclass(frozen=True, eq=False)
class Request:
    """One row of a batch: its prompt, and the pixels of its clips in order of appearance."""

    prompt: Prompt
    pixels: tuple[Pixels, ...]


class Scorer(Protocol):
    """What ranks visual tokens: a model at its reference layer, or a Lite selector."""

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""

    def embed(self, ids: Tensor) -> Tensor:
        """Embed text: int64 ``(tokens,)`` to ``(tokens, hidden)``, on the scorer's device."""

    def positions(self, prompt: Prompt) -> Tensor:
        """Position ids of a whole prompt: int64 ``(tokens,)`` or ``(axes, tokens)``.

        They depend on where frames, their tokens and text are, not on what the text says.
        """

    def states(
        self, embeds: Tensor, positions: Tensor, layer: int, query_rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rotated query and key states of ``layer``; see `core.decoder.reference_states`.

        ``embeds`` is ``(sets, tokens, hidden)`` and ``positions`` as `positions` returns them,
        with the sets before the last axis.
        """

    def layer_states(
        self, embeds: Tensor, positions: Tensor, layers: Collection[int], query_rows: Tensor
    ) -> Iterator[LayerStates]:
        """States of several layers on one walk; see `core.decoder.layer_states`."""


class Selector(Scorer, Protocol):
    """A Lite selector: a small language model with its own projector from the vision tower."""

    @property
    def aggregation(self) -> str:
        """The aggregation it was trained to reproduce."""

    def localise(self, prompt: Prompt) -> Prompt:
        """Return the prompt in the selector's own tokens, with the same visual tokens in order."""


class Architecture(ABC):
    """One family's answers, bound to one model of it.

    Parameters
    ----------
    model : a stock transformers model of the family.
    """

    #: Name of the family, also of its folder.
    family: ClassVar[str]
    #: Inputs of the model that carry pictures and go no further than the architecture.
    vision_inputs: ClassVar[tuple[str, ...]]
    #: Pictures of the video that become one frame of the layout.
    pictures_per_frame: ClassVar[int] = 1
    #: Whether the time of every frame is written into the prompt; `expand` then reads
    #: `Clip.stamps`.
    stamps_frames: ClassVar[bool] = False
    #: Options of a caller or a preset that choose and size the pictures of a video; others are
    #: refused.
    sampling_options: ClassVar[tuple[str, ...]] = ("fps", "frames", "min_frames", "max_frames")

    def __init__(self, model: Any) -> None:
        self.model = model

    # -- prompt ------------------------------------------------------------------------------

    @abstractmethod
    def has_video(self, inputs: Mapping[str, Any]) -> bool:
        """Whether a processor's batch shows at least one video."""

    @abstractmethod
    def read(self, inputs: Mapping[str, Any]) -> list[Request]:
        """Lay out what the processor made, one `Request` a row, padding stripped.

        Tensors of ``inputs`` are never written to. Raises `PromptError` where ids and pictures do
        not fit together.
        """

    @abstractmethod
    def layout(self, ids: Tensor, videos: Sequence[Clip], images: Sequence[Clip]) -> Prompt:
        """Lay out expanded token ids ``(tokens,)`` that show the given clips in order."""

    # -- encode ------------------------------------------------------------------------------

    @abstractmethod
    def encode(self, pixels: Pixels, selector: Any | None) -> tuple[Tensor, Tensor | None]:
        """Run the vision tower over a few frames.

        Returns
        -------
        ``(feature tokens, hidden)`` for the model and, from the same pass of the tower, for
        ``selector`` if given. Rows may be wider than the text model's states where that is given
        more than embeddings; `embed` makes rows as wide, `states` and `reading` take them apart.
        """

    # -- positions ---------------------------------------------------------------------------

    @abstractmethod
    def positions(self, prompt: Prompt) -> Tensor:
        """Position ids of a whole prompt; see `Scorer.positions`."""

    @abstractmethod
    def compact_positions(self, prompt: Prompt, rows: Tensor) -> Tensor:
        """Position ids of the tokens ``rows`` as if nothing between them had ever been there."""

    # -- layers ------------------------------------------------------------------------------

    @property
    @abstractmethod
    def decoder(self) -> Any:
        """The text model: ``embed_tokens``, ``layers``, ``rotary_emb``, ``config``."""

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.decoder.layers)

    @abstractmethod
    def embed(self, ids: Tensor) -> Tensor:
        """Embed text: int64 ``(tokens,)`` to ``(tokens, hidden)``, on the model's device."""

    @abstractmethod
    def states(
        self, embeds: Tensor, positions: Tensor, layer: int, query_rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rotated query and key states of ``layer``, as in `Scorer.states`."""

    def layer_states(
        self, embeds: Tensor, positions: Tensor, layers: Collection[int], query_rows: Tensor
    ) -> Iterator[LayerStates]:
        """States of several layers on one walk; a family that overrides `states` adapts this too.

        The walk is `core.decoder.layer_states`.
        """
        return layer_states(self.decoder, embeds, positions, layers, query_rows)

    def listening(
        self,
        layers: Collection[int],
        tokens: int,
        query_rows: Tensor,
        heard: Callable[[LayerStates], object],
    ) -> AbstractContextManager[None]:
        """Hear the states of layers in the next pass, as `core.decoder.listening` does.

        A family whose decoder does not look like Llama's overrides this, or cannot listen and
        returns ``nullcontext()``: its answers are the same, their moments are ranked by the scores
        of the sets.
        """
        return listening(self.decoder, layers, tokens, query_rows, heard)

    def grid(self, clip: Clip) -> Grid:
        """Return which part of its picture each visual token of a frame of ``clip`` shows."""
        cells = torch.arange(clip.rows * clip.columns)
        return Grid(clip.rows, clip.columns, cells)

    def reading(self, inputs: Mapping[str, Tensor]) -> AbstractContextManager[dict[str, Tensor]]:
        """Let the model read what `embed` and `encode` made, while this is open.

        Parameters
        ----------
        inputs : inputs of one call of the model, ``inputs_embeds`` among them.

        Returns
        -------
        A context that gives the inputs to call the model with: the same, but for a family whose
        rows are wider than its text model's states.
        """
        return nullcontext(dict(inputs))

    def effective_budget(self, budget: int, prompt: Prompt) -> int:
        """Return the budget the family's reference would use for ``prompt``."""
        return budget

    # -- files -------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def load_model(
        cls,
        folder: Path,
        dtype: torch.dtype | None,
        device_map: Any,
        attn_implementation: str | None,
    ) -> Any:
        """Load a checkpoint; ``dtype`` None means as stored. No weight may be left random."""

    @classmethod
    @abstractmethod
    def load_processor(cls, folder: Path) -> Any:
        """Load the processor of a checkpoint."""

    @classmethod
    def convert_checkpoint(
        cls,
        source: Path,
        destination: Path,
        *,
        dtype: torch.dtype | None = None,
        overwrite: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Path:
        """Write a checkpoint in its authors' layout as one that transformers loads.

        Raises `UnsupportedModelError` for a family whose checkpoints need no conversion.
        """
        raise UnsupportedModelError(
            f"{source} needs no conversion: transformers loads {cls.family} as it is stored."
        )

    @abstractmethod
    def load_selector(self, path: str) -> Any:
        """Load a Lite selector of this family: ours, or in the format the reference publishes."""

    def check_selector(self, selector: Any) -> None:
        """Raise `UnsupportedModelError` unless ``selector`` is a Lite selector for this model.

        A family also compares sizes. Called for every selector, loaded or given as an object.
        """
        needed = ("num_layers", "aggregation", "localise", "states")
        if not all(hasattr(selector, name) for name in needed):
            raise UnsupportedModelError(
                f"selector must be a Lite selector, or a path or hub id of one, got "
                f"{type(selector).__name__}."
            )

    def sample(self, count: int, fps: float, sampling: Mapping[str, Any]) -> Tensor | None:
        """Choose pictures of a video of ``count`` at ``fps`` by the family's own policy, if any.

        ``sampling`` is the ``video`` section of a preset. Returns int64 indices, ascending, or
        None for a family that samples by ``frames`` or ``fps`` alone.
        """
        return None

    @abstractmethod
    def picture_size(
        self, height: int, width: int, pictures: int, limits: Mapping[str, Any]
    ) -> tuple[int, int]:
        """Choose the size at which ``pictures`` of a video are looked at: (height, width)."""

    @abstractmethod
    def pixels(self, processor: Any, pictures: Tensor, seconds_per_picture: float) -> Pixels:
        """Prepare decoded pictures for the tower: uint8 ``(pictures, 3, height, width)``.

        The family's own processor does it; pictures already have their final size.
        """

    @abstractmethod
    def expand(self, processor: Any, text: str, videos: Sequence[Clip]) -> Tensor:
        """Tokenise a templated prompt, with each video placeholder as its visual tokens.

        Returns int64 ``(tokens,)``, equal to what the processor makes of the same pictures.
        """


def strip_padding(inputs: Mapping[str, Any]) -> list[Tensor]:
    """Return the token ids of every row without its padding, on the host: int64 ``(tokens,)``."""
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise PromptError(
            "Selection reads the prompt from input_ids of shape (batch, tokens); pass the "
            "processor's output unchanged."
        )
    ids = ids.cpu()
    mask = inputs.get("attention_mask")
    if mask is None:
        return list(ids)
    if mask.shape != ids.shape:
        raise PromptError(
            f"attention_mask must have the shape of input_ids {tuple(ids.shape)}, "
            f"got {tuple(mask.shape)}."
        )
    return [row[keep] for row, keep in zip(ids, mask.cpu().bool(), strict=True)]


def runs(mask: Tensor) -> list[tuple[int, int]]:
    """Return (start, stop) of every stretch of true values in a bool ``(n,)``."""
    padded = torch.nn.functional.pad(mask.to(torch.int8), (1, 1))
    edges = padded.diff().nonzero()[:, 0].tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def repeat_tokens(ids: Tensor, token: int, counts: Sequence[int]) -> Tensor:
    """Repeat the placeholders of a prompt after it was tokenised with one for each.

    A placeholder is a token of its own whatever stands beside it, so this equals tokenising the
    expanded text, without the time that takes for 100,000 of them.

    Parameters
    ----------
    ids : int64 ``(tokens,)``.
    token : id of the placeholder.
    counts : how often each stands in the result, in order.

    Raises
    ------
    PromptError
        There are more or fewer placeholders than counts.
    """
    places = (ids == token).nonzero()[:, 0]
    if len(places) != len(counts):
        raise PromptError(
            f"The prompt has {len(places)} places for a video, but there are {len(counts)}."
        )
    repeats = torch.ones_like(ids)
    repeats[places] = torch.tensor(counts, dtype=repeats.dtype)
    return ids.repeat_interleave(repeats)
