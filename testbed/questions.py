"""What is asked about a needle video: tasks, needles, and the rule that keeps an answer unique.

A question names a mark by two of its attributes. Any other mark of the video may share *one*
attribute with a needle (a near miss), never two, so exactly one answer is right and a guess from
half of the description is wrong. Splits own disjoint ranges of seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..core.errors import OptionError
from .scenes import COLOURS, DIGITS, EMPTY, GRID, SHAPES, SIZES

Mark = tuple[int, int, int]

#: Share of right answers that a guesser reaches who knows the task but saw no video.
CHANCE = {
    "number": 1 / len(DIGITS),
    "colour": 1 / len(COLOURS),
    "shape": 1 / len(SHAPES),
    "order": 1 / 2,
    "count": 1 / 4,
    "beside": 1 / len(DIGITS),
}
TASKS = tuple(CHANCE)
#: The tasks that retrieve an attribute of a single needle.
RETRIEVAL = TASKS[:3]
#: The task that asks for each attribute of a mark.
TASK_OF = ("colour", "shape", "number")
_MOST_COUNTED = 4

SEEDS_PER_SPLIT = 10**9
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Needle:
    """A mark that decides an answer, and the one scene and cell in which it appears.

    ``role`` is "asked" for a mark that the question describes and "beside" for its neighbour.
    """

    scene: int
    row: int
    column: int
    mark: Mark
    role: str = "asked"


@dataclass(frozen=True)
class Question:
    """A question, its one-word answer, and the needles that decide it."""

    task: str
    text: str
    answer: str
    needles: tuple[Needle, ...]


@dataclass(frozen=True)
class Plot:
    """A needle video before it is drawn; ``cells`` has the shape ``(scenes, GRID, GRID, 3)``."""

    seed: int
    cells: NDArray[np.int64]
    questions: tuple[Question, ...]


def split_seed(split: str, index: int) -> int:
    """Return the seed of video ``index`` of a split; no two splits share one.

    Raises
    ------
    OptionError
        If the split is unknown or the index lies outside its range of seeds.
    """
    if split not in SPLITS:
        raise OptionError(f"split={split!r} is unknown; choose one of {', '.join(SPLITS)}.")
    if not 0 <= index < SEEDS_PER_SPLIT:
        raise OptionError(f"index={index} must lie in 0..{SEEDS_PER_SPLIT - 1}.")
    return SPLITS.index(split) * SEEDS_PER_SPLIT + index


def describe(mark: Mark) -> str:
    """Name a mark in words, such as "red star 7"."""
    return f"{COLOURS[mark[0]]} {SHAPES[mark[1]]} {DIGITS[mark[2]]}"


def shared(first: Mark, second: Mark) -> int:
    """Count the attributes that two marks have in common."""
    return sum(a == b for a, b in zip(first, second, strict=True))


def phrase(task: str, marks: Sequence[Mark]) -> tuple[str, str]:
    """Put a question and its answer into words.

    Parameters
    ----------
    task : str
        One of ``TASKS``.
    marks : sequence of Mark
        The marks that decide it: one for retrieval; the earlier and the later for "order", where
        the question names them in the order of their colours, which says nothing about time; every
        occurrence for "count"; the asked mark and its neighbour for "beside".

    Returns
    -------
    text, answer : str
        The answer is one word of the testbed's vocabulary.

    Raises
    ------
    OptionError
        If the task is unknown.
    """
    colour, shape, digit = COLOURS[marks[0][0]], SHAPES[marks[0][1]], DIGITS[marks[0][2]]
    if task == "number":
        return f"What number is on the {colour} {shape}?", digit
    if task == "colour":
        return f"What colour is the {shape} with {digit}?", colour
    if task == "shape":
        return f"What shape is the {colour} one with {digit}?", shape
    if task == "order":
        names = [f"the {COLOURS[m[0]]} {SHAPES[m[1]]}" for m in sorted(marks)]
        return f"Which came first, {names[0]} or {names[1]}?", colour
    if task == "count":
        return f"How many numbers are on the {colour} {shape}?", DIGITS[len(marks)]
    if task == "beside":
        return f"What number is beside the {colour} {shape}?", DIGITS[marks[1][2]]
    raise OptionError(f"task={task!r} is unknown; choose from {', '.join(TASKS)}.")


def compose(seed: int, scenes: int, tasks: Sequence[str], *, filled: float = 0.6) -> Plot:
    """Write the plot of one video: its needles, its questions, and everything around them.

    Parameters
    ----------
    seed : int
        Seed of the video, from :func:`split_seed`.
    scenes : int
        Number of scenes.
    tasks : sequence of str
        The task of each question, in order; a task may recur.
    filled : float
        Share of the remaining cells that hold a distractor.

    Returns
    -------
    Plot
        The same plot for the same arguments, always.

    Raises
    ------
    OptionError
        If a task is unknown, or the video is too short for its needles.
    """
    if unknown := [task for task in tasks if task not in TASKS]:
        raise OptionError(f"task={unknown[0]!r} is unknown; choose from {', '.join(TASKS)}.")
    rng = np.random.RandomState([seed, scenes])
    stage = _Stage(scenes, rng)
    cast = [stage.cast(task) for task in tasks]

    free = np.argwhere(stage.allowed)
    cells = np.full((scenes, GRID, GRID, 3), EMPTY, dtype=np.int64)
    crowd = rng.random_sample((scenes, GRID, GRID)) < filled
    cells[crowd] = free[rng.randint(len(free), size=int(crowd.sum()))]
    for needles in cast:
        for needle in needles:
            mark = needle.mark
            if needle.role == "beside":
                mark = _as_mark(free[rng.randint(len(free))])
            cells[needle.scene, needle.row, needle.column] = mark

    questions = []
    for task, needles in zip(tasks, cast, strict=True):
        final = tuple(
            Needle(n.scene, n.row, n.column, _as_mark(cells[n.scene, n.row, n.column]), n.role)
            for n in needles
        )
        text, answer = phrase(task, [needle.mark for needle in final])
        questions.append(Question(task, text, answer, final))
    return Plot(seed, cells, tuple(questions))


class _Stage:
    """Hands out places and marks so that no two needles of different questions get close."""

    def __init__(self, scenes: int, rng: np.random.RandomState) -> None:
        self.allowed = np.ones(SIZES, dtype=bool)
        self._rng = rng
        self._scenes = scenes
        order = rng.permutation(scenes * GRID * GRID)
        self._slots = [divmod(int(slot), GRID * GRID) for slot in order]

    def cast(self, task: str) -> list[Needle]:
        """Choose the marks and places of one question's needles, earliest first."""
        marks = self._choose_marks(task)
        for mark in marks:
            self._exclude(mark)
        scenes_taken: set[int] = set()
        needles = []
        for mark in marks:
            scene, cell = self._take_slot(task, scenes_taken)
            scenes_taken.add(scene)
            needles.append(Needle(scene, cell // GRID, cell % GRID, mark))
        if task == "beside":
            asked = needles[0]
            beside = GRID - 1 - asked.column
            needles.append(Needle(asked.scene, asked.row, beside, asked.mark, "beside"))
        else:
            # Times are drawn after the marks: sorting the places leaves the marks in random order.
            places = sorted((n.scene, n.row, n.column) for n in needles)
            needles = [Needle(*place, mark) for place, mark in zip(places, marks, strict=True)]
        return needles

    def _choose_marks(self, task: str) -> list[Mark]:
        if task == "count":
            count = int(self._rng.randint(1, _MOST_COUNTED + 1))
            pairs = np.argwhere(self.allowed.sum(axis=2) >= count)
            colour, shape = pairs[self._pick(len(pairs), task)]
            digits = self._rng.permutation(np.flatnonzero(self.allowed[colour, shape]))[:count]
            return [(int(colour), int(shape), int(digit)) for digit in digits]
        free = np.argwhere(self.allowed)
        first = _as_mark(free[self._pick(len(free), task)])
        if task != "order":
            return [first]
        apart = [m for m in map(_as_mark, free) if shared(first, m) < 2 and m[0] != first[0]]
        return [first, apart[self._pick(len(apart), task)]]

    def _pick(self, count: int, task: str) -> int:
        if count == 0:
            raise OptionError(
                f"No mark is left for the task {task!r}: too many questions on one video. "
                "Ask fewer questions of each video."
            )
        return int(self._rng.randint(count))

    def _exclude(self, mark: Mark) -> None:
        colour, shape, digit = mark
        self.allowed[colour, shape] = False
        self.allowed[colour, :, digit] = False
        self.allowed[:, shape, digit] = False

    def _take_slot(self, task: str, scenes_taken: set[int]) -> tuple[int, int]:
        for slot in self._slots:
            scene, cell = slot
            partner = (scene, cell // GRID * GRID + GRID - 1 - cell % GRID)
            if scene in scenes_taken or (task == "beside" and partner not in self._slots):
                continue
            self._slots.remove(slot)
            if task == "beside":
                self._slots.remove(partner)
            return slot
        raise OptionError(
            f"{self._scenes} scenes have no room for the task {task!r} beside the other needles. "
            "Make the video longer or ask fewer questions of it."
        )


def _as_mark(values: NDArray[np.int64]) -> Mark:
    return int(values[0]), int(values[1]), int(values[2])
