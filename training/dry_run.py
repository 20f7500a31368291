"""A dry run: the real sizes on the meta device, and what they mean for memory and steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModel
from transformers.utils import logging as logging_of_transformers

from ..core.architecture import Architecture
from ..core.checkpoint import read_json
from ..core.errors import CheckpointError, UnsupportedModelError
from ..core.layout import Clip
from ..inference.policy import resolve_sampling
from ..inference.presets import preset_of
from ..inference.registry import CHECKPOINTS, FAMILIES, architecture_of
from .examples import read_examples
from .recipe import FOLDER, Recipe
from .student import Student, family_of
from .teacher import OnlineTeacher

#: Pictures of the data are taken to have this size: (height, width).
PICTURE = (360, 640)
#: Text of a prompt, in tokens: what the chat template and a question take, roughly.
_TEXT = 64

_GIB = 2**30
#: Bytes of a trained parameter for weight, gradient and optimiser. DeepSpeed holds the first two in
#: bfloat16, and with AdamW's moments a copy of the weight in float32; DDP and FSDP hold all in
#: float32 and compute in bfloat16.
_SHARDED = 2, 2, 12
_PLAIN = 4, 4, 8


@dataclass(frozen=True)
class Sizes:
    """What a run will hold.

    Attributes
    ----------
    teacher, student, trained : parameters; those that are trained are part of the student's.
    visual : visual tokens of a sample.
    tokens : tokens of a sample for the student.
    """

    teacher: int
    student: int
    trained: int
    visual: int
    tokens: int


def report(
    recipe: Recipe, data: Path | None, videos: Path | None, limit: int | None
) -> Iterator[str]:
    """Describe the run that a recipe makes, line by line.

    Parameters
    ----------
    recipe : the settings; its models are only read as far as their ``config.json``, or taken from
        ``shared_configs/training/sizes.yaml``.
    data, videos, limit : to count samples; without data the recipe's own number is taken.

    Raises
    ------
    CheckpointError, OptionError
        A model's sizes are not known here, or the data cannot be read.
    """
    model = meta_model(str(recipe.teacher))
    architecture = architecture_of(model)
    knobs = OnlineTeacher(
        architecture,
        layer=recipe.layer,
        aggregation=recipe.aggregation,
        query=recipe.query,
        frames_per_set=recipe.frames_per_set,
    )
    student = meta_student(
        architecture, str(recipe.student), recipe, knobs.layer, knobs.frames_per_set
    )
    sizes = measure(architecture, student, recipe)
    rendered = None if recipe.videos is None else recipe.videos * recipe.questions
    count = rendered if recipe.samples is None else recipe.samples
    source = "as many as the recipe says"
    if data is not None:
        count = len(read_examples(data, videos, limit=limit, seed=recipe.seed))
        source = str(data)
    per_step = recipe.samples_per_device * recipe.accumulation * recipe.devices
    yield f"family            {recipe.family}"
    yield f"teacher           {recipe.teacher}, {sizes.teacher / 1e9:.2f} billion parameters"
    yield (
        f"                  layer {knobs.layer} of {architecture.num_layers}, "
        f"{knobs.aggregation}, {knobs.frames_per_set} frames a set"
    )
    yield (
        f"student           {recipe.student}, {sizes.student / 1e6:.1f} million parameters, "
        f"{sizes.trained / 1e6:.1f} trained"
    )
    yield (
        f"sample            {recipe.frames} pictures of {PICTURE[1]} x {PICTURE[0]}: "
        f"{sizes.visual:,} visual tokens, about {sizes.tokens:,} in all"
    )
    yield (
        f"step              {recipe.devices} GPUs x {recipe.samples_per_device} x "
        f"{recipe.accumulation} = {per_step} samples, {per_step * sizes.tokens:,} tokens"
    )
    if count is not None:
        trained = max(1, count - recipe.hold_out)
        steps = int(trained * recipe.epochs) // per_step
        yield (
            f"steps             {steps:,}: {trained:,} samples ({source}, {recipe.hold_out} held "
            f"out), {recipe.epochs:g} epochs"
        )
    else:
        yield "steps             name --data to count samples and steps"
    yield "memory of a GPU, estimated (GiB)"
    yield "                  teacher  weights  gradients  optimiser  activations    sum"
    for name, parts in memory(sizes, recipe, architecture, student).items():
        numbers = [value / _GIB for value in parts]
        columns = zip((7, 7, 9, 9, 11), numbers, strict=True)
        row = "  ".join(f"{value:{width}.1f}" for width, value in columns)
        yield f"  {name:<14}  {row}  {sum(numbers):5.1f}"
    yield "  with --scores the teacher's decoder is not needed for scores, only its tower"


def meta_model(name: str) -> Any:
    """Build a model of a supported family on the meta device.

    Raises `CheckpointError` where its sizes are neither in a folder nor in ``sizes.yaml``.
    """
    raw = _config(name)
    kind = str(raw.get("model_type"))
    if kind not in CHECKPOINTS:
        raise UnsupportedModelError(
            f"{name} is a model of type {kind!r}. Supported types: {', '.join(CHECKPOINTS)}."
        )
    class_name = CHECKPOINTS[kind]
    family = FAMILIES[class_name][0]
    cls = getattr(transformers, class_name, None)
    if cls is None:
        cls = getattr(import_module(f"..{family}.modeling", __package__), class_name)
    if "text_config" not in raw:
        raise CheckpointError(
            f"{name} is in its authors' layout, whose config is read only with its weights. "
            "Convert it first: flexselect convert."
        )
    with _quiet(), init_empty_weights():
        model = cls(cls.config_class.from_dict(dict(raw)))
    model.config._name_or_path = name
    return model.to(torch.bfloat16)


def meta_student(
    architecture: Architecture, name: str, recipe: Recipe, layer: int, frames_per_set: int
) -> Student:
    """Build the student of a run on the meta device."""
    raw = _config(name)
    kind = str(raw.get("model_type"))
    sibling = meta_model(name) if kind in CHECKPOINTS else None
    if sibling is None:
        with _quiet(), init_empty_weights():
            fields = {key: value for key, value in raw.items() if key != "model_type"}
            text = AutoModel.from_config(AutoConfig.for_model(kind, **fields))
    else:
        text = sibling.model.language_model
    own = sibling is not None and text.config.vocab_size != architecture.decoder.config.vocab_size
    selector = family_of(architecture).new_selector(
        architecture.model,
        text,
        sibling,
        own_tokens=own and recipe.family == "internvl",
        aggregation=recipe.aggregation or "max",
        base_model=name,
        teacher_model=str(recipe.teacher),
        teacher_layer=layer,
    )
    return Student(
        selector,
        architecture,
        frames_per_set=frames_per_set,
        train_projector=recipe.train_projector,
    )


def measure(architecture: Architecture, student: Student, recipe: Recipe) -> Sizes:
    """Count parameters and tokens."""
    policy = resolve_sampling(architecture, preset_of(architecture), {"frames": recipe.frames})
    height, width = architecture.picture_size(*PICTURE, recipe.frames, policy)
    visual = (
        recipe.frames
        // architecture.pictures_per_frame
        * _frame_tokens(architecture, height, width)
    )
    return Sizes(
        teacher=sum(p.numel() for p in architecture.model.parameters()),
        student=sum(p.numel() for p in student.selector.parameters()),
        trained=sum(p.numel() for p in student.parameters() if p.requires_grad),
        visual=visual,
        tokens=visual + _TEXT,
    )


def memory(
    sizes: Sizes, recipe: Recipe, architecture: Architecture, student: Student
) -> dict[str, tuple[float, float, float, float, float]]:
    """Estimate bytes of one GPU by kind, for each way of sharding.

    Weights of the teacher in bfloat16, whole on every GPU; of what is trained in equal shares where
    a stage shards them. Activations: one state a layer with checkpointing, everything without; the
    widest layer and the relevance come on top. What the teacher itself computes is not counted.
    """
    n = recipe.devices
    text = student.selector.config.text_config
    samples = sizes.tokens * recipe.samples_per_device
    layers, hidden = text.num_hidden_layers, text.hidden_size
    inside = 4 * text.intermediate_size + 8 * hidden
    alive = layers * hidden + inside if recipe.checkpointing else layers * (hidden + inside)
    heads = max(text.num_attention_heads, architecture.decoder.config.num_attention_heads)
    activations = 2.0 * samples * alive + 4.0 * heads * _TEXT * samples
    teacher = 2.0 * sizes.teacher
    shares = {
        "DDP": (_PLAIN, (1, 1, 1)),
        "ZeRO-1": (_SHARDED, (1, 1, n)),
        "ZeRO-2": (_SHARDED, (1, n, n)),
        "ZeRO-3": (_SHARDED, (n, n, n)),
        "FSDP": (_PLAIN, (n, n, n)),
    }
    return {
        name: (
            teacher,
            sizes.student * weight / parts[0],
            sizes.trained * gradient / parts[1],
            sizes.trained * optimiser / parts[2],
            activations,
        )
        for name, ((weight, gradient, optimiser), parts) in shares.items()
    }


def _frame_tokens(architecture: Architecture, height: int, width: int) -> int:
    """Count the ranked tokens of one frame of a picture size."""
    config = architecture.model.config
    if architecture.family == "internvl":
        return int(config.image_seq_length) + 2
    if hasattr(config, "frame_grid"):
        rows, columns = config.frame_grid
        return int(rows * columns)
    side = config.vision_config.patch_size * config.vision_config.spatial_merge_size
    clip = Clip(1, height // side, width // side)
    return clip.rows * clip.columns


def _config(name: str) -> Mapping[str, Any]:
    """Read a model's config.json, or what is written down of it."""
    folder = Path(name)
    if folder.is_dir():
        return read_json(folder / "config.json")
    known: dict[str, Any] = yaml.safe_load((FOLDER / "sizes.yaml").read_text(encoding="utf-8"))
    if name not in known:
        raise CheckpointError(
            f"The sizes of {name} are not known here. Name a folder with its config.json, or one "
            f"of {', '.join(known)}."
        )
    return dict(known[name])


class _quiet:
    """Keeps transformers from commenting on configs while models are built from them."""

    def __enter__(self) -> None:
        self._before = logging_of_transformers.get_verbosity()
        logging_of_transformers.set_verbosity_error()

    def __exit__(self, *details: object) -> None:
        logging_of_transformers.set_verbosity(self._before)
