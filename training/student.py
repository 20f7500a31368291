"""The student: a Lite selector in the making, from creation over its forward pass to its folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from ..core.architecture import Architecture
from ..core.checkpoint import read_json
from ..core.errors import CheckpointError, UnsupportedModelError
from ..core.hub import local_folder
from ..core.layout import Prompt
from ..core.relevance import Aggregation, check_aggregation, relevance
from ..inference.features import assemble
from ..inference.registry import CHECKPOINTS, FAMILIES, load_model
from ..inference.scoring import FrameSet, split_prompt

_HOUSE = Path(__file__).resolve().parent.parent

#: Text in which tokenizers of different vocabularies are unlikely to agree.
_PROBE = "What number is on the red star? 视频 12345 <|im_start|>user\n"
#: Files of which a tokenizer's folder has one.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)


def new_selector(
    architecture: Architecture, student: str | Path, *, aggregation: str, layer: int
) -> Any:
    """Build the Lite selector that training starts from.

    Parameters
    ----------
    architecture : of the teacher, which the selector will serve.
    student : folder or hub id of a small text model, or of a small model of the teacher's family,
        whose text model and projector are then taken.
    aggregation, layer : what of the teacher it learns; they are recorded in its config.

    Returns
    -------
    The family's selector in float32, on the CPU.

    Raises
    ------
    CheckpointError
        Files are missing or damaged, or weights would be left random.
    UnsupportedModelError
        The student is of a kind that this family cannot use.
    """
    folder = local_folder(student)
    kind = str(read_json(folder / "config.json").get("model_type"))
    sibling = None
    if kind in CHECKPOINTS:
        if FAMILIES[CHECKPOINTS[kind]][0] != architecture.family:
            raise UnsupportedModelError(
                f"{student} is a model of the family {FAMILIES[CHECKPOINTS[kind]][0]}, the teacher "
                f"of {architecture.family}. Take a text model, or a small model of that family."
            )
        sibling = load_model(folder, dtype="float32", device="cpu")
        text = sibling.model.language_model
    else:
        text = load_text_model(folder)
    teacher = str(architecture.model.name_or_path)
    selector = family_of(architecture).new_selector(
        architecture.model,
        text,
        sibling,
        own_tokens=differs(folder, Path(teacher)),
        aggregation=check_aggregation(aggregation),
        base_model=recorded(student),
        teacher_model=recorded(teacher),
        teacher_layer=layer,
    )
    selector = selector.float()
    selector.name_or_path = str(student)
    if getattr(selector.config, "own_tokens", False):
        selector.translate = family_of(architecture).translator(folder, architecture.model)
    return selector


def recorded(name: str | Path) -> str:
    """Return how records name a model: what comes with the project by its place in it."""
    path = Path(name)
    if path.is_absolute() and path.is_relative_to(_HOUSE):
        return path.relative_to(_HOUSE).as_posix()
    return str(name)


def load_text_model(folder: Path) -> Any:
    """Load a small text model without its head, in float32; no weight may be left random."""
    try:
        text, report = AutoModel.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except (ValueError, OSError, KeyError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(
            f"{folder} holds no text model that transformers loads ({reason})."
        ) from error
    missing = sorted(report["missing_keys"])
    if missing or not hasattr(text, "layers"):
        raise CheckpointError(
            f"{folder} does not fill a text model: {missing[:5] or type(text).__name__}. Name a "
            "Qwen2- or Llama-style language model, or a small model of the teacher's family."
        )
    return text


def differs(folder: Path, teacher: Path) -> bool:
    """Whether two checkpoints write the same text in different token ids.

    A folder without a tokenizer is taken to share the other's. Raises `CheckpointError` where one
    cannot be read: a student that reads other tokens than it is given learns nothing.
    """
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        return False
    ours, theirs = (_token_ids(place) for place in (folder, local_folder(teacher)))
    return ours != theirs


def _token_ids(folder: Path) -> list[int]:
    try:
        return list(AutoTokenizer.from_pretrained(folder)(_PROBE)["input_ids"])
    except Exception as error:  # tokenizers raises Exception itself, transformers whatever it meets
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(
            f"The tokenizer in {folder} cannot be read ({reason}). Fetch its files again."
        ) from error


def family_of(architecture: Architecture) -> ModuleType:
    """Return the family's module ``student``, which knows how its selectors begin."""
    return import_module(f"..{architecture.family}.student", __package__)


@dataclass(frozen=True, eq=False)
class Lesson:
    """What the student learns from one sample.

    Attributes
    ----------
    prompt : in the model's tokens.
    states : what the selector's projector reads of the tower; see the family's `encode_states`.
    scores : float32 ``(visual,)``, the teacher's.
    name : the sample's id.
    """

    prompt: Prompt
    states: Tensor
    scores: Tensor
    name: str = ""
    _sets: dict[int, tuple[Prompt, list[FrameSet]]] = field(default_factory=dict, repr=False)

    def sets(self, selector: Any, frames_per_set: int, last: bool) -> tuple[Prompt, list[FrameSet]]:
        """Return the prompt in the selector's tokens and its sets; computed once."""
        if frames_per_set not in self._sets:
            prompt = selector.localise(self.prompt)
            self._sets[frames_per_set] = (
                prompt,
                split_prompt(prompt, selector, frames_per_set, last),
            )
        return self._sets[frames_per_set]


@dataclass(frozen=True, eq=False)
class Ranking:
    """A student's and its teacher's relevance of sets of one shape.

    Attributes
    ----------
    pred, target : float32 ``(sets, visual)``; ``pred`` has gradients.
    weight : ``(sets,)``, each set's share of the lessons: every lesson weighs the same.
    """

    pred: Tensor
    target: Tensor
    weight: Tensor


class Student(nn.Module):
    """A selector that is trained, as one module that a trainer can wrap.

    Parameters
    ----------
    selector : a Lite selector.
    architecture : of the model it will serve. Its parameters are not those of this module.
    frames_per_set, query : as the methods use them.
    train_projector : None for what the family's reference does.
    """

    def __init__(
        self,
        selector: Any,
        architecture: Architecture,
        *,
        frames_per_set: int,
        query: str = "all",
        train_projector: bool | None = None,
    ) -> None:
        super().__init__()
        self.selector = selector
        # In a tuple, so that the teacher's parameters do not become this module's.
        self._teacher = (architecture,)
        self.frames_per_set = frames_per_set
        self.last_only = query == "last"
        self.aggregation: Aggregation = check_aggregation(selector.aggregation)
        frozen = family_of(architecture).FROZEN
        if train_projector is not None:
            frozen = () if train_projector else ("projector",)
        for name, parameter in selector.named_parameters():
            parameter.requires_grad_(not name.startswith(tuple(frozen)))
        for parameter in idle_parameters(selector):
            parameter.requires_grad_(False)

    @property
    def architecture(self) -> Architecture:
        """The model it will serve."""
        return self._teacher[0]

    @cached_property
    def layer(self) -> int:
        """Its last layer, whose query and key states rank."""
        return int(self.selector.num_layers) - 1

    def forward(self, lessons: Sequence[Lesson]) -> list[Ranking]:
        """Rank the visual tokens of every set; sets of one shape share a pass."""
        selector = self.selector
        parts = []
        for lesson in lessons:
            prompt, sets = lesson.sets(selector, self.frames_per_set, self.last_only)
            features = self._project(lesson.states)
            for part in sets:
                parts.append((part, prompt, features, lesson, 1 / (len(sets) * len(lessons))))
        ranked = []
        for _, group in groupby(sorted(parts, key=_shape), key=_shape):
            members = list(group)
            first = members[0][0]
            embeds = torch.stack(
                [
                    assemble(prompt.layout, part.rows, features, selector.embed)
                    for part, prompt, features, _, _ in members
                ]
            )
            positions = torch.stack([part.positions for part, *_ in members], -2).to(embeds.device)
            query, key = selector.states(embeds, positions, self.layer, first.query_rows)
            # Under autocast the products of relevance would be rounded to half precision.
            with torch.autocast(embeds.device.type, enabled=False):
                pred = relevance(
                    query.float(),
                    key.float(),
                    first.query_rows,
                    first.columns,
                    aggregation=self.aggregation,
                )
            target = torch.stack([lesson.scores[part.members] for part, _, _, lesson, _ in members])
            weight = torch.tensor([share for *_, share in members])
            ranked.append(Ranking(pred, target.to(pred.device), weight.to(pred.device)))
        return ranked

    def _project(self, states: Tensor) -> Tensor:
        family = family_of(self.architecture)
        features: Tensor = family.project_states(self.architecture.model, self.selector, states)
        return features


def idle_parameters(selector: Any) -> list[nn.Parameter]:
    """List the parameters that no score depends on: those above the last layer's q and k."""
    text = selector.language_model
    last = text.layers[-1]
    attention = last.self_attn
    used = [last.input_layernorm, attention.q_proj, attention.k_proj]
    used += [getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
    busy = {id(parameter) for module in used for parameter in module.parameters()}
    idle = [*last.parameters(), *text.norm.parameters()]
    return [parameter for parameter in idle if id(parameter) not in busy]


def save_selector(
    selector: Any,
    folder: Path,
    *,
    weights: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    tokens_from: str | Path | None = None,
) -> None:
    """Write a selector as `flexselect.load_selector` reads it, whole or not at all.

    Parameters
    ----------
    selector : what to write.
    folder : to make, or to replace where it holds a selector.
    weights : its state, where the selector itself does not hold it (sharded training).
    dtype : of the written weights; default, as they are.
    tokens_from : checkpoint whose tokenizer files are copied, for a selector with own tokens.
    """
    state = dict(selector.state_dict() if weights is None else weights)
    if dtype is not None:
        state = {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in state.items()
        }
    draft = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    selector.save_pretrained(draft, state_dict=state)
    if dtype is not None:
        config = json.loads((draft / "config.json").read_text())
        config["dtype"] = str(dtype).removeprefix("torch.")
        (draft / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if tokens_from is not None:
        for name in _TOKENIZER_FILES:
            file = local_folder(tokens_from) / name
            if file.is_file():
                shutil.copy(file, draft / name)
    folder.mkdir(parents=True, exist_ok=True)
    # The weights last: a folder without them holds no selector.
    for file in sorted(draft.iterdir(), key=lambda path: path.suffix == ".safetensors"):
        os.replace(file, folder / file.name)
    draft.rmdir()


def _shape(entry: tuple[FrameSet, Prompt, Tensor, Lesson, float]) -> tuple[Any, ...]:
    """Return what sets must have in common to share a pass."""
    part = entry[0]
    return len(part.rows), tuple(part.columns.tolist()), tuple(part.query_rows.tolist())
