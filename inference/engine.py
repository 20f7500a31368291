"""The engine: a method at work on a model, from an encoded prompt to what the model reads."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
import transformers
from torch import Tensor

from ..core.architecture import Request
from ..core.decoder import forget_length
from ..core.errors import OptionError
from ..core.layout import NONE, Prompt
from ..core.selection import Selection
from .features import Encoded, Features, Progress, assemble, encode
from .methods import Method
from .presets import Preset, preset_of
from .registry import architecture_of


class Engine:
    """Runs one method on one model.

    Of the model only what a rope remembers of earlier prompts is touched: it is forgotten.

    Parameters
    ----------
    model : a loaded model of a supported family.
    method : its knobs left at None are filled from the model's preset.

    Attributes
    ----------
    architecture : the family's view of the model.
    preset : what is known of this model.
    method : every knob filled.

    Raises
    ------
    UnsupportedModelError, OptionError
        As `apply`.
    """

    def __init__(self, model: Any, method: Method) -> None:
        if not isinstance(method, Method):
            raise OptionError(
                f"method must be a method such as FlexSelect(budget=4096), got {method!r}."
            )
        self.model = model
        self.architecture = architecture_of(model)
        self.preset: Preset = preset_of(self.architecture)
        self.method = method.resolve(self.architecture, self.preset.method)

    def encode(self, request: Request) -> Encoded:
        """Encode the clips of one prompt."""
        prompt = request.prompt
        if not request.pixels:
            return Encoded(prompt, Features(torch.empty(0, 0)), ())
        selector = self.method.encodes_for
        features = encode(self.architecture, request.pixels, selector)
        times = tuple(
            torch.arange(clip.frames, dtype=torch.float64) * clip.seconds_per_frame
            for clip in prompt.videos
        )
        return Encoded(prompt, features, times)

    def select(self, encoded: Encoded, progress: Progress | None = None) -> Selection | None:
        """Run the method on one prompt; None for a prompt without video."""
        if not encoded.prompt.num_visual:
            return None
        selection = self.method.select(encoded, self.architecture, progress)
        selection.settings.update(self.record())
        return selection

    @torch.no_grad()
    def gather(self, encoded: Encoded, selection: Selection | None) -> tuple[Tensor, Tensor]:
        """Embed what stays of a prompt: ``(tokens, hidden)``, and its position ids.

        ``selection`` None keeps everything.
        """
        prompt = encoded.prompt
        if selection is None:
            rows = torch.arange(len(prompt.layout))
        else:
            rows = kept_rows(prompt, selection.kept)
        if selection is not None and self.method.positions == "compact":
            positions = self.architecture.compact_positions(prompt, rows)
        else:
            positions = self.architecture.positions(prompt)[..., rows]
        features = encoded.features.model
        return assemble(prompt.layout, rows, features, self.architecture.embed), positions

    def prefill(self, parts: list[tuple[Tensor, Tensor]], left: bool = True) -> dict[str, Tensor]:
        """Pad gathered prompts to one batch: inputs_embeds, attention_mask, position_ids.

        The model reads it within `Architecture.reading`.
        """
        forget_length(self.architecture.decoder)
        length = max(len(embeds) for embeds, _ in parts)
        device = parts[0][0].device

        def pad(part: Tensor) -> Tensor:
            missing = length - part.shape[-1]
            return torch.nn.functional.pad(part, (missing, 0) if left else (0, missing))

        # The mask is never left out: without one, positions with gaps pass for packed sequences.
        mask = torch.stack([pad(torch.ones(len(e), dtype=torch.long)) for e, _ in parts])
        return {
            "inputs_embeds": torch.stack([pad(embeds.mT).mT for embeds, _ in parts]),
            "attention_mask": mask.to(device),
            "position_ids": torch.stack([pad(p) for _, p in parts], -2).to(device),
        }

    def record(self) -> dict[str, Any]:
        """Name what decides a result besides the method's knobs and the video."""
        return {
            "flexselect": version("flexselect"),
            "family": self.architecture.family,
            "model": self.model.config._name_or_path,
            "preset": self.preset.name,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "attention": self.architecture.decoder.config._attn_implementation,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }


def kept_rows(prompt: Prompt, kept: Tensor) -> Tensor:
    """Token indices that stay when only the visual tokens ``kept`` do: int64, ascending.

    Text stays, except what belongs to a frame of which no visual token is kept.
    """
    layout = prompt.layout
    keep = (layout.frame == NONE) & ~layout.visual
    keep[prompt.visual_rows()[kept]] = True
    for video, clip in enumerate(prompt.videos):
        mine = ((layout.video == video) & (layout.frame != NONE)).nonzero()[:, 0]
        shown = torch.zeros(clip.frames, dtype=torch.bool)
        shown[layout.frame[mine[keep[mine]]]] = True
        keep[mine] |= shown[layout.frame[mine]] & ~layout.visual[mine]
    return keep.nonzero()[:, 0]
