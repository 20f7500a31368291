"""Time and peak memory of the Spearman loss, forward and backward, beside the plain N x N formula.

Each measurement runs in a fresh process, so that one cannot leave memory to another:

    python scripts/bench_spearman.py --sizes 4096 13440 --threads 1 2 --json spearman.json

On cores shared with other work, idle threads that spin distort two-thread figures of either method:
set OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0.

Peak is the growth of the process's resident set over its size with the inputs in place.
Inputs: `softmax` as relevance looks, which puts nearly all tokens within a few temperatures;
`dense`, all tokens within one temperature; `sparse`, no two tokens in one box, the most work for
the linear method.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexselect.core.soft_rank import DEFAULT_TEMPERATURE
from flexselect.core.spearman import spearman_loss

INPUTS = ("softmax", "dense", "sparse")
METHODS = ("plain", "ours")
PLAIN_MAX_TOKENS = 16_384  # three float32 matrices of this size take 3 GiB
MIB = 1 << 20
_BALLAST: list[Tensor] = []


def plain_loss(pred: Tensor, target: Tensor) -> Tensor:
    """Compute the loss as it is defined, with every pair of tokens in memory."""
    soft = torch.sigmoid((pred[:, None] - pred) / DEFAULT_TEMPERATURE).sum(dim=1) - 0.5
    hard = target.argsort().argsort().to(pred.dtype)
    soft, hard = soft - soft.mean(), hard - hard.mean()
    return 1 - (soft / soft.norm()) @ (hard / hard.norm())


def make_inputs(kind: str, tokens: int) -> tuple[Tensor, Tensor]:
    """Draw a prediction of one of the kinds and a target that correlates with it."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(tokens, generator=generator)
    if kind == "softmax":
        pred = (1.5 * noise).softmax(dim=0)
    elif kind == "dense":
        pred = DEFAULT_TEMPERATURE * torch.rand(tokens, generator=generator)
    else:
        pred = 4 * DEFAULT_TEMPERATURE * torch.randperm(tokens, generator=generator).float()
    return pred, pred + pred.std() * torch.randn(tokens, generator=generator)


def measure(method: str, kind: str, tokens: int, threads: int, repeats: int) -> dict[str, Any]:
    """Measure best forward and backward times in seconds and the peak in MiB, in this process."""
    torch.set_num_threads(threads)
    loss_of = {"plain": plain_loss, "ours": spearman_loss}[method]
    _step(loss_of, *make_inputs(kind, 64))  # libraries allocate their workspaces once
    pred, target = make_inputs(kind, tokens)
    before = _fill_to_high_water()
    steps = [_step(loss_of, pred, target) for _ in range(repeats)]
    peak = _high_water() - before
    return {
        "method": method,
        "input": kind,
        "tokens": tokens,
        "threads": threads,
        "forward_s": min(step[0] for step in steps),
        "backward_s": min(step[1] for step in steps),
        "peak_mib": peak / MIB,
        "loss": steps[0][2],
        "torch": torch.__version__,
    }


def _step(
    loss_of: Callable[[Tensor, Tensor], Tensor], pred: Tensor, target: Tensor
) -> tuple[float, float, float]:
    pred = pred.clone().requires_grad_()
    start = time.perf_counter()
    loss = loss_of(pred, target)
    middle = time.perf_counter()
    loss.backward()
    return middle - start, time.perf_counter() - middle, loss.item()


def _high_water() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _fill_to_high_water() -> int:
    """Grow to the process's high-water mark, which importing torch has raised, and return it.

    Growth below the mark would go unseen.
    """
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    _BALLAST.append(torch.ones(max(0, _high_water() - resident), dtype=torch.uint8))
    return _high_water()


def main() -> None:
    """Measure what the command line asks for and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 8192, 13_440, 107_520])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--inputs", choices=INPUTS, nargs="+", default=INPUTS)
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=METHODS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to store the results")
    parser.add_argument("--here", action="store_true", help="one measurement, in this process")
    options = parser.parse_args()
    if options.here:
        result = measure(
            options.methods[0],
            options.inputs[0],
            options.sizes[0],
            options.threads[0],
            options.repeats,
        )
        print(json.dumps(result))
        return
    results = []
    print(f"torch {torch.__version__}, best of {options.repeats}")
    print("tokens   input    threads  method  forward  backward      peak  speedup")
    for tokens in options.sizes:
        for kind in options.inputs:
            for threads in options.threads:
                plain_total = None
                for method in options.methods:
                    if method == "plain" and tokens > PLAIN_MAX_TOKENS:
                        continue
                    result = _in_fresh_process(method, kind, tokens, threads, options.repeats)
                    results.append(result)
                    total = result["forward_s"] + result["backward_s"]
                    if method == "plain":
                        plain_total = total
                    faster = f"{plain_total / total:6.0f}x" if plain_total else ""
                    print(
                        f"{tokens:<8} {kind:<8} {threads:<8} {method:<6} "
                        f"{1e3 * result['forward_s']:6.0f} ms {1e3 * result['backward_s']:6.0f} ms "
                        f"{result['peak_mib']:6.0f} MiB {faster}",
                        flush=True,
                    )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def _in_fresh_process(
    method: str, kind: str, tokens: int, threads: int, repeats: int
) -> dict[str, Any]:
    values = {
        "--methods": method,
        "--inputs": kind,
        "--sizes": tokens,
        "--threads": threads,
        "--repeats": repeats,
    }
    command = [sys.executable, __file__, "--here"]
    for name, value in values.items():
        command += [name, str(value)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
