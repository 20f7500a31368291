"""Time relevance against the plain formulation at the shapes of LLaVA-Video-7B's sets.

Processor time of one thread, so that other work on the machine counts little:
``python scripts/bench_relevance.py``.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable

import torch
from torch import Tensor

from flexselect.core.relevance import relevance
from flexselect.scripts.bench_micro import HEAD_DIM, HEADS, KV_HEADS, PREFIX, plain_relevance


def seconds(run: Callable[[], Tensor], repeats: int) -> tuple[float, Tensor]:
    """Return the least processor time of a run, and its result."""
    best, result = float("inf"), torch.empty(0)
    for _ in range(repeats):
        start = time.process_time()
        result = run()
        best = min(best, time.process_time() - start)
    return best, result


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--visual", type=int, default=13_440)
    parser.add_argument("--text", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokens = PREFIX + options.visual + options.text
    query = torch.randn(1, HEADS, options.text, HEAD_DIM)
    key = torch.randn(1, KV_HEADS, tokens, HEAD_DIM)
    rows = torch.arange(tokens - options.text, tokens)
    columns = torch.arange(PREFIX, PREFIX + options.visual)
    ours, scores = seconds(lambda: relevance(query, key, rows, columns), options.repeats)
    theirs, wanted = seconds(lambda: plain_relevance(query, key, rows, columns), options.repeats)
    print(f"{platform.machine()}, torch {torch.__version__}, 1 thread, float32")
    print(f"{options.visual} visual tokens, {options.text} of text, {HEADS}/{KV_HEADS} heads")
    print(f"relevance {ours:.2f} s, plain {theirs:.2f} s of processor time: {theirs / ours:.1f}x")
    print(f"largest difference {float((scores - wanted).abs().max()):.1e}")


if __name__ == "__main__":
    main()
