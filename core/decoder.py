"""Walk a decoder up to its reference layer, or listen there, and take its query and key states.

Works on any module built like transformers' Llama and Qwen2 text models: ``layers`` with
``input_layernorm`` and ``self_attn.{q_proj,k_proj}``, and a ``rotary_emb``. Attention weights are
never asked for, so any attention kernel serves.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .errors import CheckpointError, OptionError, UnsupportedModelError

#: Bytes of hidden states that are normed at a time at a reference layer.
_BLOCK_BYTES = {"cpu": 16 << 20, "other": 256 << 20}


@dataclass(frozen=True, eq=False)
class LayerStates:
    """What one decoder layer works with.

    Attributes
    ----------
    layer : the layer, 0-based.
    hidden : ``(sets, tokens, hidden)``, what the layer reads.
    query : ``(sets, heads, text, head_dim)``, rotated, of the tokens that ask.
    key : ``(sets, kv_heads, tokens, head_dim)``, rotated.
    """

    layer: int
    hidden: Tensor
    query: Tensor
    key: Tensor


def check_layer(layer: object, layers: int) -> int:
    """Return ``layer`` as a 0-based reference layer of a decoder with ``layers``, or raise."""
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < layers:
        raise OptionError(
            f"layer must be a whole number from 0 to {layers - 1} (the model has {layers} decoder "
            f"layers, counted from 0), got {layer!r}."
        )
    return layer


def reference_states(
    decoder: Any,
    embeds: Tensor,
    positions: Tensor,
    layer: int,
    query_rows: Tensor,
    added: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """Run layers 0 … ``layer`` - 1, then only the norm and projections of ``layer``.

    Parameters
    ----------
    decoder : the text model.
    embeds : ``(sets, tokens, hidden)``, without padding.
    positions : int64, as ``decoder.rotary_emb`` takes them: ``(sets, tokens)`` or
        ``(axes, sets, tokens)``.
    layer : the reference layer, 0-based.
    query_rows : int64 ``(text,)``, tokens whose query states are wanted.
    added : for a model that looks again, ``(sets, tokens, hidden)`` each: added to what layer 0,
        layer 1, … put out.

    Returns
    -------
    query ``(sets, heads, text, head_dim)`` and key ``(sets, kv_heads, tokens, head_dim)``, rotated.
    """
    states = next(layer_states(decoder, embeds, positions, (layer,), query_rows, added))
    return states.query, states.key


def layer_states(
    decoder: Any,
    embeds: Tensor,
    positions: Tensor,
    layers: Collection[int],
    query_rows: Tensor,
    added: Sequence[Tensor] = (),
) -> Iterator[LayerStates]:
    """Take the states of several layers on one walk, lowest first; else as `reference_states`.

    Nothing runs above the highest of ``layers``, and a layer's states can be let go of before the
    next one's are made.
    """
    wanted, highest = set(layers), max(layers)
    if not set(range(highest + 1)) <= set(full_layers(decoder)):
        raise UnsupportedModelError(
            "This model uses sliding-window attention below its reference layer; relevance is "
            "defined over full attention. Set use_sliding_window to false in its config."
        )
    forget_length(decoder)
    cos_sin = decoder.rotary_emb(embeds, positions)
    mask = _causal_mask(embeds, decoder.config._attn_implementation)
    hidden = embeds
    for index, block in enumerate(decoder.layers[: highest + 1]):
        hidden = _follow(hidden, block)
        if index in wanted:
            query, key = _query_and_key(block, hidden, cos_sin, query_rows)
            yield LayerStates(index, hidden, query, key)
        if index < highest:
            hidden = block(hidden, attention_mask=mask, position_embeddings=cos_sin)
            if index < len(added):
                hidden = hidden + added[index].to(hidden.device, hidden.dtype)


@contextmanager
def listening(
    decoder: Any,
    layers: Collection[int],
    tokens: int,
    query_rows: Tensor,
    heard: Callable[[LayerStates], object],
) -> Iterator[None]:
    """Take the states of layers out of the next pass that the model makes by itself.

    The pass computes what it would without a listener, and nothing is run twice but the layers'
    norms and their query and key projections. The listener is gone from a layer once it heard a
    pass there, and from all when this is left, also by an error.

    Parameters
    ----------
    decoder : the text model. A hook of each of the layers is held meanwhile.
    layers : the layers to listen at, 0-based.
    tokens : length of the pass that is meant, without padding. Another one, such as that of a
        single new token or of a chunk of the prompt, is not heard; nor is one of another thread,
        which may be answering from the same model, nor one of compiled layers.
    query_rows : int64 ``(text,)``, tokens whose query states are wanted.
    heard : called with the states of the first row of the batch, while the layer waits: what it
        does not keep of them is let go of. Beams repeat the prompt, so the other rows are the same.
    """
    thread = threading.get_ident()
    handles: dict[int, Any] = {}

    def hear(
        layer: int, block: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
    ) -> None:
        # Keywords are missing where this was taken away, in its own thread, while another thread
        # was calling the layer's hooks: not a pass that is meant.
        if torch.compiler.is_compiling() or threading.get_ident() != thread or kwargs is None:
            return
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.shape[1] != tokens:
            return
        handles[layer].remove()
        hidden = _follow(hidden[:1], block)
        cos, sin = kwargs["position_embeddings"]
        query, key = _query_and_key(block, hidden, (cos[:1], sin[:1]), query_rows)
        heard(LayerStates(layer, hidden, query, key))

    try:
        for layer in layers:
            block = decoder.layers[layer]
            handles[layer] = block.register_forward_pre_hook(partial(hear, layer), with_kwargs=True)
        yield
    finally:
        for handle in handles.values():
            handle.remove()


def full_layers(decoder: Any) -> list[int]:
    """List the layers that attend to everything before a token, not to a sliding window."""
    kinds = getattr(decoder.config, "layer_types", None) or []
    sliding = {layer for layer, kind in enumerate(kinds) if kind == "sliding_attention"}
    # The config of a model whose depth was changed may name more layers than there are, or fewer.
    return [layer for layer in range(len(decoder.layers)) if layer not in sliding]


def _query_and_key(
    block: Any, hidden: Tensor, cos_sin: tuple[Tensor, Tensor], query_rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Run the norm and the query and key projections of one layer, and rotate.

    Queries are made of ``query_rows`` alone. Keys are made a block of tokens at a time: a norm
    needs several copies of what it reads, which is as wide as the model, and a key is narrow.
    """
    attention = block.self_attn
    cos, sin = (part.to(hidden.device)[:, None] for part in cos_sin)

    def rotated(name: str, rows: Tensor | slice) -> Tensor:
        project = getattr(attention, f"{name}_proj")
        states = _heads(project(block.input_layernorm(hidden[:, rows])), attention.head_dim)
        if hasattr(attention, f"{name}_norm"):
            states = getattr(attention, f"{name}_norm")(states)
        return _rotate(states, cos[:, :, rows], sin[:, :, rows])

    query = rotated("q", query_rows.to(hidden.device))
    sets, tokens, width = hidden.shape
    limit = _BLOCK_BYTES["cpu" if hidden.device.type == "cpu" else "other"]
    step = max(1, limit // (sets * width * hidden.element_size()))
    keys = [rotated("k", slice(start, start + step)) for start in range(0, tokens, step)]
    return query, keys[0] if len(keys) == 1 else torch.cat(keys, 2)


def forget_length(decoder: Any) -> None:
    """Let a dynamic-NTK rope start anew.

    It stretches to the longest sequence it has met and stays there for shorter ones, so without
    this a result would depend on what the model read before. Other ropes remember nothing.
    """
    rope = decoder.rotary_emb
    if rope.rope_type == "dynamic":
        rope.inv_freq = rope.original_inv_freq.to(rope.inv_freq.device)
        rope.max_seq_len_cached = rope.original_max_seq_len


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes, also when accelerate keeps its weights elsewhere meanwhile."""
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(module.parameters()).device


def weight_of(module: nn.Module, name: str) -> Tensor:
    """Return a module's own weight, also when accelerate keeps its values elsewhere meanwhile."""
    weight: Tensor = getattr(module, name)
    if not weight.is_meta:
        return weight
    hook: Any = module._hf_hook
    for part in getattr(hook, "hooks", [hook]):
        weights = getattr(part, "weights_map", None)
        if weights is not None and name in weights:
            return weights[name]
    raise CheckpointError(f"The weight {name} has no values. Load the model again.")


def _follow(hidden: Tensor, block: nn.Module) -> Tensor:
    """Move states to the device of the layer they meet; layers may be spread over several."""
    return hidden.to(device_of(block))


def _heads(states: Tensor, head_dim: int) -> Tensor:
    return states.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = states.chunk(2, -1)
    return states * cos + torch.cat((-high, low), -1) * sin


def _causal_mask(embeds: Tensor, kernel: str) -> Tensor | None:
    """Additive mask ``(1, 1, tokens, tokens)`` for a kernel that is not causal by itself."""
    if kernel == "sdpa" or "flash" in kernel:
        return None
    if kernel != "eager":
        raise UnsupportedModelError(
            f"Relevance cannot be scored with attn_implementation={kernel!r}. Load the model with "
            "'sdpa', 'eager' or a flash attention."
        )
    tokens = embeds.shape[1]
    mask = embeds.new_full((1, 1, tokens, tokens), torch.finfo(embeds.dtype).min)
    return mask.triu(1)
