"""Recipes: everything that decides a training but its data, from ``shared_configs/training``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..core.errors import OptionError
from ..core.soft_rank import DEFAULT_TEMPERATURE
from ..core.spearman import DEFAULT_TOP_FRACTION
from ..inference.registry import family_named

FOLDER = Path(__file__).resolve().parent.parent / "shared_configs" / "training"
TERMS = ("spearman", "top_recall", "listnet", "l1", "l2")


@dataclass(frozen=True)
class Recipe:
    """The settings of one training.

    Attributes
    ----------
    family : folder of the family.
    source : where the values come from.
    teacher, student : folder or hub id of the model that ranks, and of the small model that a
        selector starts from; None for those of the testbed.
    layer, aggregation, query, frames_per_set : of the teacher; None for what the teacher's preset
        says, which is also what inference uses.
    frames : pictures of a training video.
    epochs, learning_rate, warmup, weight_decay, betas, clip : of AdamW with a cosine; ``warmup`` is
        a share of the steps.
    samples_per_device, accumulation, devices : their product is the samples of one step.
    bf16 : compute the student in bfloat16 (autocast; weights and optimiser in float32).
    checkpointing : recompute the student's activations in the backward pass.
    loss : weight of each term by name; see `core.spearman.selector_loss`.
    temperature, log_scores : width of the soft ranks, in units of the relevance or of its
        logarithm, which ranks alike.
    top_fraction : share of a set that is its top, in the loss and in recall@K.
    train_projector : None for what the reference does in this family.
    hold_out : samples kept out of training for evaluation.
    evaluate_every : steps between evaluations, each with a checkpoint.
    workers : processes a device that decode.
    cache : keep what the tower and the teacher said of a sample in memory, for small data.
    videos, questions : needle videos that are rendered for training where no data is named, and
        questions of each.
    test_videos, test_frames : needle videos that Lite and training-free answer at the end, where
        the teacher is the testbed's.
    samples : of the data that the reference trained on, for a dry run without data.
    seed : decides the order of the samples, and weights that start at random.
    """

    family: str
    source: str
    teacher: str | None = None
    student: str | None = None
    layer: int | None = None
    aggregation: str | None = None
    query: str | None = None
    frames_per_set: int | None = None
    frames: int = 64
    epochs: float = 1.0
    learning_rate: float = 1e-5
    warmup: float = 0.03
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 100.0
    samples_per_device: int = 1
    accumulation: int = 1
    devices: int = 8
    bf16: bool = True
    checkpointing: bool = True
    loss: Mapping[str, float] = field(default_factory=lambda: {"spearman": 1.0})
    temperature: float = DEFAULT_TEMPERATURE
    log_scores: bool = False
    top_fraction: float = DEFAULT_TOP_FRACTION
    train_projector: bool | None = None
    hold_out: int = 256
    evaluate_every: int = 500
    workers: int = 4
    cache: bool = False
    videos: int | None = None
    questions: int = 6
    test_videos: int = 60
    test_frames: int = 512
    samples: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every value; raises `OptionError` that names it."""
        if family_named(self.family) != self.family:
            raise OptionError(f"family must be {family_named(self.family)}, got {self.family!r}.")
        for name, (valid, expected) in _CHECKS.items():
            value = getattr(self, name)
            if not valid(value):
                raise OptionError(f"{name} must be {expected}, got {value!r}.")
        if "listnet" in self.loss and not self.log_scores:
            raise OptionError(
                "the loss term 'listnet' compares softmaxes, which raw relevance makes all alike: "
                "set log_scores: true."
            )

    def record(self) -> dict[str, Any]:
        """Return every setting, for run records."""
        return {**dataclasses.asdict(self), "betas": list(self.betas), "loss": dict(self.loss)}


def read_recipe(path: str | Path, **changes: Any) -> Recipe:
    """Read a recipe; ``changes`` that are not None take the place of its values.

    Raises
    ------
    OptionError
        The file is missing, or a key is unknown, missing or has a value it cannot have; the
        message names file and key.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise OptionError(f"There is no recipe {path}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise OptionError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    known = [f.name for f in dataclasses.fields(Recipe)]
    if not isinstance(raw, dict):
        raise OptionError(f"{path} must hold a mapping with keys of {known}.")
    unknown = sorted(str(name) for name in raw if name not in known)
    if unknown:
        raise OptionError(f"{path}: unknown keys {unknown}; known: {known}.")
    missing = [name for name in ("family", "source") if not isinstance(raw.get(name), str)]
    if missing:
        raise OptionError(f"{path}: {missing} must be given, as text.")
    if isinstance(raw.get("betas"), list):
        raw["betas"] = tuple(raw["betas"])
    given = {name: value for name, value in changes.items() if value is not None}
    try:
        recipe = Recipe(**raw)
    except OptionError as error:
        raise OptionError(f"{path}: {error}") from error
    return dataclasses.replace(recipe, **given)


def recipe_for(family: str, tiny: bool) -> Path:
    """Return the file of a family's recipe: the reference's, or the testbed's tiny one."""
    return FOLDER / f"{family}{'-tiny' if tiny else ''}.yaml"


def _number(value: object) -> bool:
    finite = isinstance(value, (int, float)) and math.isfinite(value)
    return finite and not isinstance(value, bool)


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _share(value: Any) -> bool:
    return _number(value) and 0 <= value < 1


def _whole(least: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= least


def _or_none(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_loss(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(name in TERMS and _positive(weight) for name, weight in value.items())
    )


def _is_betas(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(_share, value))


_COUNT = (_whole(1), "a whole number of at least 1")
_FLAG = (_is_bool, "true or false")
_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "source": (_is_text, "text that says where the values come from"),
    "teacher": (_or_none(_is_text), "a folder or hub id"),
    "student": (_or_none(_is_text), "a folder or hub id"),
    "layer": (_or_none(_whole(0)), "a whole number of at least 0"),
    "aggregation": (_or_none(_is_text), "max or mean"),
    "query": (_or_none(lambda value: value in ("all", "last")), "all or last"),
    "frames_per_set": (_or_none(_whole(1)), "a whole number of at least 1"),
    "frames": _COUNT,
    "epochs": (_positive, "a number above 0"),
    "learning_rate": (_positive, "a number above 0"),
    "warmup": (_share, "a share of the steps, from 0 to below 1"),
    "weight_decay": (_share, "from 0 to below 1"),
    "betas": (_is_betas, "two numbers from 0 to below 1"),
    "clip": (_positive, "a number above 0"),
    "samples_per_device": _COUNT,
    "accumulation": _COUNT,
    "devices": _COUNT,
    "bf16": _FLAG,
    "checkpointing": _FLAG,
    "loss": (_is_loss, f"a weight above 0 for one or more of {list(TERMS)}"),
    "temperature": (_positive, "a number above 0"),
    "log_scores": _FLAG,
    "top_fraction": (lambda value: _positive(value) and value <= 1, "above 0, at most 1"),
    "train_projector": (_or_none(_is_bool), "true or false"),
    "hold_out": _COUNT,
    "evaluate_every": _COUNT,
    "workers": (_whole(0), "a whole number of at least 0"),
    "cache": _FLAG,
    "videos": (_or_none(_whole(1)), "a whole number of at least 1"),
    "questions": _COUNT,
    "test_videos": _COUNT,
    "test_frames": _COUNT,
    "samples": (_or_none(_whole(1)), "a whole number of at least 1"),
    "seed": (_whole(0), "a whole number of at least 0"),
}
