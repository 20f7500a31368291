"""The needle benchmark: questions about generated videos, as tasks of lmms-eval.

The tasks lie in ``tasks/``; a file there says length, split and number of videos. Questions are
composed when a task is loaded, videos rendered when they are first asked about, into a folder that
later runs share.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, DatasetDict
from lmms_eval.api.task import ConfigurableMessagesTask

from ..core.errors import OptionError
from ..inference.features import Progress
from ..testbed.questions import RETRIEVAL, compose, split_seed
from ..testbed.videos import HOLD, make_needle_video

#: Folder of the tasks, for ``--include_path``.
TASKS = Path(__file__).resolve().parent / "tasks"


@dataclass(frozen=True)
class Recipe:
    """The videos of one task.

    Attributes
    ----------
    split : ``"validation"`` while choosing, ``"test"`` for the figure to report.
    frames : pictures of a video.
    videos : how many.
    asks : what each is asked, in turn.
    """

    split: str
    frames: int
    videos: int
    asks: tuple[str, ...] = RETRIEVAL

    def rows(self) -> list[dict[str, Any]]:
        """Compose the questions; nothing is drawn."""
        found = []
        for index in range(self.videos):
            plot = compose(split_seed(self.split, index), self.frames // HOLD, self.asks)
            found += [
                {
                    "id": f"{self.path(index).stem}-{number}",
                    "video": self.path(index).stem,
                    "index": index,
                    "split": self.split,
                    "frames": self.frames,
                    "asks": list(self.asks),
                    "ask": question.task,
                    "question": question.text,
                    "answer": question.answer,
                }
                for number, question in enumerate(plot.questions)
            ]
        return found

    def path(self, index: int) -> Path:
        """Return where video ``index`` lies or will lie."""
        return videos_folder() / f"{self.split}-{self.frames:04d}-{index:05d}.mp4"

    def render(self, index: int) -> Path:
        """Draw video ``index`` unless it is there; whole or not at all."""
        made = make_needle_video(
            self.path(index), split=self.split, index=index, frames=self.frames, tasks=self.asks
        )
        return made.path


class NeedleTask(ConfigurableMessagesTask):
    """A task of lmms-eval whose rows are composed instead of downloaded."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        config = {name: value for name, value in config.items() if name != "class"}
        self.recipe = recipe_of(config)
        del config["needle"]
        super().__init__(config=config)

    def download(self, dataset_kwargs: Any = None) -> None:
        """Compose the rows."""
        rows = Dataset.from_list(self.recipe.rows())
        self.dataset = DatasetDict({self.recipe.split: rows})
        self.dataset_no_image = self.dataset


def videos_folder() -> Path:
    """Return the folder of rendered videos: below ``FLEXSELECT_CACHE`` or the user's cache."""
    named = os.environ.get("FLEXSELECT_CACHE")
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return (Path(named) if named else Path(user) / "flexselect") / "needle"


def task_names() -> list[str]:
    """Return the names of the needle tasks."""
    return sorted(path.stem for path in TASKS.glob("*.yaml"))


def recipe_of(config: Mapping[str, Any]) -> Recipe:
    """Read what a task's file says of its videos; `OptionError` where it says too little."""
    try:
        about = config["needle"]
        return Recipe(config["test_split"], int(about["frames"]), int(about["videos"]))
    except (KeyError, TypeError, ValueError) as error:
        raise OptionError(
            f"Task {config.get('task')}: a needle task needs test_split, and needle with frames "
            f"and videos ({error!r})."
        ) from error


def prepare(tasks: Sequence[str], limit: int | None, progress: Progress | None = None) -> None:
    """Render the videos that the first ``limit`` questions of needle tasks are about."""
    needed = []
    for task in tasks:
        if task in task_names():
            text = (TASKS / f"{task}.yaml").read_text().replace("!function ", "")
            recipe = recipe_of(yaml.safe_load(text))
            asked = recipe.rows()[:limit]
            needed += [(recipe, index) for index in dict.fromkeys(row["index"] for row in asked)]
    for done, (recipe, index) in enumerate(needed, 1):
        recipe.render(index)
        if progress is not None:
            progress("render", done, len(needed))


def video_of(doc: Mapping[str, Any]) -> list[str]:
    """Return the video that a row asks about, rendering it if need be."""
    recipe = Recipe(doc["split"], doc["frames"], doc["index"] + 1, tuple(doc["asks"]))
    return [str(recipe.render(doc["index"]))]


def score(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Compare word for word; case and a full stop count for nothing."""
    said = results[0].strip().rstrip(".").lower()
    right = float(said == doc["answer"].lower())
    return {"needle_accuracy": {"score": right, "video": doc["video"]}}


def accuracy(results: Sequence[Mapping[str, Any]]) -> float:
    """Share of right answers."""
    return sum(result["score"] for result in results) / len(results)
