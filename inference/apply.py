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
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import Cache

from ..core.architecture import Architecture
from ..core.errors import FlexSelectError, OptionError, PromptError
from ..core.selection import Selection
from .engine import Engine
from .methods import FlexSelect, Method

_PATCHED = ("generate", "forward")

#: Options of generation under which stock code would not read the embeddings it is given.
_REREADING = (
    "assistant_model",
    "assistant_early_exit",
    "prompt_lookup_num_tokens",
    "prefill_chunk_size",
)


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
    model.flexselect = Applied(Engine(model, method or method_from(FlexSelect, knobs)))
    return model


def remove(model: Any) -> Any:
    """Undo `apply`: the model's methods are its own again. Harmless where nothing is applied.

    Raises `FlexSelectError` where something else was put on top meanwhile.
    """
    if is_applied(model):
        model.flexselect.detach(model)
        del model.flexselect
    return model


def is_applied(model: Any) -> bool:
    """Whether a method is applied to ``model``."""
    return isinstance(getattr(model, "__dict__", {}).get("flexselect"), Applied)


def method_from(method: type[Method], knobs: Mapping[str, Any]) -> Method:
    """Build a method from named knobs, or raise `OptionError` naming those it does not have."""
    known = [field.name for field in dataclasses.fields(method)]
    unknown = sorted(set(knobs) - set(known))
    if unknown:
        raise OptionError(f"{method.name} has no knob {', '.join(unknown)}; its knobs are {known}.")
    return method(**knobs)


class Applied:
    """A method at work on a model; found as ``model.flexselect``.

    Attributes
    ----------
    engine : what does the work.
    selections : one `Selection` (or None for a prompt without video) a row of the latest call.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.selections: list[Selection | None] = []
        # For the cache of a selected prompt: by row, the next position less the cached tokens.
        self._following: WeakKeyDictionary[Cache, Tensor] = WeakKeyDictionary()
        model = engine.model
        self._before = {name: model.__dict__.get(name) for name in _PATCHED}
        #: The model's own methods, which do not select.
        self.stock_generate = model.generate
        self.stock_forward = model.forward
        # The originals' signatures stay visible: stock generation inspects forward's.
        model.generate = _like(self.stock_generate, self._generate)
        model.forward = _like(self.stock_forward, self._forward)

    @property
    def method(self) -> Method:
        """The method, every knob filled."""
        return self.engine.method

    @property
    def architecture(self) -> Architecture:
        """The family's view of the model."""
        return self.engine.architecture

    def detach(self, model: Any) -> None:
        """Give ``model`` its own methods back, or raise where something was put on top of ours."""
        for name in _PATCHED:
            # A copy of the model has copies of ours.
            bound = getattr(model.__dict__.get(name), "func", None)
            if getattr(bound, "__func__", None) is not getattr(Applied, f"_{name}"):
                raise FlexSelectError(
                    f"{name} of this model was replaced after a method was applied. Undo that "
                    "first, then call flexselect.remove(model)."
                )
        for name, value in self._before.items():
            if value is None:
                delattr(model, name)
            else:
                setattr(model, name, value)

    @torch.no_grad()
    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """Answer from the selected tokens; the prompt's ids still lead what is returned."""
        kwargs = _by_name(self.stock_generate, args, kwargs)
        if kwargs.get("input_ids") is None and kwargs.get("inputs") is not None:
            kwargs["input_ids"] = kwargs.pop("inputs")
        if not self._selects(kwargs):
            return self.stock_generate(**kwargs)
        default = self.engine.model.generation_config
        check_decoding(kwargs, default)
        ids = kwargs["input_ids"]
        prefill, options, _ = self._prepare(kwargs, left=True)
        options = count_new_tokens(options, default, ids.shape[1])
        # With ids beside the embeddings, stock generation reads the embeddings once and goes on
        # from the ids: they lead the output, reach the streamer and the logits processors.
        with self.architecture.reading(prefill) as inputs:
            return self.stock_generate(input_ids=ids, **inputs, **options)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model on the selected tokens; logits are those of the shorter prompt."""
        kwargs = _by_name(self.stock_forward, args, kwargs)
        if not self._selects(kwargs):
            return self.stock_forward(**self._continued(kwargs))
        if kwargs.get("labels") is not None:
            raise OptionError(
                "labels cannot be used while a method is applied: dropped tokens have no logits. "
                "Call flexselect.remove(model) before training it."
            )
        mask = kwargs.get("attention_mask")
        left = mask is None or bool(mask[:, -1].all())
        prefill, options, positions = self._prepare(kwargs, left)
        with self.architecture.reading(prefill) as inputs:
            out = self.stock_forward(**inputs, **options)
        values = out if isinstance(out, tuple) else out.values()
        for cache in (value for value in values if isinstance(value, Cache)):
            following = torch.stack([part.amax(-1) + 1 for part in positions], -1)
            self._following[cache] = following - prefill["inputs_embeds"].shape[1]
        return out

    def _continued(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Give tokens after a selected prompt the positions that follow it, as `generate` does.

        Left alone, the model would count the tokens of its cache.
        """
        cache = kwargs.get("past_key_values")
        tokens = kwargs.get("input_ids")
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        if cache is None or tokens is None or kwargs.get("position_ids") is not None:
            return kwargs
        if cache not in self._following:
            return kwargs
        counted = int(cache.get_seq_length()) + torch.arange(tokens.shape[1])
        positions = self._following[cache][..., None] + counted
        return {**kwargs, "position_ids": positions.to(tokens.device)}

    def _selects(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether this call brings a new prompt with a video."""
        if kwargs.get("input_ids") is None or kwargs.get("inputs_embeds") is not None:
            return False
        cache = kwargs.get("past_key_values")
        cached = cache is not None and cache.get_seq_length() > 0
        if not self.architecture.has_video(kwargs):
            if not cached:
                self.selections = [None] * len(kwargs["input_ids"])
            return False
        if cached:
            raise PromptError(
                "A new video cannot be selected from on top of a cached prompt. Pass the whole "
                "conversation without past_key_values."
            )
        return True

    def _prepare(
        self, kwargs: dict[str, Any], left: bool
    ) -> tuple[dict[str, Tensor], dict[str, Any], list[Tensor]]:
        """Turn a processor's batch into the prefill of what stays, and the caller's options."""
        selections, parts = [], []
        for request in self.architecture.read(kwargs):
            encoded = self.engine.encode(request)
            selections.append(self.engine.select(encoded))
            parts.append(self.engine.gather(encoded, selections[-1]))
        # Assigned whole: another thread may be answering from the same model.
        self.selections = selections
        taken = {"input_ids", "attention_mask", "position_ids", *self.architecture.vision_inputs}
        options = {name: value for name, value in kwargs.items() if name not in taken}
        return self.engine.prefill(parts, left), options, [positions for _, positions in parts]


def check_decoding(options: Mapping[str, Any], default: Any) -> None:
    """Raise `OptionError` for a way of decoding that reads the prompt again from its ids.

    The ids show every visual token; what was selected is only in the embeddings.
    """
    config = options.get("generation_config")
    for name in _REREADING:
        values = (options.get(name), getattr(config, name, None), getattr(default, name, None))
        if any(value is not None for value in values):
            raise OptionError(
                f"{name} cannot be used while a method is applied: it reads the prompt in another "
                "way than from the selected tokens. Leave it out, or call flexselect.remove(model)."
            )


def count_new_tokens(options: dict[str, Any], default: Any, prompt_length: int) -> dict[str, Any]:
    """Restate limits that count the caller's prompt as limits on the new tokens alone.

    Stock generation would count the shorter, selected prompt in ``max_length`` and ``min_length``.
    """
    config = options.get("generation_config")

    def setting(name: str) -> Any:
        values = (options.get(name), getattr(config, name, None), getattr(default, name))
        return next((value for value in values if value is not None), None)

    restated = {}
    limit, least = setting("max_length"), setting("min_length")
    if limit is not None and setting("max_new_tokens") is None:
        if limit <= prompt_length:
            raise OptionError(
                f"max_length={limit} leaves no room after a prompt of {prompt_length} tokens. Set "
                "max_new_tokens instead."
            )
        restated["max"] = limit - prompt_length
    if least is not None and setting("min_new_tokens") is None:
        restated["min"] = max(0, least - prompt_length)
    gone = {f"{end}_length" for end in restated}
    options = {name: value for name, value in options.items() if name not in gone}
    values = {f"{end}_new_tokens": value for end, value in restated.items()}
    if config is None:
        return {**options, **values}
    config = copy.deepcopy(config)
    config.update(**values, **dict.fromkeys(gone))
    return {**options, "generation_config": config}


def _by_name(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Name positional arguments after the parameters of ``function``."""
    return {**dict(zip(inspect.signature(function).parameters, args, strict=False)), **kwargs}


def _like(original: Callable[..., Any], replacement: Callable[..., Any]) -> Callable[..., Any]:
    # A partial, not a function: a deep copy of the model then gets methods of its own.
    return functools.update_wrapper(functools.partial(replacement), original)
