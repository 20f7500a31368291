"""Training clips as selection leaves them: the model ranks a long video itself and keeps the best.

What the model attends to are the near misses that it can hardly tell from the needle, many of them
with the same wrong answer. No clip drawn at random is like that, and a model that never saw one
answers by majority. Ranking runs through the engine and the method that everybody uses.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..core.layout import Clip as Shape
from ..inference.engine import Engine
from ..inference.features import Encoded, Features
from ..inference.methods import FlexSelect
from .batches import Scribe
from .clips import MAX_STEP, Clip, Pool
from .models import FEATURE, NEWLINE, Family
from .questions import TASK_OF, Mark, phrase, shared
from .recipe import Selecting
from .scenes import EMPTY, GRID


class Rehearsal:
    """Plays long videos of a pool to the model as it is, and hands out what it would keep.

    Parameters
    ----------
    family, model : Family, Any
        The model that is being trained; it ranks with the weights it has at the time.
    pool : Pool
        Scenes the videos are made of.
    scribe : Scribe
        Writes the prompts.
    selecting : Selecting
        How long the videos are and how they are ranked.
    """

    def __init__(
        self, family: Family, model: Any, pool: Pool, scribe: Scribe, selecting: Selecting
    ) -> None:
        self._family, self._model, self._pool = family, model, pool
        self._scribe, self._selecting = scribe, selecting
        slots = scribe.slots.tolist()
        self._columns = sum(slot in (FEATURE, NEWLINE) for slot in slots) // GRID
        image = family.token(family.placeholder)
        self._frame = [image if slot in (FEATURE, NEWLINE) else slot for slot in slots]
        self._engines = {
            (layer, budget): Engine(
                model,
                FlexSelect(
                    layer=layer,
                    budget=budget,
                    aggregation="max",
                    query=selecting.query,
                    frames_per_set=selecting.frames_per_set,
                    positions="compact",
                ),
            )
            for layer in selecting.layers
            for budget in selecting.budgets
        }

    @torch.no_grad()
    def clip(self, rng: np.random.RandomState, budget: int) -> Clip:
        """Ask for one mark of a long video and return the tokens that selection leaves, and it.

        Parameters
        ----------
        rng : numpy.random.RandomState
            Draws the video, its length, what is asked, and the reference layer.
        budget : int
            Tokens to keep, one of the budgets of ``selecting``.

        Returns
        -------
        Clip
            Its focus is what was asked. Times count kept frames, as compact positions do.
        """
        pool, selecting = self._pool, self._selecting
        engine = self._engines[int(rng.choice(selecting.layers)), budget]
        fewest, most = selecting.sets
        frames = int(rng.randint(fewest, most + 1)) * selecting.frames_per_set
        step = int(rng.randint(1, MAX_STEP + 1))
        drawn, at, wanted, mark = _video(pool, rng, frames // pool.looks)
        scenes = np.repeat(drawn, pool.looks)
        looks = np.tile(np.arange(pool.looks), len(drawn))
        runs = np.repeat(np.arange(len(drawn)), pool.looks)

        question, _ = phrase(TASK_OF[wanted], [mark])
        seconds = step / self._family.time_units
        selection = engine.select(self._encoded(engine, scenes, looks, question, seconds))
        assert selection is not None
        ranked = np.asarray(self._scribe.ranked)
        best = np.zeros(frames * int(ranked.sum()), dtype=np.bool_)
        best[selection.kept.numpy()] = True
        kept = np.zeros((frames, len(ranked)), dtype=np.bool_)
        kept[:, ranked] = best.reshape(frames, -1)
        # What is asked is always there, or the answer would be a guess.
        cell = [tuple(each) for each in pool.marks[drawn[at]].tolist()].index(mark)
        kept[runs == at, self._scribe.cell_slots[cell]] = True
        left: NDArray[np.bool_] = np.asarray(kept.any(axis=1))
        kept[:, ~ranked] = left[:, None]
        return Clip(
            scenes=scenes[left],
            looks=looks[left],
            runs=runs[left],
            times=np.arange(int(left.sum())) * step,
            kept=kept[left],
            focus=(wanted, mark),
        )

    def _encoded(
        self,
        engine: Engine,
        scenes: NDArray[np.int64],
        looks: NDArray[np.int64],
        question: str,
        seconds: float,
    ) -> Encoded:
        """Lay out a long video and a question, with features of the pool."""
        scribe, frames = self._scribe, len(scenes)
        text = [*self._frame * frames, *scribe.after, *scribe.question(question)]
        prompt = engine.architecture.layout(
            torch.tensor([*scribe.before, *text]), [Shape(frames, GRID, self._columns, seconds)], []
        )
        tokens = self._pool.features[torch.from_numpy(scenes), torch.from_numpy(looks)]
        newline = self._family.newline(self._model)
        if newline is not None:
            rows = tokens.unflatten(1, (GRID, -1))
            tokens = torch.cat([rows, newline.expand(frames, GRID, 1, -1)], 2).flatten(1, 2)
        times = torch.arange(frames, dtype=torch.float64) * seconds
        return Encoded(prompt, Features(tokens.flatten(0, 1)), (times,))


def _video(
    pool: Pool, rng: np.random.RandomState, count: int
) -> tuple[NDArray[np.int64], int, int, Mark]:
    """Draw the scenes of a video, which of them is asked for, and an attribute and mark of it.

    As in a needle video, no other mark shares two attributes with the asked one.
    """
    while True:
        scene = int(rng.randint(len(pool.marks)))
        marks = [tuple(mark) for mark in pool.marks[scene].tolist() if mark[0] != EMPTY]
        if not marks:
            continue
        colour, shape, digit = marks[rng.randint(len(marks))]
        mark = colour, shape, digit
        if sum(shared(mark, other) > 1 for other in marks) == 1:
            break
    wanted = int(rng.randint(3))
    alike = (pool.marks == np.array(mark)).sum(axis=2) > 1
    others = np.flatnonzero(~alike.any(axis=1))
    scenes = others[rng.randint(len(others), size=count)]
    at = int(rng.randint(count))
    scenes[at] = scene
    return scenes, at, wanted, mark
