"""One of the processes of test_sharing: ranks, and writes down what it kept or what went wrong.

python sharing_worker.py RANK WORLD FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed

import flexselect
from flexselect.inference.engine import Engine
from flexselect.tests.architectures.factories import FAMILIES, Video, knobs

FAMILY = next(family for family in FAMILIES if family.name == "qwen2_5_vl")
#: Sets of 3 frames: several sets a process and an odd one, one for two processes, two videos.
CASES = {"many": (13,), "few": (4,), "two videos": (7, 5)}
BUDGET = 12


def encoded(engine: Engine, frames: tuple[int, ...], question: str = "What?") -> Any:
    parts = [Video(count, seed) for seed, count in enumerate(frames)]
    inputs = FAMILY.inputs((*parts, question))
    return engine.encode(engine.architecture.read(inputs)[0])


def select(model: Any, frames: tuple[int, ...], **more: Any) -> flexselect.Selection:
    method = flexselect.FlexSelect(**knobs(BUDGET, **more))
    engine = Engine(model, method)
    selection = engine.select(encoded(engine, frames, more.pop("question", "What?")))
    assert selection is not None
    return selection


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=world
    )
    model = FAMILY.model()
    for name, frames in CASES.items():
        select(model, frames, share_sets=True).save(folder / f"{name} {rank}")
    errors = []
    engine = Engine(model, flexselect.FlexSelect(**knobs(BUDGET, share_sets=True)))
    try:
        engine.select(encoded(engine, CASES["many"], f"Who is number {rank}?"))
    except flexselect.FlexSelectError as error:
        errors.append(str(error))
    # One process meets numbers that overflow; both must hear of it.
    if rank:
        model.model.language_model.layers[0].mlp.down_proj.weight.data.fill_(float("nan"))
    try:
        engine.select(encoded(engine, CASES["many"]))
    except flexselect.FlexSelectError as error:
        errors.append(str(error))
    (folder / f"errors {rank}.json").write_text(json.dumps(errors))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
