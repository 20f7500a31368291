"""Apply a method to a model: its ``generate`` and forward then select, user code unchanged.

Only the instance is touched: two of its attributes are set and `remove` takes them away again.
Nothing is written to the model's class, config or weights.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.architecture import Architecture, Request
from ..core.errors import FlexSelectError, OptionError, PromptError
from ..core.layout import NONE, Prompt
from ..core.selection import Selection
from .features import Encoded, Features, assemble, encode
from .methods import FlexSelect, Method
from .presets import preset_of
from .registry import architecture_of

_PATCHED = ("generate", "forward")


def apply(model: Any, method: Method | None = None, **knobs: Any) -> Any:
    """Let ``model`` answer from selected visual tokens.

    Parameters
    ----------
    model : a loaded transformers model of a supported family. Changed in place, and returned.
    method : the method to apply; default: `FlexSelect` with ``knobs``.
    knobs : fields of `FlexSelect`: ``budget``, ``layer``, ``selector``, ``aggregation``, …
        What is not given comes from the preset of this model.

    Raises
    ------
    UnsupportedModelError
        No family knows this model, or the selector does not fit it.
    OptionError
        A knob is unknown or out of range.
    FlexSelectError
        A method is applied already.
    """
    if is_applied(model):
        raise FlexSelectError(
            f"{model.flexselect.method.name} is applied to this model already. Call "
            "flexselect.remove(model) first."
        )
    if method is not None and knobs:
        raise OptionError("Give either a method or the knobs of FlexSelect, not both.")
    if method is None:
        unknown = set(knobs) - {field.name for field in dataclasses.fields(FlexSelect)}
        if unknown:
            raise OptionError(
                f"Unknown knobs {sorted(unknown)}; FlexSelect has "
                f"{[field.name for field in dataclasses.fields(FlexSelect)]}."
            )
        method = FlexSelect(**knobs)
    architecture = architecture_of(model)
    resolved = method.resolve(architecture, preset_of(architecture).method)
    model.flexselect = Applied(model, architecture, resolved)
    return model


def remove(model: Any) -> Any:
    """Undo `apply`: the model is exactly what it was. Harmless where nothing is applied."""
    if is_applied(model):
        model.flexselect.detach()
        del model.flexselect
    return model


def is_applied(model: Any) -> bool:
    """Whether a method is applied to ``model``."""
    return isinstance(model.__dict__.get("flexselect"), Applied)


class Applied:
    """A method at work on a model; found as ``model.flexselect``.

    Attributes
    ----------
    architecture : the family's view of the model.
    method : the method, every knob filled.
    selections : one `Selection` (or None for a prompt without video) a row of the latest call.
    """

    def __init__(self, model: Any, architecture: Architecture, method: Method) -> None:
        self.architecture = architecture
        self.method = method
        self.selections: list[Selection | None] = []
        self._model = model
        self._before = {name: model.__dict__.get(name) for name in _PATCHED}
        self._generate = model.generate
        self._forward = model.forward
        # The originals' signatures stay visible: stock generation inspects forward's.
        model.generate = _like(self._generate, self.generate)
        model.forward = _like(self._forward, self.forward)

    def detach(self) -> None:
        """Give the model its own methods back."""
        for name, value in self._before.items():
            if value is None:
                delattr(self._model, name)
            else:
                setattr(self._model, name, value)

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Answer from the selected tokens; the prompt's ids still lead what is returned."""
        if inputs is not None and "input_ids" not in kwargs:
            kwargs["input_ids"], inputs = inputs, None
        if not self._selects(kwargs):
            return self._generate(inputs, *args, **kwargs)
        ids = kwargs["input_ids"]
        prefill, kwargs, _ = self._prepare(kwargs, left=True)
        # With ids beside the embeddings, stock generation reads the embeddings once and goes on
        # from the ids: they lead the output, reach the streamer and the logits processors.
        kwargs = _count_new_tokens(kwargs, self._model.generation_config, ids.shape[1])
        return self._generate(None, *args, input_ids=ids, **prefill, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model on the selected tokens; logits are those of the shorter prompt."""
        if args:
            names = inspect.signature(self._forward).parameters
            kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        if not self._selects(kwargs):
            return self._forward(**kwargs)
        if kwargs.get("labels") is not None:
            raise OptionError(
                "labels cannot be used while a method is applied: dropped tokens have no logits. "
                "Call flexselect.remove(model) before training it."
            )
        mask = kwargs.get("attention_mask")
        left = mask is None or bool(mask[:, -1].all())
        prefill, kwargs, positions = self._prepare(kwargs, left)
        self.architecture.continue_from(positions)
        return self._forward(**prefill, **kwargs)

    def select(
        self, encoded: Encoded, progress: Callable[[str, int, int], None] | None = None
    ) -> Selection | None:
        """Run the method on one prompt; None for a prompt without video."""
        if not encoded.prompt.num_visual:
            return None
        selection = self.method.select(encoded, self.architecture, progress)
        selection.settings.update(self._settings())
        return selection

    def gather(self, encoded: Encoded, selection: Selection | None) -> tuple[Tensor, Tensor]:
        """Embed what stays of a prompt: ``(tokens, hidden)`` and its position ids."""
        prompt = encoded.prompt
        rows = (
            torch.arange(len(prompt.layout))
            if selection is None
            else kept_rows(prompt, selection.kept)
        )
        if selection is not None and self.method.positions == "compact":
            positions = self.architecture.compact_positions(prompt, rows)
        else:
            positions = self.architecture.positions(prompt)[..., rows]
        embed = self.architecture.embed
        return assemble(prompt.layout, rows, encoded.features.model, embed), positions

    def prefill(self, parts: list[tuple[Tensor, Tensor]], left: bool) -> dict[str, Tensor]:
        """Pad gathered rows to one batch: inputs_embeds, attention_mask and position_ids."""
        length = max(len(embeds) for embeds, _ in parts)
        device = parts[0][0].device

        def pad(part: Tensor) -> Tensor:
            missing = length - part.shape[-1]
            return torch.nn.functional.pad(part, (missing, 0) if left else (0, missing))

        mask = torch.stack([pad(torch.ones(len(e), dtype=torch.long)) for e, _ in parts])
        return {
            "inputs_embeds": torch.stack([pad(embeds.mT).mT for embeds, _ in parts]),
            "attention_mask": mask.to(device),
            "position_ids": torch.stack([pad(p) for _, p in parts], -2).to(device),
        }

    def _selects(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether this call brings a new prompt with a video."""
        if kwargs.get("input_ids") is None or kwargs.get("inputs_embeds") is not None:
            return False
        if not self.architecture.has_video(kwargs):
            return False
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            raise PromptError(
                "A new video cannot be selected from on top of a cached prompt. Pass the whole "
                "conversation without past_key_values."
            )
        return True

    def _prepare(
        self, kwargs: dict[str, Any], left: bool
    ) -> tuple[dict[str, Tensor], dict[str, Any], list[Tensor]]:
        """Turn a processor's batch into the prefill of what stays, and the caller's options."""
        requests = self.architecture.read(kwargs)
        self.selections = []
        parts = []
        for request in requests:
            encoded = self._encode(request)
            self.selections.append(self.select(encoded))
            parts.append(self.gather(encoded, self.selections[-1]))
        dropped = {"input_ids", "attention_mask", "position_ids", *self.architecture.vision_inputs}
        options = {name: value for name, value in kwargs.items() if name not in dropped}
        return self.prefill(parts, left), options, [positions for _, positions in parts]

    def _encode(self, request: Request) -> Encoded:
        prompt = request.prompt
        if not request.pixels:
            hidden = self.architecture.embed(torch.zeros(0, dtype=torch.long)).detach().cpu()
            return Encoded(prompt, Features(hidden), ())
        selector = self.method.selector_for(self.architecture)
        features = encode(self.architecture, request.pixels, selector)
        times = tuple(
            torch.arange(clip.frames, dtype=torch.float64) * clip.seconds_per_frame
            for clip in prompt.videos
        )
        return Encoded(prompt, features, times)

    def _settings(self) -> dict[str, Any]:
        import transformers

        return {
            "family": self.architecture.family,
            "model": self._model.config._name_or_path,
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }


def kept_rows(prompt: Prompt, kept: Tensor) -> Tensor:
    """Token indices that stay when only the visual tokens ``kept`` do: int64, ascending.

    Text stays, except what belongs to a frame of which no visual token is kept.
    """
    layout = prompt.layout
    rows = prompt.visual_rows()[kept]
    keep = (layout.frame == NONE) & ~layout.visual
    keep[rows] = True
    for video, clip in enumerate(prompt.videos):
        mine = ((layout.video == video) & (layout.frame != NONE)).nonzero()[:, 0]
        shown = torch.zeros(clip.frames, dtype=torch.bool)
        shown[layout.frame[mine[keep[mine]]]] = True
        keep[mine] |= shown[layout.frame[mine]] & ~layout.visual[mine]
    return keep.nonzero()[:, 0]


def _like(original: Callable[..., Any], replacement: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return replacement(*args, **kwargs)

    return call


def _count_new_tokens(kwargs: dict[str, Any], default: Any, prompt_length: int) -> dict[str, Any]:
    """Restate ``max_length``, which counts the caller's prompt, as ``max_new_tokens``.

    Stock generation would count the shorter, selected prompt.
    """
    config = kwargs.get("generation_config") or default
    if kwargs.get("max_new_tokens") is not None or config.max_new_tokens is not None:
        return kwargs
    limit = kwargs.get("max_length", config.max_length)
    if limit is None:
        return kwargs
    if limit <= prompt_length:
        raise OptionError(
            f"max_length={limit} leaves no room after a prompt of {prompt_length} tokens. Set "
            "max_new_tokens instead."
        )
    config = copy.deepcopy(config)
    config.max_length, config.max_new_tokens = None, limit - prompt_length
    rest = {name: value for name, value in kwargs.items() if name != "max_length"}
    return {**rest, "generation_config": config}
