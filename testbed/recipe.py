"""How a tiny checkpoint is trained: tower, drills, questions, pruned and selected clips.

1. *Tower*: the vision tower and projector name the mark of every cell, by linear heads that are
   thrown away.
2. *Pool*: the finished tower encodes a pool of scenes once; it stays frozen from here on.
3. *Language*: the language model learns to look marks up, first by drills, then by questions; with
   *more questions* where these were not enough, because when it dawns on a model is luck.
4. *Near misses*: whole clips alternate with clips pruned to marks that resemble each other, because
   answering from selected tokens is denser in near misses than any clip.
5. *Selected*: most clips are what selection, with the model's own attention as it is at that step,
   leaves of a long video; whole clips keep what was learned before.

Every picture passes through the h264 encoder and decoder and the family's real processor. No clip
that the model answers from holds more than sixteen pictures or, where it is pruned or selected,
more ranked tokens than ``Segment.tokens`` or the largest of ``Selecting.budgets``, but for those of
the asked mark, which is put back where selection lost it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from .models import Family
from .questions import RETRIEVAL, TASKS

#: Scenes filmed at once, as one video.
REEL = 256


@dataclass(frozen=True)
class Selecting:
    """How long videos are ranked for training clips.

    Attributes
    ----------
    share : float
        Share of the steps whose clips are selected.
    layers : tuple of int
        Reference layers, drawn evenly.
    query : str
        Text tokens that ask: "all" or "last".
    budgets : tuple of int
        Tokens to keep, drawn evenly, one a step.
    sets : tuple of int
        Fewest and most sets of a video.
    frames_per_set : int
        Frames of a set.
    """

    share: float
    layers: tuple[int, ...]
    query: Literal["all", "last"]
    budgets: tuple[int, ...]
    sets: tuple[int, int]
    frames_per_set: int = 16


@dataclass(frozen=True)
class Segment:
    """A stretch of steps on one kind of clip.

    Attributes
    ----------
    kind : str
        "drill" or "questions".
    steps, batch, length : int
        Steps, clips a step, and most tokens a clip with its text.
    pictures : tuple of int
        Pictures of video a clip may have, drawn evenly.
    turns : int
        Most questions, or named marks, a clip.
    pruned : float
        Share of the batches whose clips are pruned.
    tokens : int
        Ranked tokens a pruned clip keeps.
    tasks : tuple of str
        Tasks to ask, in proportion.
    gaps : int
        Most words of questions between the words of a drill.
    selecting : Selecting, optional
        How clips are selected from long videos, where some are.
    """

    kind: Literal["drill", "questions"]
    steps: int
    batch: int
    length: int
    pictures: tuple[int, ...]
    turns: int
    pruned: float = 0.0
    tokens: int = 0
    tasks: tuple[str, ...] = ()
    gaps: int = 0
    selecting: Selecting | None = None


@dataclass(frozen=True)
class Phase:
    """Segments that share an optimiser and one cosine of the learning rate.

    Left out where the last phase that ran ended with a share of at least ``unless`` of right
    answers.
    """

    name: str
    rate: float
    warmup: int
    segments: tuple[Segment, ...]
    unless: float | None = None

    @property
    def steps(self) -> int:
        """Steps of all segments."""
        return sum(segment.steps for segment in self.segments)

    def at(self, step: int) -> Segment:
        """Return the segment that a step belongs to."""
        for segment in self.segments:
            if step < segment.steps:
                return segment
            step -= segment.steps
        raise IndexError(step)

    def rate_at(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then a cosine to a fiftieth."""
        cosine = 0.5 * (1 + np.cos(np.pi * step / self.steps))
        return float(self.rate * min(1.0, (step + 1) / self.warmup) * (0.02 + 0.98 * cosine))


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run but its seed.

    Attributes
    ----------
    tower_steps, tower_scenes, tower_rate : int, int, float
        Steps of the tower, scenes a step, and peak learning rate.
    pool_scenes : int
        Scenes of the pool.
    phases : tuple of Phase
        Training of the language model.
    text : dict
        Overrides of the language model's config.
    """

    tower_steps: int
    tower_scenes: int
    tower_rate: float
    pool_scenes: int
    phases: tuple[Phase, ...]
    text: dict[str, Any]


_MIXED_TASKS = (*RETRIEVAL, *RETRIEVAL, *TASKS)


class _Steps(NamedTuple):
    """How long each part of a family's recipe takes."""

    tower: int
    drills: int
    bridge: int
    questions: int
    selections: int


# Looking marks up takes M-RoPE longer to get right than plain positions, and the coarser tokens of
# SigLIP, whose patches LLaVA-Video projects before pooling them, longest of all. From drills
# straight to questions is too far a step for these: of two runs one sat at chance for 300 steps and
# one for 700, until it was stopped.
_STEPS = {
    "qwen2_5_vl": _Steps(tower=300, drills=250, bridge=0, questions=600, selections=450),
    "internvl": _Steps(tower=300, drills=250, bridge=0, questions=350, selections=700),
    "llava_video": _Steps(tower=800, drills=400, bridge=200, questions=450, selections=700),
}


def default_recipe(family: Family) -> Recipe:
    """Return the recipe of the committed checkpoints."""
    steps = _STEPS[family.name]
    bridge = [_bridge(family, steps.bridge)] if steps.bridge else []
    _, ranked = family.frame_slots()
    room = _room(family)
    selecting = _selecting(family)
    # Headers of InternVL's frames stay with any token of theirs.
    kept = max(selecting.budgets) * (1 + ranked.count(False))
    short, long = 8, 16
    return Recipe(
        tower_steps=steps.tower,
        tower_scenes=160,
        tower_rate=2.5e-3,
        pool_scenes=80 * REEL,
        phases=(
            Phase(
                "language",
                2e-3,
                60,
                (
                    Segment("drill", steps.drills, 32, 100 + room // 2, (short,), 20),
                    Segment("drill", steps.drills, 24, 100 + room, (long,), 20),
                    *bridge,
                    Segment(
                        "questions",
                        steps.questions,
                        24,
                        160 + room,
                        (short, long),
                        8,
                        tasks=RETRIEVAL,
                    ),
                ),
            ),
            Phase(
                "more_questions",
                1e-3,
                20,
                (Segment("questions", 400, 24, 160 + room, (short, long), 8, tasks=RETRIEVAL),),
                unless=0.98,
            ),
            Phase(
                "near_misses",
                7e-4,
                20,
                (
                    Segment(
                        "questions",
                        500,
                        24,
                        160 + room,
                        (2, 4, 8, 12, long),
                        8,
                        pruned=0.5,
                        tokens=48,
                        tasks=_MIXED_TASKS,
                    ),
                ),
            ),
            Phase(
                "selected",
                5e-4,
                10,
                (
                    Segment(
                        "questions",
                        steps.selections,
                        16,
                        max(100 + kept, 160 + room),
                        (4, 8, long),
                        6,
                        tasks=RETRIEVAL,
                        selecting=selecting,
                    ),
                ),
            ),
        ),
        text={},
    )


def _room(family: Family) -> int:
    """Return how many tokens more than Qwen2.5-VL's sixteen pictures have the family's.

    A frame of InternVL and LLaVA-Video is one picture and has tokens beside its cells.
    """
    slots, _ = family.frame_slots()
    return len(slots) * 16 // family.pictures_per_frame - 32


def _bridge(family: Family, steps: int) -> Segment:
    """Return what leads from drills to questions: drills with words of questions between."""
    return Segment("drill", steps, 24, 160 + _room(family), (8, 16), 12, gaps=4)


def _selecting(family: Family) -> Selecting:
    """Return how the model of a family ranks while it trains.

    InternVL's and LLaVA-Video's presets read the same layer, Qwen2.5-VL's a later one, which turned
    out to rank best when the model was done.
    """
    # Sets are of 16 frames; a frame is one picture of InternVL's and LLaVA-Video's two a scene.
    if family.name == "qwen2_5_vl":
        return Selecting(0.7, (2,), "all", (32, 64, 96, 128), (6, 16))
    query: Literal["all", "last"] = "last" if family.name == "internvl" else "all"
    return Selecting(0.7, (4,), query, (48, 96, 192, 384), (6, 32))


def student_recipe(family: Family) -> Recipe:
    """Return the recipe of a student: half the layers, narrower, on the checkpoint's tower.

    It learns by the same drills and questions: a small model that never learned to look at the
    question makes a useless selector, however well it imitates a ranking.
    """
    whole = default_recipe(family)
    drills, longer, *_, questions = whole.phases[0].segments
    # Qwen2.5-VL's passes from drills to questions at once, the others' not without a bridge.
    bridge = _bridge(family, 0 if family.name == "qwen2_5_vl" else 150)
    segments = (
        replace(drills, steps=300),
        replace(longer, steps=300),
        bridge,
        # Attributes are learned one after another, that of Qwen2.5-VL's and LLaVA-Video's colours
        # last.
        replace(questions, steps=500 if family.name == "internvl" else 1100),
    )
    return replace(
        whole,
        tower_steps=150,
        phases=(replace(whole.phases[0], segments=segments),),
        text={
            "hidden_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "intermediate_size": 256,
        },
    )
