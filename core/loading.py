"""What loading has in common in all families: no weight is left random, no size goes unchecked."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint, Convert, load_into, some
from .errors import CheckpointError, UnsupportedModelError

#: Where the layers of the text model are in the classes of every family.
LAYERS = "model.language_model.layers"

#: What a published selector's flat config.json says about its text model, rope aside.
TEXT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "use_sliding_window",
)


def load_pretrained(
    cls: Any,
    folder: Path,
    dtype: torch.dtype | None,
    device_map: Any,
    attn_implementation: str | None,
) -> Any:
    """Load a checkpoint in the layout of transformers, all of it and nothing else.

    Parameters
    ----------
    cls : the transformers class, with ``from_pretrained``.
    folder, dtype, device_map, attn_implementation : as in `Architecture.load_model`; also a map of
        `without_layers`.

    Raises
    ------
    CheckpointError
        A file is damaged, or a key or shape does not match; transformers would only report those
        and leave random weights in their place.
    """
    Checkpoint(folder)  # names missing and damaged files better than what follows would
    options = {
        "dtype": "auto" if dtype is None else dtype,
        "attn_implementation": attn_implementation,
        # Reported below with the rest, instead of an error that names no weight.
        "ignore_mismatched_sizes": True,
        "output_loading_info": True,
    }
    if isinstance(device_map, Mapping) and device_map.get(LAYERS) == "meta":
        model, report = _without_layers(cls, folder, device_map[""], options)
    else:
        model, report = cls.from_pretrained(folder, device_map=device_map, **options)
    wrong = {what: sorted(map(str, names)) for what, names in report.items() if names}
    if wrong:
        raise CheckpointError(
            f"{folder} does not fit {cls.__name__}: "
            + "; ".join(f"{what}: {some(names)}" for what, names in wrong.items())
        )
    return model


def without_layers(device: str) -> dict[str, str]:
    """Return a device map that leaves the decoder's layers on the meta device, unread.

    What remains encodes videos and embeds text, as training with stored scores needs it; the layers
    of a large model are nearly all of it.
    """
    return {"": device, LAYERS: "meta"}


def _without_layers(
    cls: Any, folder: Path, device: str, options: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Load all but the decoder's layers; their weights must be there all the same."""
    config = cls.config_class.from_pretrained(folder)
    text = config.get_text_config()
    whole = {name: getattr(text, name, None) for name in ("num_hidden_layers", "layer_types")}
    with torch.device("meta"):
        layers = cls._from_config(copy.deepcopy(config)).get_submodule(LAYERS)
    # To transformers this is a model without layers; every weight of theirs is then one too many.
    text.num_hidden_layers = 0
    if whole["layer_types"] is not None:
        text.layer_types = []
    with _no_report():
        model, report = cls.from_pretrained(folder, config=config, device_map=device, **options)
    for name, value in whole.items():
        if value is not None:
            setattr(text, name, value)
            setattr(model.config.get_text_config(), name, value)
    unread = {f"{LAYERS}.{name}" for name, _ in layers.named_parameters()}
    found = set(report["unexpected_keys"])
    layers.requires_grad_(False)
    model.get_submodule(LAYERS).extend(layers.to(model.dtype))
    return model, {
        **report,
        "unexpected_keys": found - unread,
        "missing_keys": {*report["missing_keys"], *(unread - found)},
    }


@contextmanager
def _no_report() -> Iterator[None]:
    """Keep transformers from logging what did not fit: here it does not fit on purpose."""
    speaker = logging.getLogger("transformers.modeling_utils")

    def silent(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    speaker.addFilter(silent)
    try:
        yield
    finally:
        speaker.removeFilter(silent)


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype | None:
    """Return the floating-point dtype of a checkpoint, None where it has several or none."""
    found = {tensor.dtype for tensor in checkpoint.blank.values() if tensor.is_floating_point()}
    return found.pop() if len(found) == 1 else None


def fill_selector(selector: Any, folder: Path, convert: Convert, model: Any, name: str) -> Any:
    """Fill a Lite selector whose parameters are on the meta device, in the model's dtype.

    Parameters
    ----------
    selector : its buffers must be real.
    folder : its checkpoint.
    convert : the family's conversion of its keys; `keep_key` for our own layout.
    model : the model it serves, whose dtype and device it takes.
    name : where it came from, for records and messages.

    Raises
    ------
    CheckpointError
        Files are missing or damaged, or keys or shapes do not match.
    """
    load_into(selector, Checkpoint(folder), convert, dtype=model.dtype, device=model.device)
    selector.name_or_path = name
    return selector.to(model.device).eval()


def copy_weights(module: nn.Module, weights: Mapping[str, Tensor], what: str) -> None:
    """Fill a module whose parameters are on the meta device with copies of another one's.

    Parameters
    ----------
    module : its buffers must be real.
    weights : name to tensor, of every parameter and of nothing else.
    what : what the weights are, for the message.

    Raises
    ------
    UnsupportedModelError
        Names or shapes differ.
    """
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in weights.items()}
    if expected != given:
        wrong = sorted(
            name for name in expected.keys() | given.keys() if expected.get(name) != given.get(name)
        )
        raise UnsupportedModelError(
            f"The weights of {what} do not fit here: {some(wrong)} are missing, too many, or of "
            "another size. Is it of another kind, or for another vision tower?"
        )
    copies = {name: value.detach().clone() for name, value in weights.items()}
    module.load_state_dict(copies, assign=True)
    for parameter in module.parameters():
        parameter.requires_grad_(True)


def keep_key(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """Convert nothing: for a checkpoint in our own layout."""
    return [(name, tensor)]


def check_class(selector: object, cls: type[nn.Module]) -> None:
    """Raise `UnsupportedModelError` unless a Lite selector is of the family's class ``cls``."""
    if not isinstance(selector, cls):
        raise UnsupportedModelError(
            f"A selector of class {type(selector).__name__} does not fit this model; give one of "
            f"class {cls.__name__}."
        )


def check_sizes(selector: Any, sizes: Mapping[str, tuple[object, object]]) -> None:
    """Compare a Lite selector with the model it shall serve.

    Parameters
    ----------
    sizes : what is compared, to (what the selector has, what the model has).

    Raises
    ------
    UnsupportedModelError
        They differ.
    """
    for what, (ours, theirs) in sizes.items():
        if ours != theirs:
            raise UnsupportedModelError(
                f"The selector {selector.name_or_path} does not fit this model: {what} {ours}, "
                f"the model has {theirs}."
            )
