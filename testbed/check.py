"""How well a checkpoint answers short clips, through real files, processor and chat template.

The plain model sees every token; nothing is selected. Two controls belong to the figure: a
question asked of another video, and a question asked of none. Both must sit at chance.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..core.errors import OptionError
from .models import CELLS, Family
from .questions import CHANCE, TASKS, compose, split_seed
from .videos import FPS, HOLD, decode_video, draw_plot, encode_video


@dataclass(frozen=True)
class Score:
    """Right answers of each task, and how many were asked."""

    right: dict[str, int]
    asked: dict[str, int]

    def accuracy(self, tasks: Sequence[str] = TASKS) -> float:
        """Share of right answers over some tasks."""
        asked = sum(self.asked.get(task, 0) for task in tasks)
        return sum(self.right.get(task, 0) for task in tasks) / max(1, asked)

    def chance(self, tasks: Sequence[str] = TASKS) -> float:
        """Accuracy of guessing over the same questions."""
        asked = {task: self.asked.get(task, 0) for task in tasks}
        total = sum(CHANCE[task] * count for task, count in asked.items())
        return total / max(1, sum(asked.values()))

    def rows(self) -> dict[str, dict[str, float]]:
        """Accuracy, number of questions and chance of every task asked."""
        return {
            task: {
                "accuracy": round(self.right.get(task, 0) / count, 4),
                "asked": count,
                "chance": CHANCE[task],
            }
            for task, count in self.asked.items()
        }


def check_clips(
    family: Family,
    model: Any,
    *,
    split: str,
    count: int,
    frames: int = 16,
    tasks: Sequence[str] = TASKS,
    control: str | None = None,
) -> Score:
    """Ask a model about ``count`` videos that are encoded and decoded like any file.

    Parameters
    ----------
    family, model : Family, Any
        The family's processor, and the model to ask.
    split : str
        "validation" while choosing, "test" for the figure to report.
    count, frames : int
        Videos, and frames a video.
    tasks : sequence of str
        One question of each task is asked of every video.
    control : str, optional
        "shuffled" asks each video what was meant for another; "blind" shows no video.

    Returns
    -------
    Score
        Counted over the first token of each answer, taken greedily.

    Raises
    ------
    OptionError
        If ``count`` is below one, or the split or a task is unknown.
    """
    if count < 1:
        raise OptionError(f"count={count}: there must be at least one video to ask about.")
    # At least two, so that "shuffled" never asks a single video its own question.
    plots = [
        compose(split_seed(split, index), frames // HOLD, tasks) for index in range(max(count, 2))
    ]
    right: dict[str, int] = defaultdict(int)
    asked: dict[str, int] = defaultdict(int)
    for index, plot in enumerate(plots[:count]):
        pictures = None
        if control != "blind":
            pictures = decode_video(encode_video(draw_plot(plot)))
        source = plots[(index + 1) % len(plots)] if control == "shuffled" else plot
        for question in source.questions:
            asked[question.task] += 1
            said = answer(family, model, pictures, question.text)
            right[question.task] += said == question.answer
    return Score(dict(right), dict(asked))


@torch.no_grad()
def answer(family: Family, model: Any, pictures: NDArray[np.uint8] | None, text: str) -> str:
    """Return the first word of the model's answer to a question about decoded pictures."""
    inputs = family_inputs(family, pictures, text)
    logits = model(**inputs, use_cache=False).logits[0, -1]
    word: str = family.tokenizer.decode([int(logits.argmax())])
    return word


def family_inputs(
    family: Family, pictures: NDArray[np.uint8] | None, text: str
) -> dict[str, torch.Tensor]:
    """Make the inputs of a plain forward pass with the real processor and chat template.

    ``position_ids`` are the family's own, because transformers' differ from those that Qwen2.5-VL
    was trained with.
    """
    content = [{"type": "text", "text": text}]
    media: dict[str, Any] = {}
    if pictures is not None:
        content.insert(0, {"type": "video"})
        media = {
            "videos": [torch.from_numpy(pictures).permute(0, 3, 1, 2)],
            "video_metadata": [
                {
                    "fps": FPS,
                    "total_num_frames": len(pictures),
                    "frames_indices": list(range(len(pictures))),
                }
            ],
            "do_sample_frames": False,
        }
    prompt = family.processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    inputs: dict[str, Any] = dict(family.processor(text=[prompt], return_tensors="pt", **media))
    tokens = inputs["input_ids"].shape[1]
    slots, _ = family.frame_slots()
    before = len(family.around()[0]) if pictures is not None else 0
    shown = 0 if pictures is None else len(pictures) // family.pictures_per_frame
    seconds = float(inputs.get("second_per_grid_ts", [1.0])[0])
    times = (np.arange(shown) * seconds * family.time_units).astype(np.int64)
    positions = family.positions(
        before,
        np.repeat(times, len(slots)),
        np.tile(np.arange(len(slots)) % CELLS, shown),
        tokens - before - shown * len(slots),
    )
    inputs["position_ids"] = torch.from_numpy(positions.astype(np.int64))[..., None, :]
    return inputs
