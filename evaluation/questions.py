"""What the harness asks: its requests, read into questions that can be compared and sent."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from ..core.errors import PromptError
from .identity import file_identity
from .journal import digest

#: What a task may raise or do where a video is not there: some end the whole process.
_NOT_THERE = (SystemExit, AssertionError, OSError)


@dataclass(frozen=True)
class Question:
    """One request of the harness, without its pictures.

    Attributes
    ----------
    task, split, doc_id : where the row is.
    ordinal : 0, or which repetition of the same row.
    turns : the conversation: role, and content of ``{"type": "text", "text": …}``,
        ``{"type": "video", "path": …}`` and ``{"type": "image", "digest": …}``.
    generation : the task's options of generation.
    error : why the task could not even name its video; None where it could.
    files : what tells its videos from others that may come to lie there, as they were when it was
        read: a video that is replaced while questions are asked changes no name.
    """

    task: str
    split: str
    doc_id: int
    ordinal: int
    turns: list[dict[str, Any]]
    generation: dict[str, Any]
    error: str | None = None
    files: tuple[tuple[Any, ...], ...] = ()

    @property
    def videos(self) -> list[str]:
        """Paths of the videos it shows, in order."""
        return [part["path"] for part in self._parts() if part["type"] == "video"]

    @property
    def has_images(self) -> bool:
        """Whether it shows pictures besides videos."""
        return any(part["type"] == "image" for part in self._parts())

    def key(self, settings: str) -> str:
        """Name the question with everything that decides its answer.

        A video counts with its size and time of change, so one that was missing or damaged is
        asked about again once it has been replaced.
        """
        where = [self.task, self.split, self.doc_id, self.ordinal]
        return digest([settings, where, self.turns, self.files, self.generation, self.error])

    def _parts(self) -> list[dict[str, Any]]:
        return [part for turn in self.turns for part in turn["content"]]


def read_requests(requests: Sequence[Any], docs: Any) -> list[Question | None]:
    """Read the harness's chat requests; None for those that only even out the processes.

    Parameters
    ----------
    requests : instances with ``(ctx, doc_to_messages, gen_kwargs, doc_id, task, split)``.
    docs : rows by task and split.

    Raises
    ------
    PromptError
        A request shows something that is neither text, picture nor video file.
    """
    seen: Counter[tuple[str, str, int]] = Counter()
    questions: list[Question | None] = []
    for request in requests:
        if request.metadata.get("__padding_only__"):
            questions.append(None)
            continue
        _, doc_to_messages, generation, doc_id, task, split = request.args
        where = (task, split, doc_id)
        turns, error = _ask_task(doc_to_messages, docs[task][split][doc_id], where)
        question = Question(*where, seen[where], turns, dict(generation), error)
        questions.append(replace(question, files=tuple(map(file_identity, question.videos))))
        seen[where] += 1
    return questions


def pictures_of(doc_to_messages: Callable[..., Any], doc: Any) -> list[Image.Image]:
    """Fetch the pictures of a row, in order, as RGB."""
    parts = [part for turn in doc_to_messages(doc) for part in turn["content"]]
    return [_open(part["url"]) for part in parts if part["type"] == "image"]


def by_video(questions: Iterable[Question]) -> list[list[Question]]:
    """Group questions that show the same videos, in order of first appearance."""
    groups: dict[tuple[Any, ...], list[Question]] = {}
    for question in questions:
        # Without a video there is nothing to share.
        alone = (question.task, question.doc_id, question.ordinal)
        groups.setdefault(tuple(question.videos) or alone, []).append(question)
    return list(groups.values())


def deal(groups: Sequence[list[Question]], hands: int) -> list[list[Question]]:
    """Deal groups of questions to processes, none split, so that all have about as many.

    The same for every process that deals, and in the order of the groups within each hand.
    """
    loads = [0] * hands
    owner = {}
    for index in sorted(range(len(groups)), key=lambda i: (-len(groups[i]), i)):
        lightest = loads.index(min(loads))
        owner[index] = lightest
        loads[lightest] += len(groups[index])
    return [
        [question for i, group in enumerate(groups) if owner[i] == hand for question in group]
        for hand in range(hands)
    ]


def _ask_task(
    doc_to_messages: Callable[..., Any], doc: Any, where: tuple[str, str, int]
) -> tuple[list[dict[str, Any]], str | None]:
    try:
        messages = doc_to_messages(doc)
    except _NOT_THERE as problem:
        reason = str(problem) or type(problem).__name__
        return [], f"{where[0]} {where[2]}: the task found no video for this row ({reason})."
    return [
        {"role": turn["role"], "content": [_part(part, where) for part in turn["content"]]}
        for turn in messages
    ], None


def _part(part: dict[str, Any], where: tuple[str, str, int]) -> dict[str, Any]:
    kind = part["type"]
    if kind == "text":
        return {"type": "text", "text": part["text"]}
    if kind == "image":
        picture = _open(part["url"])
        state = hashlib.sha256(f"{picture.size}".encode() + picture.tobytes())
        return {"type": "image", "digest": state.hexdigest()[:16]}
    whole = part.get("start_time") is None and part.get("end_time") is None
    if kind == "video" and isinstance(part["url"], str) and whole:
        return {"type": "video", "path": part["url"].removeprefix("file://")}
    what = "a part of a video" if kind == "video" else kind
    raise PromptError(
        f"{where[0]} {where[2]} shows {what}: only text, pictures and whole video files can be "
        "asked about. Leave the task out, or cut its videos into files first."
    )


def _open(source: Any) -> Image.Image:
    picture = source if isinstance(source, Image.Image) else Image.open(source)
    return picture.convert("RGB")
