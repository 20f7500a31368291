"""Floating-point operations of each stage, counted from shapes, and the machine's matrix rate.

A multiplication with an addition counts as two. With h the hidden size, q and k the widths of the
query and key projections, m the width of the MLP, v the vocabulary, L the layers and n the tokens
of a sequence:

- a layer's projections: ``2 n (h q + 2 h k + q h + 3 h m)``
- a layer's causal attention: ``4 q n (n + 1) / 2``, since a token sees itself and what is before
- prefill: L of both, and ``2 h v`` for the one row of logits that is read
- scoring a set at layer l with t asking tokens: l of both, ``2 n h k + 2 t h q`` for the
  projections of layer l, and ``2 q t n`` for the scores; nothing else of layer l is run
- a further token after n tokens: ``2 L (2 h q + 2 h k + 3 h m) + 4 L q n + 2 h v``

Norms, softmax, rotations and activations are left out: they are less than a hundredth. What the
vision tower does is counted by torch while it encodes one frame.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from statistics import median
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flexselect.core.architecture import Architecture, Pixels


def widths(config: Any) -> tuple[int, int, int, int]:
    """Return h, q, k and m of a text model's config."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys = config.num_key_value_heads * head_dim
    return config.hidden_size, heads * head_dim, keys, config.intermediate_size


def layer_flops(config: Any, tokens: int) -> int:
    """Count one decoder layer over a sequence of ``tokens``."""
    h, q, k, m = widths(config)
    return 2 * tokens * (2 * h * q + 2 * h * k + 3 * h * m) + 2 * q * tokens * (tokens + 1)


def score_flops(config: Any, layer: int, sets: Iterable[tuple[int, int]]) -> int:
    """Count scoring at ``layer``; ``sets`` gives the tokens and the asking tokens of each."""
    h, q, k, _ = widths(config)
    return sum(
        layer * layer_flops(config, tokens) + 2 * tokens * h * k + 2 * text * q * (h + tokens)
        for tokens, text in sets
    )


def prefill_flops(config: Any, tokens: int) -> int:
    """Count the pass over ``tokens`` up to the logits of the last one."""
    head = 2 * config.hidden_size * config.vocab_size
    return config.num_hidden_layers * layer_flops(config, tokens) + head


def token_flops(config: Any, tokens: int) -> int:
    """Count one further token after ``tokens``."""
    h, q, k, m = widths(config)
    layer = 2 * (2 * h * q + 2 * h * k + 3 * h * m) + 4 * q * tokens
    return config.num_hidden_layers * layer + 2 * h * config.vocab_size


@torch.no_grad()
def encode_flops(architecture: Architecture, pixels: Pixels, selector: Any | None) -> float:
    """Count tower and projectors, a frame."""
    # Torch counts matrix products; a fused attention kernel would hide its own on some devices.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        architecture.encode(pixels.frames(0, 1), selector)
    return float(counter.get_total_flops())


def matrix_rate(device: torch.device, dtype: torch.dtype, repeats: int = 9) -> dict[str, float]:
    """Measure the rate of large matrix products, in operations a second.

    Returns
    -------
    ``wall``, by elapsed time, and ``cpu``, by processor time: a CPU's rate a core, whatever else
    keeps the machine busy. The median of ``repeats``.
    """
    size = 1536 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    a @ b
    walls, cpus = [], []
    for _ in range(repeats):
        _synchronize(device)
        wall, cpu = time.perf_counter(), time.process_time()
        a @ b
        _synchronize(device)
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    flops = 2 * size**3
    return {"size": size, "wall": flops / median(walls), "cpu": flops / max(median(cpus), 1e-9)}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
