"""The plug-in: lmms-eval's chat interface over the engine, one class for all families.

Answers are kept in a journal as they come, so an interrupted run continues. Questions about one
video are asked one after another, by one process, and share its decoding and encoding.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms

from ..core.errors import FlexSelectError, OptionError, UnsupportedModelError, VideoError
from ..inference.engine import Engine
from ..inference.features import Encoded
from ..inference.session import Video
from ..inference.terminal import progress_bars
from .answering import answer, encode_prompt, generation_options, stop_texts
from .arguments import parse_arguments
from .identity import checkpoint_digest, code_digest, versions
from .journal import Journal, digest
from .loaded import Loaded
from .prompts import give_prompt, prompt_settings
from .questions import Question, by_video, deal, pictures_of, read_requests

logger = logging.getLogger(__name__)

Row = dict[str, Any]


class FlexSelectModel(lmms):
    """A model with a method, as lmms-eval sees it.

    Parameters
    ----------
    loaded : what is loaded already; default: load what the arguments name.
    given : see `Arguments`, and the reference's names for them.

    Attributes
    ----------
    arguments : what was given.
    settings : everything but the question that decides an answer.
    settings_name : their digest.
    answered : what the latest call answered, in all processes: the journal's lines by key.

    Raises
    ------
    OptionError, UnsupportedModelError
        An argument is unknown or wrong, or the model is of another family.
    """

    is_simple = False
    #: Folder of the family whose checkpoints it takes.
    family: ClassVar[str]

    def __init__(self, loaded: Loaded | None = None, **given: Any) -> None:
        super().__init__()
        self.arguments = parse_arguments(given)
        if loaded is None:
            loaded = Loaded.of(self.arguments)
        self._loaded: Loaded | None = loaded
        self._device = loaded.model.device
        self.engine = Engine(loaded.model, self.arguments.build_method())
        if self.engine.architecture.family != self.family:
            raise UnsupportedModelError(
                f"{self.arguments.pretrained} is a {self.engine.architecture.family} model; "
                f"--model must be flexselect_{self.engine.architecture.family}."
            )
        self.settings = self._settings()
        self.settings_name = digest(self.settings)
        self.answered: dict[str, Row] = {}

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self._device

    @property
    def batch_size(self) -> int:
        """Questions answered at a time."""
        return self.arguments.batch_size

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer requests; those answered before an interruption come from the journal.

        Raises
        ------
        FlexSelectError
            A request cannot be asked at all. A missing or damaged video is no such case: its
            answer is empty and its row says why.
        """
        if self.arguments.prompts == "published":
            self._give_prompts(requests)
        questions = read_requests(requests, self.task_dict)
        self._ask_again = {request.args[4]: request.args[1] for request in requests}
        asked = [question for question in questions if question is not None]
        self.answered = self._answer_shared(asked)
        self._report()
        rows = [None if q is None else self.answered[q.key(self.settings_name)] for q in questions]
        return [
            GenerationResult("")
            if row is None
            else GenerationResult(row["answer"], TokenCounts(output_tokens=row["tokens"]))
            for row in rows
        ]

    def loglikelihood(self, requests: list[Instance]) -> Any:
        """Refuse: the harness's chat interface asks for answers only."""
        raise OptionError(
            "loglikelihood is not offered: the harness's chat interface asks for answers only. "
            "Choose tasks with output_type generate_until."
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> Any:
        """Refuse: conversations of several rounds are not evaluated."""
        raise OptionError(
            "Tasks of several rounds are not supported. Choose tasks with output_type "
            "generate_until."
        )

    def clean(self) -> None:
        """Let go of the model; the harness calls this after the last answer."""
        self._loaded = None
        del self.engine
        super().clean()

    def _settings(self) -> Row:
        arguments = self.arguments
        selector = arguments.knobs.get("selector")
        looked_at = {"sampling": dict(arguments.sampling), "backend": arguments.backend}
        return {
            **self.engine.method.record(),
            **self.engine.record(),
            **looked_at,
            "preset_video": dict(self.engine.preset.video),
            "checkpoint": checkpoint_digest(arguments.pretrained),
            "selector_checkpoint": None if selector is None else checkpoint_digest(str(selector)),
            "system_prompt": arguments.system_prompt,
            "max_new_tokens": arguments.max_new_tokens,
            "batch_size": arguments.batch_size,
            "device": self._device.type,
            "code": code_digest(),
            "versions": versions(),
        }

    def _give_prompts(self, requests: Sequence[Instance]) -> None:
        """Give tasks their published prompts, where the harness has built others already."""
        for request in requests:
            _, to_messages, *_, doc_id, name, split = request.args
            task = getattr(to_messages, "__self__", None)
            if task is not None and prompt_settings(self.family, name):
                give_prompt(task, self.family)
                # What the harness logs as input is the text of the request.
                text = task.doc_to_text(self.task_dict[name][split][doc_id])
                request.arguments = (text, *request.args[1:])

    def _answer_shared(self, own: list[Question]) -> dict[str, Row]:
        """Answer questions together with the other processes; returns the rows by key.

        The harness deals rows without regard to videos. Here they are dealt anew, so that one
        process has all questions about a video.
        """
        if self.world_size == 1 or not dist.is_initialized():
            return self._answer_all(own)
        # Pictures stay with the process that has them.
        movable = [q for q in own if q.videos and not q.has_images]
        staying = [q for q in own if not q.videos or q.has_images]
        others: list[Any] = [None] * self.world_size
        dist.all_gather_object(others, movable)
        everyone = sorted(
            (question for part in others for question in part),
            key=lambda q: (q.task, q.doc_id, q.ordinal),
        )
        mine = deal(by_video(everyone), self.world_size)[self.rank]
        rows = self._answer_all([*mine, *staying])
        answered: list[Any] = [None] * self.world_size
        dist.all_gather_object(answered, rows)
        return {key: row for part in answered for key, row in part.items()}

    def _answer_all(self, questions: Sequence[Question]) -> dict[str, Row]:
        folder = self.arguments.run_folder
        journal = None if folder is None else Journal(Path(folder), self.rank)
        done = {} if journal is None else journal.read()
        if self.arguments.record_selection:
            # Answers given without a record of what stayed have to be given again.
            done = {
                key: row
                for key, row in done.items()
                if "selection" in row or not row["visual_tokens"]
            }
        ordered = [question for group in by_video(questions) for question in group]
        keys = [question.key(self.settings_name) for question in ordered]
        known = sum(key in done for key in keys)
        if known:
            logger.warning("%d of %d answers are there already.", known, len(keys))
        found: dict[str, Row] = {}
        with progress_bars(silent=self.rank != 0) as progress:
            # Batches are the same whatever was answered before, so that rounding is, too.
            for start, batch in _batches(ordered, self.batch_size):
                names = keys[start : start + len(batch)]
                if any(name not in done for name in names):
                    rows = self._answer_batch(batch)
                    rows = [
                        {"key": name, "settings": self.settings_name, **row}
                        for name, row in zip(names, rows, strict=True)
                    ]
                    if journal is not None:
                        journal.append(rows)
                    done.update({row["key"]: row for row in rows})
                found.update({name: done[name] for name in names})
                progress(self.settings["method"], start + len(batch), len(ordered))
        if journal is not None:
            journal.close()
        return found

    def _answer_batch(self, batch: Sequence[Question]) -> list[Row]:
        """Ask questions with the same options of generation in one batch."""
        rows: list[Row] = [self._row(question) for question in batch]
        asked: list[tuple[Row, Encoded]] = []
        for question, row in zip(batch, rows, strict=True):
            if question.error is not None:
                row["error"] = question.error
                continue
            try:
                videos = [self._open(path, row) for path in question.videos]
            except VideoError as error:
                row["error"] = str(error)
                logger.warning("%s %s: %s", question.task, question.doc_id, error)
                continue
            asked.append((row, self._encode(question, videos)))
        if not asked:
            return rows
        options = generation_options(batch[0].generation, self.arguments.max_new_tokens)
        if options["do_sample"]:
            # A question draws the same whatever was asked before it.
            torch.manual_seed(int(batch[0].key(self.settings_name)[:8], 16))
        engine, processor = self.engine, self._tools.processor
        stops = stop_texts(batch[0].generation)
        replies = answer(engine, processor, [prompt for _, prompt in asked], options, stops)
        for (row, _), reply in zip(asked, replies, strict=True):
            row.update(answer=reply.text, tokens=reply.tokens, cut=reply.cut)
            row["seconds"].update(reply.seconds)
            if (selection := reply.selection) is not None:
                row.update(visual_tokens=selection.num_visual, kept_tokens=len(selection.kept))
                if self.arguments.record_selection:
                    row["selection"] = {
                        "kept_per_frame": [
                            selection.kept_per_frame(i).tolist()
                            for i in range(len(selection.times))
                        ],
                        "moments": [asdict(moment) for moment in selection.moments()],
                    }
        return rows

    def _row(self, question: Question) -> Row:
        """Begin the record of a question, as it stays if nothing can be asked."""
        return {
            "task": question.task,
            "split": question.split,
            "doc_id": question.doc_id,
            "ordinal": question.ordinal,
            "videos": question.videos,
            "prompt": question.turns,
            "answer": "",
            "error": None,
            "tokens": 0,
            "cut": False,
            "pictures": 0,
            "pictures_lost": 0,
            "visual_tokens": 0,
            "kept_tokens": 0,
            "opened": 0,
            "seconds": {},
        }

    def _open(self, path: str, row: Row) -> Video:
        arguments = self.arguments
        video, fresh = self._tools.videos.get(
            path,
            self.engine,
            self._tools.processor,
            backend=arguments.backend,
            frames_per_chunk=arguments.frames_per_chunk,
            sampling=arguments.sampling,
        )
        row["opened"] += fresh
        row["pictures"] += video.record["pictures"]
        row["pictures_lost"] += video.record["pictures_lost"]
        for stage, spent in video.seconds.items():
            row["seconds"][stage] = row["seconds"].get(stage, 0.0) + spent
        return video

    def _encode(self, question: Question, videos: Sequence[Video]) -> Encoded:
        turns = question.turns
        if self.arguments.system_prompt is not None:
            content = [{"type": "text", "text": self.arguments.system_prompt}]
            turns = [{"role": "system", "content": content}, *turns]
        pictures = []
        if question.has_images:
            doc = self.task_dict[question.task][question.split][question.doc_id]
            pictures = pictures_of(self._ask_again[question.task], doc)
        return encode_prompt(self.engine, self._tools.processor, turns, videos, pictures)

    @property
    def _tools(self) -> Loaded:
        if self._loaded is None:
            raise FlexSelectError("The model was let go of by clean(); make the plug-in anew.")
        return self._loaded

    def _report(self) -> None:
        failed = [row for row in self.answered.values() if row["error"]]
        if failed and self.rank == 0:
            logger.warning(
                "%d of %d questions had no usable video; their answers are empty. First: %s",
                len(failed),
                len(self.answered),
                failed[0]["error"],
            )
        videos = self._tools.videos
        if videos.shared:
            logger.info(
                "%d openings of videos served %d more questions: %.0f s of decoding and encoding "
                "spared.",
                videos.opened,
                videos.shared,
                videos.spared,
            )


class InternVLModel(FlexSelectModel):
    """``--model flexselect_internvl``."""

    family = "internvl"


class LlavaVideoModel(FlexSelectModel):
    """``--model flexselect_llava_video``."""

    family = "llava_video"


class Qwen2_5_VLModel(FlexSelectModel):
    """``--model flexselect_qwen2_5_vl``."""

    family = "qwen2_5_vl"


class Qwen3VLModel(FlexSelectModel):
    """``--model flexselect_qwen3_vl``."""

    family = "qwen3_vl"


#: Class of each family.
CLASSES: dict[str, type[FlexSelectModel]] = {
    each.family: each for each in (InternVLModel, LlavaVideoModel, Qwen2_5_VLModel, Qwen3VLModel)
}


def _batches(questions: Sequence[Question], size: int) -> list[tuple[int, Sequence[Question]]]:
    """Cut questions into batches with the same options of generation: start and members."""
    batches: list[tuple[int, list[Question]]] = []
    for index, question in enumerate(questions):
        last = batches[-1][1] if batches else []
        if last and len(last) < size and last[0].generation == question.generation:
            last.append(question)
        else:
            batches.append((index, [question]))
    return [*batches]
