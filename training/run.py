"""One training run from data to a selector's folder, and going on with one that was stopped."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors.torch import load_file
from transformers import TrainerCallback

from ..core.errors import CheckpointError, OptionError
from ..core.relevance import check_aggregation
from ..inference.features import Progress
from ..inference.presets import preset_of
from ..inference.registry import architecture_of, load_model, load_processor, load_tower
from ..testbed.locate import checkpoint_folder, student_folder
from .examples import Example, hold_out
from .lessons import Schoolbook, Tutor
from .recipe import Recipe
from .samples import SampleLoader, SampleSet
from .student import Student, new_selector, recorded, save_selector
from .teacher import OnlineTeacher, StoredTeacher, identity
from .trainer import SelectorTrainer, best_checkpoint, checkpoints

logger = logging.getLogger(__name__)

_CHECKPOINTS = "checkpoints"
_RECORD = "run.json"

#: Videos that take turns in each place of a step. Up to so many workers a process find each video
#: in one of them; it is no setting, so that the order does not depend on who decodes.
_TURNS = 4
#: Settings of a recipe that change nothing of what is learned.
_ASIDE = ("source", "samples", "workers", "test_videos", "test_frames")


@dataclass(frozen=True)
class Trained:
    """A finished run.

    Attributes
    ----------
    folder : of the selector, the best by recall@K.
    metrics : of the best: loss, spearman, recall_at_k, top_1_recall on the held-out samples.
    steps, best_step : of the run, and of the selector that was kept.
    seconds : time of the run, of all its sessions; of one that was killed, up to its last
        checkpoint.
    damaged : reasons why samples were left out, of all processes, as far as this session met them.
    """

    folder: Path
    metrics: dict[str, float]
    steps: int
    best_step: int
    seconds: float
    damaged: tuple[str, ...]


def settled(recipe: Recipe) -> Recipe:
    """Fill in the testbed's models, and the teacher's settings from its preset."""
    teacher = recipe.teacher or str(checkpoint_folder(recipe.family))
    student = recipe.student or str(student_folder(recipe.family))
    return dataclasses.replace(recipe, teacher=teacher, student=student)


def train(
    recipe: Recipe,
    examples: Sequence[Example],
    out: Path,
    *,
    scores: Path | None = None,
    device: str | None = None,
    dtype: str = "auto",
    report_to: Sequence[str] = (),
    progress: Progress | None = None,
    **more: Any,
) -> Trained:
    """Train a selector, or go on with the run that ``out`` holds.

    Parameters
    ----------
    recipe : the settings.
    examples : the data; `Recipe.hold_out` of them are set aside for evaluation.
    out : folder of the selector; checkpoints lie in it too.
    scores : folder of stored teacher scores; None asks the teacher online.
    device, dtype : of the teacher.
    report_to : where to log to, such as ("tensorboard",).
    progress : called with ("train", step, steps).
    more : further arguments of TrainingArguments, such as ``deepspeed``.

    Raises
    ------
    CheckpointError
        ``out`` holds another run, or a model cannot be loaded.
    OptionError
        A setting is out of range.
    """
    recipe = settled(recipe)
    began = time.monotonic()
    state = PartialState(**({"cpu": True} if device == "cpu" else {}))
    recipe = dataclasses.replace(recipe, devices=state.num_processes)
    # Stored scores need no more of the teacher than what encodes a video.
    load = load_model if scores is None else load_tower
    model = load(str(recipe.teacher), dtype=dtype, device=device or str(state.device))
    model.requires_grad_(False)
    architecture = architecture_of(model)
    if architecture.family != recipe.family:
        raise OptionError(
            f"{recipe.teacher} is a model of the family {architecture.family}, but the recipe is "
            f"for {recipe.family}."
        )
    processor = load_processor(str(recipe.teacher))
    method = preset_of(architecture).method
    knobs = {
        name: getattr(recipe, name) if getattr(recipe, name) is not None else method[name]
        for name in ("layer", "aggregation", "query", "frames_per_set")
    }
    knobs["aggregation"] = check_aggregation(knobs["aggregation"])
    recipe = dataclasses.replace(recipe, **knobs)
    stored = None if scores is None else StoredTeacher(scores)
    if stored is not None:
        examples = stored.usable(examples)
    training, aside = hold_out(examples, recipe.hold_out, recipe.seed)
    sampling = {"frames": recipe.frames}
    together = recipe.samples_per_device * recipe.accumulation * _TURNS
    decoders = 1 if recipe.cache else max(1, recipe.workers)
    samples = SampleSet(
        training, architecture, processor, sampling, remember=math.ceil(together / decoders)
    )
    held_out = SampleSet(aside, architecture, processor, sampling)
    teacher: Any = stored
    if stored is None:
        teacher = OnlineTeacher(architecture, **knobs, sampling=samples.policy)
    else:
        stored.check(architecture, **knobs, sampling=samples.policy)
    tutor = Tutor(architecture, teacher, remember=together)

    torch.manual_seed(recipe.seed)
    assert recipe.student is not None
    selector = new_selector(
        architecture, recipe.student, aggregation=knobs["aggregation"], layer=knobs["layer"]
    )
    student = Student(
        selector,
        architecture,
        frames_per_set=knobs["frames_per_set"],
        query=knobs["query"],
        train_projector=recipe.train_projector,
    )
    memory = tutor if recipe.cache else None
    if recipe.cache:
        # What is remembered lies in this process.
        recipe = dataclasses.replace(recipe, workers=0)
    book, test = Schoolbook(samples, memory), Schoolbook(held_out, memory)
    trainer = SelectorTrainer(
        student.to(model.device),
        recipe,
        book,
        test,
        order(samples, recipe),
        tutor,
        out / _CHECKPOINTS,
        report_to=report_to,
        progress=progress,
        **more,
    )
    decided = {
        "teacher": recorded(str(recipe.teacher)),
        "student": recorded(str(recipe.student)),
        "weights": identity(architecture)["weights"],
        "dtype": str(model.dtype),
        "offline": scores is not None,
        "processes": state.num_processes,
    }
    record = _agree(out, recipe, examples, decided, state)
    clock = _Clock(out / _RECORD, record, began)
    trainer.add_callback(clock)
    found = checkpoints(out / _CHECKPOINTS)
    trainer.train(resume_from_checkpoint=str(found[-1][1]) if found else None)
    state.wait_for_everyone()
    step, folder = best_checkpoint(out / _CHECKPOINTS)
    metrics = _metrics(trainer, step)
    spent = record["seconds"] if record.get("finished") else clock.spent()
    if state.is_main_process:
        own = getattr(selector.config, "own_tokens", False)
        save_selector(
            selector,
            out,
            weights=load_file(folder / "model.safetensors"),
            dtype=torch.bfloat16,
            tokens_from=recipe.student if own else None,
        )
        write_json(out / _RECORD, {**record, "seconds": spent, "finished": True})
    state.wait_for_everyone()
    damaged = gather_object([*book.damaged.values(), *test.damaged.values()])
    return Trained(out, metrics, trainer.steps, step, spent, tuple(sorted(set(damaged))))


def order(samples: SampleSet, recipe: Recipe) -> list[int]:
    """Draw the samples of all epochs, in order.

    What is remembered is drawn question by question. What must be decoded is drawn video by video,
    in several lanes for each place of a step, so that a step sees different videos and each is
    decoded once.
    """
    step = recipe.devices * recipe.accumulation * recipe.samples_per_device
    loader = SampleLoader(samples, seed=recipe.seed, together=not recipe.cache, lanes=step * _TURNS)
    whole, part = divmod(recipe.epochs, 1)
    drawn = [index for epoch in range(int(whole)) for index in loader.order(epoch)]
    return drawn + loader.order(int(whole))[: round(part * len(samples))]


def _agree(
    out: Path,
    recipe: Recipe,
    examples: Sequence[Example],
    decided: Mapping[str, Any],
    state: PartialState,
) -> dict[str, Any]:
    """Write down what decides a run, or compare with the one that is there."""
    names = "\n".join(example.id for example in examples)
    kept = {name: value for name, value in recipe.record().items() if name not in _ASIDE}
    settings = json.loads(
        json.dumps(
            {
                **kept,
                **decided,
                "examples": len(examples),
                "data": hashlib.sha256(names.encode()).hexdigest()[:16],
            }
        )
    )
    path = out / _RECORD
    record: dict[str, Any] = {"settings": settings}
    if path.is_file():
        record = json.loads(path.read_text())
        there = record.get("settings", {})
        differ = sorted(k for k in {*settings, *there} if settings.get(k) != there.get(k))
        if differ:
            raise CheckpointError(
                f"{out} holds a run with other settings ({', '.join(differ)}). Choose another "
                "folder with --out, or delete that one."
            )
    elif state.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, record)
    state.wait_for_everyone()
    return record


class _Clock(TrainerCallback):
    """Adds up the time of a run; with every checkpoint it is written down."""

    def __init__(self, path: Path, record: Mapping[str, Any], began: float) -> None:
        self._path, self._record, self._began = path, record, began

    def spent(self) -> float:
        """Seconds of this session and those before it."""
        return float(self._record.get("seconds", 0.0)) + time.monotonic() - self._began

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            write_json(self._path, {**self._record, "seconds": self.spent()})


def _metrics(trainer: SelectorTrainer, step: int) -> dict[str, float]:
    """Return what the held-out samples said at a step; the best and the last one have a row."""
    history = trainer.state.log_history
    rows = [row for row in history if row.get("step") == step and "eval_loss" in row]
    return {
        name.removeprefix("eval_"): float(value)
        for name, value in rows[-1].items()
        if name.startswith("eval_") and isinstance(value, (int, float))
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a record, whole or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.partial")
    draft.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(draft, path)
