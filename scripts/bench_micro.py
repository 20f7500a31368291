"""The parts that this project does its own way, each against the plain formulation.

Both run on the same inputs in the same process, one after the other. Memory is what a part needs
beyond its inputs and its result: growth of the resident set on a CPU, of what torch has allocated
on a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import Qwen2Config, Qwen2Model

from flexselect.core.decoder import reference_states
from flexselect.core.relevance import relevance
from flexselect.core.selection import map_back, select_from_sets
from flexselect.core.sets import frame_sets
from flexselect.core.spearman import spearman_loss
from flexselect.scripts.bench_meter import Peak
from flexselect.scripts.bench_spearman import make_inputs, plain_loss

#: A set of LLaVA-Video-7B: 64 frames of 210 tokens, and its text model's attention.
VISUAL, TEXT, PREFIX = 13_440, 200, 14
HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 3_584, 28, 4, 128
#: Its whole video, and how much of it stays.
FRAMES, TOKENS_PER_FRAME, BUDGET = 512, 210, 6_720
#: Of what takes less than a millisecond.
LEAST_REPEATS = 20


def measure_relevance(device: torch.device, repeats: int) -> dict[str, Any]:
    """From hidden states to scores: norm, query and key projections, rotation, softmax, maximum."""
    tokens = PREFIX + VISUAL + TEXT
    decoder = _decoder(device)
    hidden = torch.randn(1, tokens, HIDDEN, device=device)
    positions = torch.arange(tokens, device=device)[None]
    rows = torch.arange(tokens - TEXT, tokens)
    columns = torch.arange(PREFIX, PREFIX + VISUAL)

    def ours() -> Tensor:
        query, key = reference_states(decoder, hidden, positions, 0, rows)
        return relevance(query, key, rows, columns)

    def plain() -> Tensor:
        everything = torch.arange(tokens)
        query, key = reference_states(decoder, hidden, positions, 0, everything)
        return plain_relevance(query[:, :, rows], key, rows.to(device), columns)

    return _compare(ours, plain, device, repeats)


def plain_relevance(query: Tensor, key: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Every head its own keys, and all of heads x text x keys at once."""
    heads, head_dim = query.shape[1], query.shape[3]
    repeated = key.repeat_interleave(heads // key.shape[1], 1)
    scores = query @ repeated.mT * head_dim**-0.5
    ahead = torch.arange(key.shape[2], device=key.device) > rows[:, None]
    weights = scores.masked_fill(ahead, float("-inf")).softmax(-1)
    return weights[..., columns.to(key.device)].amax((1, 2))


def measure_relevance_alone(device: torch.device, repeats: int) -> dict[str, Any]:
    """From rotated queries and keys to scores, nothing before."""
    tokens = PREFIX + VISUAL + TEXT
    query = torch.randn(1, HEADS, TEXT, HEAD_DIM, device=device)
    key = torch.randn(1, KV_HEADS, tokens, HEAD_DIM, device=device)
    rows = torch.arange(tokens - TEXT, tokens)
    columns = torch.arange(PREFIX, PREFIX + VISUAL)
    return _compare(
        lambda: relevance(query, key, rows, columns),
        lambda: plain_relevance(query, key, rows.to(device), columns),
        device,
        repeats,
    )


def measure_mapping(device: torch.device, repeats: int) -> dict[str, Any]:
    """Map the best tokens of 8 sets to their places in the whole video, 6,720 of 107,520."""
    sets = _video_sets()
    quota = BUDGET // len(sets)
    draw = torch.Generator().manual_seed(0)
    best = [
        torch.randperm(len(part), generator=draw)[:quota].sort().values.to(device) for part in sets
    ]
    members = [part.to(device) for part in sets]

    def ours() -> Tensor:
        return map_back(best, members)

    def plain() -> Tensor:
        kept: list[int] = []
        for part, index in zip(members, best, strict=True):
            places = part.tolist()
            kept += [places[i] for i in index.tolist()]
        return torch.tensor(sorted(kept), device=device)

    return _compare(ours, plain, device, max(repeats, LEAST_REPEATS)) | {"syncs": count_syncs(ours)}


def measure_choice(device: torch.device, repeats: int) -> dict[str, Any]:
    """Choose the best, too: `select_from_sets` against sorting all of each set."""
    members = [part.to(device) for part in _video_sets()]
    quotas = [BUDGET // len(members)] * len(members)
    scores = torch.rand(FRAMES * TOKENS_PER_FRAME, device=device)

    def ours() -> Tensor:
        return select_from_sets(scores, members, quotas)

    def plain() -> Tensor:
        kept = [
            part[scores[part].argsort(descending=True, stable=True)[:quota]]
            for part, quota in zip(members, quotas, strict=True)
        ]
        return torch.cat(kept).sort().values

    return _compare(ours, plain, device, max(repeats, LEAST_REPEATS)) | {"syncs": count_syncs(ours)}


def measure_spearman(tokens: int) -> Callable[[torch.device, int], dict[str, Any]]:
    """Return a measurement of the loss, forward and backward, over ``tokens`` tokens."""

    def measure(device: torch.device, repeats: int) -> dict[str, Any]:
        pred, target = (part.to(device) for part in make_inputs("softmax", tokens))

        def step(loss_of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
            asked = pred.clone().requires_grad_()
            loss = loss_of(asked, target)
            loss.backward()
            return loss.detach()

        return _compare(
            lambda: step(spearman_loss), lambda: step(plain_loss), device, repeats, gradient=True
        )

    return measure


PARTS: dict[str, Callable[[torch.device, int], dict[str, Any]]] = {
    "relevance with projections": measure_relevance,
    "relevance alone": measure_relevance_alone,
    "mapping back": measure_mapping,
    "choosing and mapping back": measure_choice,
    "Spearman loss, 4,096 tokens": measure_spearman(4_096),
    "Spearman loss, 13,440 tokens": measure_spearman(13_440),
}


def count_syncs(run: Callable[[], object]) -> int:
    """Count calls in ``run`` that make the host wait for the device to know a value or a size."""
    waits = {"item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "unique", "cpu"}
    waits |= {"masked_select", "argwhere", "__index__", "numpy", "bincount"}
    found = 0

    class Watch(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal found
            found += getattr(func, "__name__", "") in waits
            return func(*args, **(kwargs or {}))

    with Watch():
        run()
    return found


def _compare(
    ours: Callable[[], Tensor],
    plain: Callable[[], Tensor],
    device: torch.device,
    repeats: int,
    gradient: bool = False,
) -> dict[str, Any]:
    """Time both in turn; return medians in seconds, memory in MiB and the largest difference."""
    with torch.set_grad_enabled(gradient):
        found: dict[str, Any] = {}
        results = {}
        times: dict[str, list[tuple[float, float]]] = {"ours": [], "plain": []}
        for name, run in (("ours", ours), ("plain", plain)):
            run()
            with Peak(device) as peak:
                before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
                results[name] = run()
            extra = peak.host if peak.device is None else peak.device - before / 2**20
            found[f"{name}_extra_mib"] = extra
        for _ in range(repeats):
            for name, run in (("ours", ours), ("plain", plain)):
                _wait(device)
                wall, cpu = time.perf_counter(), time.process_time()
                run()
                _wait(device)
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    for name, pairs in times.items():
        found[f"{name}_wall"] = median(wall for wall, _ in pairs)
        found[f"{name}_cpu"] = median(cpu for _, cpu in pairs)
    found["faster_wall"] = found["plain_wall"] / found["ours_wall"]
    found["faster_cpu"] = found["plain_cpu"] / max(found["ours_cpu"], 1e-9)
    found["difference"] = float((results["ours"] - results["plain"]).abs().max())
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _decoder(device: torch.device) -> Any:
    """Make one layer of the 7B text model; its MLP is never run, so it is small."""
    config = Qwen2Config(
        vocab_size=8,
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        intermediate_size=8,
        max_position_embeddings=1 << 15,
    )
    with device:
        return Qwen2Model(config).eval()


def _video_sets() -> list[Tensor]:
    """Return the visual tokens of each set of the video, as places in the whole of it."""
    tokens = torch.arange(TOKENS_PER_FRAME)
    return [
        (frames[:, None] * TOKENS_PER_FRAME + tokens).flatten() for frames in frame_sets(FRAMES, 64)
    ]
