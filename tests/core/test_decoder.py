"""Query and key states at the reference layer against what the stock decoder computes inside."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, Qwen2Config, Qwen2Model, Qwen3Config, Qwen3Model

from flexselect.core import decoder
from flexselect.core.decoder import (
    LayerStates,
    check_layer,
    device_of,
    forget_length,
    full_layers,
    layer_states,
    listening,
    reference_states,
    weight_of,
)
from flexselect.core.errors import CheckpointError, OptionError, UnsupportedModelError
from flexselect.core.relevance import relevance

SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
DECODERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaModel, LlamaConfig, {}),
    "llama-biased": (LlamaModel, LlamaConfig, {"attention_bias": True}),
    "qwen2": (Qwen2Model, Qwen2Config, {}),
    "qwen3": (Qwen3Model, Qwen3Config, {}),
    "yarn": (
        Qwen2Model,
        Qwen2Config,
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
}


def build(name: str, attention: str = "sdpa", **more: Any) -> Any:
    cls, config, options = DECODERS[name]
    torch.manual_seed(0)
    decoder = cls._from_config(
        config(**SIZES, **options, **more), attn_implementation=attention
    ).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.4 if parameter.ndim > 1 else 1.0))
    return decoder


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("name", DECODERS)
def test_weights_are_those_of_the_layers_own_attention(
    name: str, layer: int, attention: str
) -> None:
    """Two sets with positions of their own; every token but one is looked at."""
    embeds = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))
    positions = torch.stack([torch.arange(9), torch.arange(9) * 3 + 5])
    rows = torch.tensor([3, 6, 8])
    columns = torch.arange(1, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    with torch.no_grad():
        out = build(name, "eager")(
            inputs_embeds=embeds,
            position_ids=positions,
            attention_mask=mask,
            output_attentions=True,
        )
        query, key = reference_states(build(name, attention), embeds, positions, layer, rows)
    assert query.shape == (2, 4, 3, 8)
    assert key.shape == (2, 2, 9, 8)
    expected = out.attentions[layer][:, :, rows][..., columns].amax((1, 2))
    torch.testing.assert_close(relevance(query, key, rows, columns), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_keys_made_in_blocks_are_the_same_keys(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine tokens, in one block and in blocks of two; no norm sees more than a block."""
    block = build(name)
    embeds = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))
    positions, rows = torch.arange(9).expand(2, -1), torch.tensor([3, 6, 8])
    widths: list[int] = []
    norm = block.layers[1].input_layernorm
    norm.register_forward_pre_hook(lambda _, states: widths.append(states[0].shape[1]))
    with torch.no_grad():
        query, key = reference_states(block, embeds, positions, 1, rows)
        monkeypatch.setitem(decoder._BLOCK_BYTES, "cpu", 2 * (2 * 32 * 4))
        again = reference_states(block, embeds, positions, 1, rows)
    torch.testing.assert_close(again, (query, key), rtol=1e-6, atol=1e-6)
    assert widths == [3, 9, 3, 2, 2, 2, 2, 1]


def test_layers_above_are_never_run() -> None:
    decoder = build("qwen2")
    ran: list[int] = []
    for index, block in enumerate(decoder.layers):
        block.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
    embeds = torch.randn(1, 5, 32)
    with torch.no_grad():
        reference_states(decoder, embeds, torch.arange(5)[None], 2, torch.tensor([4]))
    assert ran == [0, 1]


def test_the_decoder_runs_whole_afterwards() -> None:
    decoder = build("qwen2")
    embeds = torch.randn(1, 5, 32)
    mask = torch.ones(1, 5, dtype=torch.long)

    def run() -> Tensor:
        with torch.no_grad():
            return decoder(inputs_embeds=embeds, attention_mask=mask).last_hidden_state

    before = run()
    with torch.no_grad():
        reference_states(decoder, embeds, torch.arange(5)[None], 1, torch.tensor([4]))
    assert torch.equal(run(), before)


# -- listening -------------------------------------------------------------------------------------


def drawn(sets: int, tokens: int) -> Tensor:
    return torch.randn(sets, tokens, 32, generator=torch.Generator().manual_seed(tokens))


def run(decoder: Any, embeds: Tensor, positions: Tensor | None = None, **options: Any) -> Tensor:
    mask = torch.ones(embeds.shape[:2], dtype=torch.long)
    if positions is None:
        positions = torch.arange(embeds.shape[1]).expand(len(embeds), -1)
    with torch.no_grad():
        out = decoder(inputs_embeds=embeds, position_ids=positions, attention_mask=mask, **options)
    return out.last_hidden_state


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("name", DECODERS)
def test_states_heard_are_those_of_a_walk(name: str, layer: int, attention: str) -> None:
    """Of three rows, the first; with positions that have gaps."""
    decoder = build(name, attention)
    embeds, rows = drawn(3, 9), torch.tensor([3, 8])
    positions = torch.stack([torch.arange(9) * step + 5 for step in (3, 1, 2)])
    silent = run(decoder, embeds, positions)
    heard: list[LayerStates] = []
    with listening(decoder, [layer], 9, rows, heard.append):
        assert torch.equal(run(decoder, embeds, positions), silent)
        run(decoder, embeds * 2, positions)
    [states] = heard
    with torch.no_grad():
        query, key = reference_states(decoder, embeds[:1], positions[:1], layer, rows)
    assert states.layer == layer
    assert states.hidden.shape == (1, 9, 32)
    torch.testing.assert_close((states.query, states.key), (query, key), rtol=1e-5, atol=1e-5)


def test_states_given_by_name_are_heard() -> None:
    decoder = build("qwen2")
    embeds, rows = drawn(1, 5), torch.tensor([4])
    cos_sin = decoder.rotary_emb(embeds, torch.arange(5)[None])
    heard: list[LayerStates] = []
    with listening(decoder, [1], 5, rows, heard.append), torch.no_grad():
        decoder.layers[1](hidden_states=embeds, attention_mask=None, position_embeddings=cos_sin)
    assert torch.equal(heard[0].hidden, embeds)


def test_the_first_pass_of_the_length_is_heard_and_no_other() -> None:
    decoder = build("qwen2")
    heard: list[LayerStates] = []
    rows = torch.tensor([0])
    with listening(decoder, [0], 5, rows, heard.append):
        for tokens in (1, 4, 6):
            run(decoder, drawn(1, tokens))
        assert heard == []
        run(decoder, drawn(1, 5))
        run(decoder, 2 * drawn(1, 5))
        assert not decoder.layers[0]._forward_pre_hooks
    [states] = heard
    assert torch.equal(states.hidden, drawn(1, 5))


def test_several_layers_are_heard_on_one_pass() -> None:
    decoder, embeds, rows = build("qwen2"), drawn(1, 5), torch.tensor([4])
    heard: list[LayerStates] = []
    with listening(decoder, (2, 0), 5, rows, heard.append):
        run(decoder, embeds)
        assert not any(layer._forward_pre_hooks for layer in decoder.layers)
    assert [states.layer for states in heard] == [0, 2]
    with torch.no_grad():
        walk = layer_states(decoder, embeds, torch.arange(5)[None], (0, 2), rows)
        for states, expected in zip(heard, walk, strict=True):
            torch.testing.assert_close(states.key, expected.key, rtol=1e-5, atol=1e-5)


def test_layers_of_full_attention_are_told_from_sliding_ones() -> None:
    decoder = build("qwen2")
    assert full_layers(decoder) == [0, 1, 2]
    decoder.config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    assert full_layers(decoder) == [0, 2]
    decoder.config.layer_types = None
    assert full_layers(decoder) == [0, 1, 2]
    # A model that was cut in depth, or made deeper, keeps the config it had.
    decoder.config.layer_types = ["full_attention", "sliding_attention"] * 3
    assert full_layers(decoder) == [0, 2]
    decoder.config.layer_types = ["sliding_attention"]
    assert full_layers(decoder) == [1, 2]


def test_a_pass_of_another_thread_is_not_heard() -> None:
    decoder = build("qwen2")
    heard: list[LayerStates] = []
    with listening(decoder, [0], 5, torch.tensor([4]), heard.append):
        other = threading.Thread(target=run, args=(decoder, 2 * drawn(1, 5)))
        other.start()
        other.join()
        assert heard == []
        run(decoder, drawn(1, 5))
    assert torch.equal(heard[0].hidden, drawn(1, 5))


def test_a_listener_of_another_thread_may_leave_during_a_pass() -> None:
    """Torch has it on its list by then, but calls it without the keywords it asked for."""
    decoder, rows = build("qwen2"), torch.tensor([4])
    there, leave = threading.Event(), threading.Event()
    heard: list[LayerStates] = []

    def listen() -> None:
        with listening(decoder, [0], 5, rows, heard.append):
            there.set()
            leave.wait()

    other = threading.Thread(target=listen)

    def hear(states: LayerStates) -> None:
        heard.append(states)
        leave.set()
        other.join()

    with listening(decoder, [0], 5, rows, hear):
        other.start()
        there.wait()
        run(decoder, drawn(1, 5))
    [states] = heard
    assert torch.equal(states.hidden, drawn(1, 5))


def test_a_pass_that_is_compiled_whole_is_not_heard() -> None:
    """Listening in on it would break the graph, and with it a caller's fullgraph=True."""
    decoder = build("qwen2")
    layer = torch.compile(decoder.layers[0], backend="eager", fullgraph=True)
    embeds = drawn(1, 5)
    cos_sin = decoder.rotary_emb(embeds, torch.arange(5)[None])
    heard: list[LayerStates] = []
    with torch.no_grad():
        expected = decoder.layers[0](embeds, attention_mask=None, position_embeddings=cos_sin)
        with listening(decoder, [0], 5, torch.tensor([4]), heard.append):
            out = layer(embeds, attention_mask=None, position_embeddings=cos_sin)
    torch.testing.assert_close(out, expected)
    assert heard == []


def test_a_listener_is_gone_after_an_error() -> None:
    decoder = build("qwen2")

    def fail(_: LayerStates) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), listening(decoder, [1], 5, torch.tensor([4]), fail):
        run(decoder, drawn(1, 5))
    assert not decoder.layers[1]._forward_pre_hooks
    with pytest.raises(ZeroDivisionError), listening(decoder, [1], 5, torch.tensor([4]), fail):
        raise ZeroDivisionError
    assert not decoder.layers[1]._forward_pre_hooks


def test_a_dynamic_rope_remembers_no_longer_prompt() -> None:
    """Its frequencies stretch with the longest sequence seen, here beyond 8 tokens."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    decoder = build("llama", rope_parameters=rope, max_position_embeddings=8)

    def states(tokens: int) -> Tensor:
        draw = torch.Generator().manual_seed(tokens)
        embeds = torch.randn(1, tokens, 32, generator=draw)
        positions, rows = torch.arange(tokens)[None], torch.arange(tokens)
        with torch.no_grad():
            return torch.cat(reference_states(decoder, embeds, positions, 1, rows), 1)

    fresh = states(12)
    longer = states(30)
    assert not torch.equal(decoder.rotary_emb.inv_freq, decoder.rotary_emb.original_inv_freq)
    assert torch.equal(states(12), fresh)
    assert torch.equal(states(30), longer)
    decoder.rotary_emb(torch.zeros(1, 30, 32), torch.arange(30)[None])
    forget_length(decoder)
    assert torch.equal(decoder.rotary_emb.inv_freq, decoder.rotary_emb.original_inv_freq)


def test_sliding_window_below_the_reference_layer() -> None:
    sliding: dict[str, Any] = {
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
    }
    decoder = build("qwen2", **sliding)
    assert decoder.config.layer_types == [
        "full_attention",
        "sliding_attention",
        "sliding_attention",
    ]
    arguments = torch.randn(1, 5, 32), torch.arange(5)[None]
    with torch.no_grad():
        reference_states(decoder, *arguments, 0, torch.tensor([4]))
    with pytest.raises(UnsupportedModelError, match="use_sliding_window"):
        reference_states(decoder, *arguments, 1, torch.tensor([4]))


@pytest.mark.parametrize("layer", [0, 27])
def test_layers_of_the_decoder(layer: int) -> None:
    assert check_layer(layer, 28) == layer


@pytest.mark.parametrize("layer", [-1, 28, None, "3", 3.0, True])
def test_layers_that_are_not(layer: object) -> None:
    with pytest.raises(OptionError, match=r"from 0 to 27 .*28 decoder layers") as error:
        check_layer(layer, 28)
    assert repr(layer) in str(error.value)


def test_device_of_offloaded_weights_is_where_they_compute() -> None:
    layer = nn.Linear(2, 2, device="meta")
    assert device_of(layer) == torch.device("meta")

    class Hook:
        execution_device = "cpu"

    layer._hf_hook = Hook()  # type: ignore[assignment]
    assert device_of(layer) == torch.device("cpu")


def test_weight_of_offloaded_modules() -> None:
    module: Any = nn.Module()
    module.scale = nn.Parameter(torch.arange(3.0))
    assert weight_of(module, "scale") is module.scale
    hook = SimpleNamespace(weights_map={"scale": torch.arange(3.0)})
    module.scale = nn.Parameter(torch.empty(3, device="meta"))
    for attached in (hook, SimpleNamespace(hooks=[SimpleNamespace(), hook])):
        module._hf_hook = attached
        assert torch.equal(weight_of(module, "scale"), torch.arange(3.0))
    module._hf_hook = SimpleNamespace(weights_map=None)
    with pytest.raises(CheckpointError, match="scale has no values"):
        weight_of(module, "scale")
