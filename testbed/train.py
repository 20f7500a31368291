"""Command that trains a tiny checkpoint: ``python -m flexselect.testbed.train --family …``.

The run can be stopped at any time: the same command goes on from the last saved step. Weights and
optimiser wait as safetensors in ``--work``; the finished checkpoint, in bfloat16 with its processor
and a ``training.json`` that says how it was made and what it scores, goes to ``--out``.

With ``--student`` it trains the small model that a Lite selector starts from.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import shutil
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

from ..core.errors import CheckpointError, FlexSelectError, OptionError
from .check import Score, check_clips
from .locate import FAMILIES, FOLDER, checkpoint_folder
from .models import Family, family_of
from .questions import RETRIEVAL, SEEDS_PER_SPLIT
from .recipe import Recipe, default_recipe, student_recipe
from .steps import build_pool, language_optimizer, train_language, train_tower
from .videos import held

logger = logging.getLogger(__name__)

_REPORT_EVERY = 25


def train(
    family: Family,
    recipe: Recipe,
    *,
    work: Path,
    seed: int = 0,
    save_every: int = 100,
    tower: Any | None = None,
) -> tuple[Any, list[dict[str, float | str]]]:
    """Train a model from scratch, or go on with one.

    Parameters
    ----------
    family : Family
        What to train.
    recipe : Recipe
        Steps, rates and clips.
    work : Path
        Folder of the saved state.
    seed : int
        Decides weights and data.
    save_every : int
        Steps between saved states. A share of right answers that is written to the log, or that a
        phase's ``unless`` is compared with, is of the steps since the state that was gone on with:
        a multiple of 25 makes it the same for a stopped run.
    tower : Any, optional
        A trained model of the family whose tower is taken over as it is; only the projector
        learns.

    Returns
    -------
    model, log
        The model in float32, and loss and accuracy along the way.

    Raises
    ------
    CheckpointError
        If ``work`` holds the state of another run, or a damaged one.
    """
    torch.manual_seed(seed)
    model = family.build(**recipe.text)
    identity = f"{family.name} {seed} {recipe}"
    if tower is not None:
        identity += f" on tower {_take_tower(family, model, tower):08x}"
    state = _State(work / "state.safetensors", identity)
    phase_done, step_done, log = state.load(model, None)
    if phase_done is None:
        named = train_tower(family, model, recipe, seed, logger.info)
        log = [{"phase": "tower", "step": recipe.tower_steps, "held_out": round(named, 4)}]
        state.save(model, None, 0, 0, log)
        phase_done, step_done = 0, 0
    if phase_done == len(recipe.phases):
        return model, log
    logger.info("encode a pool of %d scenes", recipe.pool_scenes)
    pool = build_pool(family, model, recipe.pool_scenes, seed)
    for number, phase in enumerate(recipe.phases):
        if number < phase_done:
            continue
        optimizer = language_optimizer(family, model)
        start = step_done if number == phase_done else 0
        reached = float(log[-1].get("right", 0.0))
        if start == 0 and phase.unless is not None and reached >= phase.unless:
            logger.info("%s: left out", phase.name)
            state.save(model, None, number + 1, 0, log)
            continue
        if start:
            state.load(model, optimizer)
        losses: list[float] = []
        rights: list[float] = []
        began = time.perf_counter()
        for step, loss, right in train_language(family, model, pool, phase, optimizer, seed, start):
            losses.append(loss)
            rights.append(right)
            done = step + 1
            if done % _REPORT_EVERY == 0 or done == phase.steps:
                row: dict[str, float | str] = {
                    "phase": phase.name,
                    "step": done,
                    "loss": round(sum(losses) / len(losses), 4),
                    "right": round(sum(rights) / len(rights), 4),
                }
                log.append(row)
                spent = time.perf_counter() - began
                logger.info("%s/%d, %.0f s", row, phase.steps, spent)
                losses, rights = [], []
            if done % save_every == 0 and done < phase.steps:
                state.save(model, optimizer, number, done, log)
        state.save(model, None, number + 1, 0, log)
    return model, log


def _take_tower(family: Family, model: Any, source: Any) -> int:
    """Copy the tower without its projector, freeze it, and return a checksum of its weights."""
    own = {id(p) for p in family.projector(model).parameters()}
    checksum = 0
    with torch.no_grad():
        for mine, theirs in zip(family.tower(model), family.tower(source), strict=True):
            weights = dict(theirs.named_parameters())
            for name, value in mine.named_parameters():
                if id(value) not in own:
                    value.copy_(weights[name])
                    value.requires_grad_(False)
                    checksum = zlib.crc32(value.numpy().tobytes(), checksum)
    return checksum


def save_checkpoint(family: Family, model: Any, out: Path) -> None:
    """Write a model in bfloat16 as ``from_pretrained`` and ``AutoProcessor`` expect it."""
    # A copy, because casting also rounds the rotary frequencies, which are not stored.
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(out)
    family.processor.save_pretrained(out)


def check_checkpoint(family: Family, folder: Path, count: int) -> tuple[float, dict[str, Score]]:
    """Ask a saved checkpoint about ``count`` videos of sixteen frames.

    Returns
    -------
    accuracy, scores : float, dict
        Retrieval from validation videos, by which a checkpoint may be judged, and the scores of
        test videos, with both controls.
    """
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    judged = check_clips(family, model, split="validation", count=count, tasks=RETRIEVAL)
    return judged.accuracy(), {
        name: check_clips(family, model, split="test", count=count, control=control)
        for name, control in (("whole", None), ("shuffled", "shuffled"), ("blind", "blind"))
    }


def publish(draft: Path, out: Path) -> None:
    """Put a finished checkpoint in its place whole, instead of what is there.

    What is there must be what `_check_replaceable` allows.
    """
    fresh, old = (out.with_name(f".{out.name}.{os.getpid()}.{kind}") for kind in ("new", "old"))
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(draft, fresh)
    if out.exists():
        out.rename(old)
    fresh.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _check_replaceable(out: Path) -> None:
    """Raise `CheckpointError` where ``out`` is something else than a checkpoint, or cannot be."""
    if not out.exists():
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"{out} cannot be written ({error}). Name another --out."
            ) from error
        return
    if not out.is_dir() or (any(out.iterdir()) and not (out / "model.safetensors").is_file()):
        raise CheckpointError(f"{out} is there and is no checkpoint. Name another --out.")


@contextmanager
def _alone(work: Path) -> Iterator[None]:
    """Keep a second run out of ``work``: it would overwrite the state of the first."""
    with ExitStack() as stack:
        try:
            stack.enter_context(held(work, wait=False))
        except BlockingIOError as error:
            raise OptionError(
                f"--work {work} is being worked on by another run. Wait for it to end."
            ) from error
        except OSError as error:
            raise OptionError(f"--work {work} cannot be used ({error}).") from error
        yield


class _State:
    """The saved state of a run: weights, optimiser, and how far it has come."""

    def __init__(self, path: Path, identity: str) -> None:
        self._path = path
        self._identity = identity

    def save(
        self,
        model: Any,
        optimizer: torch.optim.Optimizer | None,
        phase: int,
        step: int,
        log: list[dict[str, float | str]],
    ) -> None:
        tensors = {f"model.{name}": value for name, value in _weights(model).items()}
        if optimizer is not None:
            for index, slots in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{index}.{key}": value for key, value in slots.items()}
        metadata = {
            "identity": self._identity,
            "phase": str(phase),
            "step": str(step),
            "log": json.dumps(log),
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".partial")
        try:
            save_file(tensors, partial, metadata=metadata)
            os.replace(partial, self._path)
        except SafetensorError as error:
            raise CheckpointError(
                f"{self._path} could not be written ({error}). The same command goes on from the "
                "state before."
            ) from error
        finally:
            partial.unlink(missing_ok=True)

    def load(
        self, model: Any, optimizer: torch.optim.Optimizer | None
    ) -> tuple[int | None, int, list[dict[str, float | str]]]:
        """Load what is there; the phase is None where nothing is."""
        if not self._path.exists():
            return None, 0, []
        try:
            with safe_open(self._path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except SafetensorError as error:
            raise CheckpointError(
                f"{self._path} is damaged ({error}). Delete it to start anew."
            ) from error
        if metadata.get("identity") != self._identity:
            raise CheckpointError(
                f"{self._path} belongs to a run with another family, seed or recipe. "
                "Choose another --work folder or delete it."
            )
        weights = _weights(model)
        with torch.no_grad():
            for name, value in weights.items():
                value.copy_(tensors[f"model.{name}"])
        if optimizer is not None:
            slots: dict[int, dict[str, Tensor]] = {}
            for name, value in tensors.items():
                if name.startswith("optimizer."):
                    _, index, key = name.split(".")
                    slots.setdefault(int(index), {})[key] = value
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": slots, "param_groups": groups})
        return int(metadata["phase"]), int(metadata["step"]), json.loads(metadata["log"])


def _weights(model: Any) -> dict[str, Tensor]:
    """Weights by name, tied ones once."""
    return {name: value.data for name, value in model.named_parameters()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    family = family_of(options.family)
    recipe = student_recipe(family) if options.student else default_recipe(family)
    kind = "student" if options.student else "testbed"
    work = options.work or Path("outputs") / f"{kind}-{family.name}-{options.seed}"
    out = options.out
    if out is None and options.seed == 0:
        out = (FOLDER.parent / "students" if options.student else FOLDER) / family.name
    try:
        if out is not None:
            _check_replaceable(out)
        with _alone(work):
            return _run(options, family, recipe, work, out)
    except (FlexSelectError, OSError) as error:
        logger.error("error: %s", error)
        return 2


def _run(
    options: argparse.Namespace, family: Family, recipe: Recipe, work: Path, out: Path | None
) -> int:
    """Train, judge, and put what is good enough in its place; returns the exit code."""
    tower = None
    if options.student:
        tower = AutoModelForImageTextToText.from_pretrained(
            checkpoint_folder(family.name), dtype=torch.float32
        )
    model, log = train(family, recipe, work=work, seed=options.seed, tower=tower)
    draft = work / "checkpoint"
    save_checkpoint(family, model, draft)
    accuracy, scores = check_checkpoint(family, draft, options.check)
    for name, score in scores.items():
        logger.info("%s: %s", name, score.rows())
    logger.info("retrieval from validation clips of 16 frames: %.3f", accuracy)
    record = {
        "family": family.name,
        "seed": options.seed,
        "student": options.student,
        "recipe": repr(recipe),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "test_clips_of_16_frames": {name: score.rows() for name, score in scores.items()},
        "log": log,
    }
    (draft / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    least = (0.8 if options.student else 0.98) if options.least is None else options.least
    if accuracy < least:
        logger.error("error: below --least %.2f; the checkpoint stays in %s", least, draft)
        return 1
    if out is None:
        logger.info("wrote %s; --out would put it elsewhere", draft)
        return 0
    try:
        publish(draft, out)
    except OSError as error:
        logger.error(
            "error: %s could not be written (%s); the checkpoint stays in %s", out, error, draft
        )
        return 2
    logger.info("wrote %s", out)
    return 0


# What is wrong with an option must show before hours of training.
def _some(text: str) -> int:
    """Read a whole number of at least one."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def _seed(text: str) -> int:
    """Read a seed: a number of the training split, which must not reach into another."""
    if not 0 <= (number := int(text)) < SEEDS_PER_SPLIT:
        raise argparse.ArgumentTypeError(f"must lie in 0..{SEEDS_PER_SPLIT - 1}, got {text}")
    return number


def _share(text: str) -> float:
    """Read a share of one."""
    if not 0 <= (number := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"must lie in 0..1, got {text}")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flexselect.testbed.train",
        description="Train a tiny checkpoint of a family from scratch.",
    )
    parser.add_argument("--family", choices=FAMILIES, required=True)
    parser.add_argument(
        "--student",
        action="store_true",
        help="train the small model that a Lite selector starts from, on the tower of the "
        "project's own checkpoint, whatever the seed",
    )
    parser.add_argument(
        "--seed",
        type=_seed,
        default=0,
        help="decides weights and data; the project's own checkpoints have 0 (default: 0)",
    )
    parser.add_argument(
        "--work",
        type=Path,
        help="folder of the state and the finished draft (default: outputs/testbed-FAMILY-SEED, "
        "of a student outputs/student-FAMILY-SEED)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of the result (default: testbed/checkpoints/FAMILY, of a student "
        "testbed/students/FAMILY; with another seed than 0 it stays in WORK/checkpoint)",
    )
    parser.add_argument(
        "--check",
        type=_some,
        default=100,
        help="validation and test videos to ask at the end (default: 100)",
    )
    parser.add_argument(
        "--least",
        type=_share,
        help="accuracy below which the draft is not put in place (default: 0.98; of a student "
        "0.80)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
