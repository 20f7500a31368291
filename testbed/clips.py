"""Training clips: a pool of scenes seen through the codec, clips drawn from it, and their turns.

A clip is a handful of frames of the pool, whole or pruned to some of its tokens, as selection will
leave it. It is asked several questions in turn, exactly as a chat of the family's template would
put them, because one answer a clip teaches too little.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .questions import RETRIEVAL, TASK_OF, Mark, phrase
from .scenes import COLOURS, DIGITS, EMPTY, GRID, SHAPES, SIZES, draw_frames, random_cells
from .videos import HOLD, decode_video, encode_video

#: Largest step of time between frames in rope units: two frames a second to one every two.
MAX_STEP = 4
#: Share of rendered frames whose two pictures come from different scenes, as sparse sampling
#: makes them; such a frame counts as what its first picture shows.
MIXED = 0.1
NAMES = (COLOURS, SHAPES, DIGITS)
FILLERS = ("what", "is", "on", "the", "one", "with", "number", "colour", "shape", "?")


def film_scenes(
    scenes: int, rng: np.random.RandomState, *, filled: float, mixed: bool
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draw random scenes and pass them through the encoder and decoder.

    Returns
    -------
    pictures : ndarray of shape (scenes * HOLD, FRAME, FRAME, 3), uint8
        Decoded pictures, ``HOLD`` a scene.
    marks : ndarray of shape (scenes, GRID * GRID, 3)
        What each cell shows.
    """
    cells = random_cells(scenes, rng, filled=filled)
    frames = draw_frames(cells, rng, hold=HOLD)
    if mixed:
        swap = np.flatnonzero(rng.random_sample(scenes) < MIXED)
        frames[swap * HOLD + 1] = frames[(swap + 1) % scenes * HOLD]
    return decode_video(encode_video(frames)), cells.reshape(scenes, GRID * GRID, 3)


@dataclass(frozen=True)
class Pool:
    """Scenes encoded once by the finished tower.

    Attributes
    ----------
    features : Tensor of shape (scenes, looks, GRID * GRID, hidden)
        Visual tokens; a family that encodes pictures singly has ``HOLD`` looks at each scene.
    marks : ndarray of shape (scenes, GRID * GRID, 3)
        What each cell shows.
    """

    features: Tensor
    marks: NDArray[np.int64]
    _with_pair: dict[tuple[int, int], list[int]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        index = defaultdict(list)
        for scene, cell in np.argwhere(self.marks[..., 0] != EMPTY).tolist():
            colour, shape, _ = self.marks[scene, cell].tolist()
            index[colour, shape].append(scene)
        object.__setattr__(self, "_with_pair", dict(index))

    @property
    def looks(self) -> int:
        """Encoded looks at a scene."""
        return self.features.shape[1]

    def scenes_with(self, colour: int, shape: int) -> list[int]:
        """Scenes that show this shape in this colour."""
        return self._with_pair.get((colour, shape), [])


@dataclass(frozen=True)
class Clip:
    """Frames of a pool, and which of their tokens are there.

    Attributes
    ----------
    scenes, looks, runs, times : ndarray of shape (frames,)
        Scene of the pool and look at it; number of the scene within the clip; time in rope units.
    kept : ndarray of shape (frames, slots), bool
        Tokens that are there.
    focus : tuple of int and Mark, optional
        Attribute and mark that tokens were selected for: what its first question asks.
    """

    scenes: NDArray[np.int64]
    looks: NDArray[np.int64]
    runs: NDArray[np.int64]
    times: NDArray[np.int64]
    kept: NDArray[np.bool_]
    focus: tuple[int, Mark] | None = None


def whole_clip(pool: Pool, rng: np.random.RandomState, *, frames: int, slots: int) -> Clip:
    """Draw a clip of at most ``frames`` frames with every token in place."""
    repeat = int(rng.randint(1, pool.looks + 1)) if frames >= 2 * pool.looks else 1
    scenes = _scenes(pool, rng, frames // repeat)
    return _clip(pool, rng, scenes, repeat, np.ones((len(scenes) * repeat, slots), dtype=bool))


def pruned_clip(
    pool: Pool,
    rng: np.random.RandomState,
    *,
    tokens: int,
    frames: int,
    ranked: Sequence[bool],
    cell_slots: Sequence[int],
) -> Clip:
    """Draw a clip of which ``tokens`` tokens are left, near misses more than others.

    Selection keeps what resembles the question, so the answering pass is dense in marks that share
    an attribute with it. Here the marks of a small palette are kept first. Unranked tokens stay
    where any token of their frame does; times are consecutive or the original ones.
    """
    repeat = int(rng.randint(1, pool.looks + 1))
    scenes = _scenes(pool, rng, max(1, frames // repeat))
    total = len(scenes) * repeat
    appeal = rng.random_sample((total, len(ranked))) * 1.2
    marks = np.repeat(pool.marks[scenes], repeat, axis=0)
    chosen = [rng.permutation(size)[:keep] for size, keep in zip(SIZES, (3, 3, 5), strict=True)]
    for attribute, palette in enumerate(chosen):
        appeal[:, list(cell_slots)] += np.isin(marks[..., attribute], palette)
    appeal[:, ~np.asarray(ranked)] = -np.inf
    there = int(np.isfinite(appeal).sum())
    best = np.argsort(-appeal, axis=None, kind="stable")[: min(tokens, there)]
    chosen_tokens = np.zeros(appeal.size, dtype=np.bool_)
    chosen_tokens[best] = True
    kept = chosen_tokens.reshape(total, len(ranked))
    left: NDArray[np.bool_] = np.asarray(kept.any(axis=1))
    kept[:, ~np.asarray(ranked)] = left[:, None]
    clip = _clip(pool, rng, scenes, repeat, kept)
    times = clip.times
    if rng.random_sample() < 0.7:
        step = int(rng.randint(1, MAX_STEP + 1))
        times = np.cumsum(left) * step - step
    return Clip(clip.scenes[left], clip.looks[left], clip.runs[left], times[left], kept[left])


def drill(
    pool: Pool,
    clip: Clip,
    cell_slots: Sequence[int],
    rng: np.random.RandomState,
    count: int,
    *,
    gaps: int = 0,
) -> list[tuple[str, str]]:
    """Name marks by two attributes, in any order, for the third: ("star red", "7").

    Questions alone teach nothing for hundreds of steps: one answer in ten tokens is too thin.
    Every third token of a drill is an answer. With ``gaps``, up to so many words of questions
    stand, at random, before either attribute and before the answer: ("with star the one red ?",
    "7"), because a model that has only ever answered right behind the second attribute may not
    find its way from there to the end of a question.
    """
    shown = _shown(pool, clip, cell_slots)
    answers = _answers(shown)
    found = []
    for at in rng.permutation(3 * len(shown)):
        mark, third = shown[at // 3].mark, int(at % 3)
        if len(answers[_key(mark, third)]) == 1:
            first, second = rng.permutation([axis for axis in range(3) if axis != third])
            words = [NAMES[axis][mark[axis]] for axis in (first, second, third)]
            names = " ".join(words[:2])
            if gaps:
                fill = [_filler(rng, gaps) for _ in range(3)]
                names = f"{fill[0]} {words[0]} {fill[1]} {words[1]} {fill[2]}"
            found.append((names, words[2]))
    return found[:count]


def _filler(rng: np.random.RandomState, most: int) -> str:
    """Draw up to ``most`` words of questions that name no mark."""
    return " ".join(FILLERS[at] for at in rng.randint(len(FILLERS), size=rng.randint(most + 1)))


def ask(
    pool: Pool,
    clip: Clip,
    cell_slots: Sequence[int],
    rng: np.random.RandomState,
    *,
    tasks: Sequence[str],
    count: int,
) -> list[tuple[str, str]]:
    """Ask a clip up to ``count`` questions that it answers without ambiguity.

    Returns
    -------
    list of (question, answer)
        What tokens were selected for, then tasks as often as ``tasks`` names them, as far as the
        clip has marks for them.
    """
    shown = _shown(pool, clip, cell_slots)
    if not shown:
        return []
    answers = _answers(shown)
    asked: dict[str, str] = {}
    if clip.focus is not None:
        wanted, mark = clip.focus
        asked.update([phrase(TASK_OF[wanted], [mark])])
    for _ in range(count * 3):
        task = tasks[rng.randint(len(tasks))]
        marks = _marks_for(task, shown, answers, rng)
        if marks is not None:
            text, answer = phrase(task, marks)
            asked.setdefault(text, answer)
        if len(asked) == count:
            break
    return list(asked.items())


class _Sight(NamedTuple):
    """A mark that a clip shows: number of its scene within the clip, its cell, itself."""

    run: int
    cell: int
    mark: Mark


_Answers = dict[tuple[int, int, int], set[int]]


def _shown(pool: Pool, clip: Clip, cell_slots: Sequence[int]) -> list[_Sight]:
    """List the marks whose tokens are there, each once a scene, in time order."""
    there = clip.kept[:, list(cell_slots)] & (pool.marks[clip.scenes][..., 0] != EMPTY)
    sights = {
        (int(clip.runs[frame]), int(cell)): pool.marks[clip.scenes[frame], cell].tolist()
        for frame, cell in np.argwhere(there)
    }
    return [_Sight(run, cell, (m[0], m[1], m[2])) for (run, cell), m in sorted(sights.items())]


def _key(mark: Mark, wanted: int) -> tuple[int, int, int]:
    """Say what a question about attribute ``wanted`` tells of a mark."""
    first, second = (axis for axis in range(3) if axis != wanted)
    return wanted, mark[first], mark[second]


def _answers(shown: Sequence[_Sight]) -> _Answers:
    """Collect all answers that the clip gives to each description."""
    answers: _Answers = defaultdict(set)
    for sight in shown:
        for wanted in range(3):
            answers[_key(sight.mark, wanted)].add(sight.mark[wanted])
    return answers


def _marks_for(
    task: str, shown: Sequence[_Sight], answers: _Answers, rng: np.random.RandomState
) -> list[Mark] | None:
    """Find the marks of one question, None where the clip has no answer or more than one."""
    sight = shown[rng.randint(len(shown))]
    colour, shape, _ = sight.mark
    if task in RETRIEVAL:
        wanted = TASK_OF.index(task)
        return [sight.mark] if len(answers[_key(sight.mark, wanted)]) == 1 else None
    if task == "count":
        # Few chance upon a shape and colour that recurs; look for one half of the time.
        if rng.random_sample() < 0.5:
            often = [key for key, digits in answers.items() if key[0] == 2 and len(digits) > 1]
            if often:
                _, colour, shape = often[rng.randint(len(often))]
        digits = sorted(answers[2, colour, shape])
        return [(colour, shape, digit) for digit in digits] if len(digits) <= 4 else None
    alike = [other for other in shown if other.mark[:2] == (colour, shape)]
    if len(alike) > 1:
        return None
    if task == "beside":
        beside = sight.cell // GRID * GRID + GRID - 1 - sight.cell % GRID
        near = [other.mark for other in shown if (other.run, other.cell) == (sight.run, beside)]
        return [sight.mark, near[0]] if near else None
    other = shown[rng.randint(len(shown))]
    same = [third for third in shown if third.mark[:2] == other.mark[:2]]
    if len(same) > 1 or other.run == sight.run or other.mark[0] == colour:
        return None
    return [early.mark for early in sorted((sight, other))]


def _scenes(pool: Pool, rng: np.random.RandomState, count: int) -> NDArray[np.int64]:
    """Draw scenes; half of the time some of them repeat a shape and colour, to be counted."""
    scenes = rng.randint(len(pool.marks), size=count)
    marks = pool.marks[scenes].reshape(-1, 3)
    marks = marks[marks[:, 0] != EMPTY]
    if rng.random_sample() < 0.5 and len(marks):
        colour, shape, _ = marks[rng.randint(len(marks))].tolist()
        again = pool.scenes_with(colour, shape)
        for at in rng.permutation(count)[: int(rng.randint(1, 4))]:
            scenes[at] = again[rng.randint(len(again))]
    return scenes


def _clip(
    pool: Pool,
    rng: np.random.RandomState,
    scenes: NDArray[np.int64],
    repeat: int,
    kept: NDArray[np.bool_],
) -> Clip:
    looks = np.tile(np.arange(repeat), len(scenes))
    if repeat == 1:
        looks = rng.randint(pool.looks, size=len(scenes))
    runs = np.repeat(np.arange(len(scenes)), repeat)
    times = np.arange(len(runs)) * int(rng.randint(1, MAX_STEP + 1))
    return Clip(np.repeat(scenes, repeat), looks, runs, times, kept)
