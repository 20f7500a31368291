r"""Measure selection on the testbed: ``python -m flexselect.scripts.testbed_study``.

    python -m flexselect.scripts.testbed_study --part knobs --family internvl
    python -m flexselect.scripts.testbed_study --part table
    python -m flexselect.scripts.testbed_study --part table --family internvl --model seed-1
    python -m flexselect.scripts.testbed_study --report docs/testbed.md

*knobs* looks at layers and knobs on validation videos, by which the presets of the tiny models are
judged; *table* measures methods and lengths on test videos with those presets. Videos are
rendered as files and go through ``open_video``, methods and presets like anybody's; a video is
encoded once and asked several questions by every method. Results gather in one JSON file, cell by
cell and video by video: stopped, the same command goes on where it was, and families may be
measured side by side. What was counted of another checkpoint or selector is void and leaves the
file; a cell whose preset changed is counted anew. ``--report`` writes the results as Markdown.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

import flexselect
from flexselect.core.errors import CheckpointError, FlexSelectError
from flexselect.core.metrics import recall_at_k
from flexselect.core.selection import Moment
from flexselect.inference.engine import Engine
from flexselect.inference.methods import FlexSelect, Full
from flexselect.scripts.testbed_cells import (
    LENGTHS,
    Cell,
    Clips,
    knob_cells,
    layer_cells,
    table_cells,
)
from flexselect.scripts.testbed_tables import write_report
from flexselect.testbed.check import answer as plain_answer
from flexselect.testbed.locate import FAMILIES, checkpoint_folder, selector_folder
from flexselect.testbed.models import family_of
from flexselect.testbed.videos import (
    FPS,
    NeedleSpot,
    NeedleVideo,
    VideoQuestion,
    held,
    make_needle_video,
    replace_file,
)
from flexselect.visualization.needles import needle_tokens

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
#: Tokens an answer may have: the word and its end.
MAX_NEW_TOKENS = 3
#: To be raised when something is counted differently: what was counted before is void then.
COUNTING = 2


@dataclass
class Tally:
    """What has been counted of a cell so far; ``hits`` is a 1 or a 0 a question, in order."""

    knobs: dict[str, Any] = field(default_factory=dict)
    videos: int = 0
    asked: int = 0
    right: int = 0
    hits: str = ""
    by_task: dict[str, list[int]] = field(default_factory=dict)
    visual: int = 0
    kept: int = 0
    recall: float = 0.0
    kept_needle: float = 0.0
    first_moment: int = 0
    five_moments: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


class Study:
    """Runs cells of one checkpoint and keeps their tallies in a JSON file.

    There the project's own checkpoint goes by its family's name, another one by its training seed
    as well. Of others only retrieval is measured, without Lite: a selector belongs to the
    project's own.
    """

    def __init__(self, family: str, folder: Path, results: Path, videos: Path) -> None:
        self.family = family_of(family)
        self.own = folder.resolve() == checkpoint_folder(family).resolve()
        self.name = family if self.own else f"{family}, seed {_training_seed(folder, family)}"
        self.model = flexselect.load_model(folder, device="cpu")
        self.processor = flexselect.load_processor(folder)
        self.engine = Engine(self.model, Full())
        self.results, self.videos = results, videos
        self.checksum = _checksum(folder)
        self.selector = None
        try:
            if self.own:
                self.selector = flexselect.load_selector(selector_folder(family), self.model)
        except CheckpointError as error:
            logger.warning("Lite cells are left out: %s", error)
        current = {"checkpoint": self.checksum, "counting": COUNTING}
        if self.selector is not None:
            # Where it lies is this machine's business; which one it is decides.
            current["selector"] = _checksum(selector_folder(family))
        self._current = current
        found = read_results(results).get(self.name, {})
        #: What can be gone on with; what was counted of anything else is void.
        self.tallies = {
            key: Tally(**row) for key, row in found.items() if self._is_current(row["knobs"])
        }
        self._void = {key: row for key, row in found.items() if key not in self.tallies}

    @property
    def tokens_per_frame(self) -> int:
        """Visual tokens a picture of the video costs."""
        _, ranked = self.family.frame_slots()
        return sum(ranked) // self.family.pictures_per_frame

    @property
    def preset(self) -> Mapping[str, Any]:
        """Knobs of the model's preset."""
        return self.engine.preset.method

    def run(self, cells: Sequence[Cell], title: str) -> None:
        """Fill the cells; those that share their videos share decoding and encoding."""
        groups: dict[Clips, list[Cell]] = {}
        for cell in cells:
            measured = self.own or cell.clips.retrieval
            if measured and (not cell.lite or self.selector is not None):
                groups.setdefault(cell.clips, []).append(cell)
        for clips, members in groups.items():
            engines = {cell: self._engine(cell) for cell in members}
            for cell in members:
                knobs = self._knobs(cell, engines[cell])
                if self.tallies.get(cell.key, Tally()).knobs != knobs:
                    self.tallies[cell.key] = Tally(knobs=knobs)
            waiting = [c for c in members if self.tallies[c.key].videos < c.count]
            if waiting:
                self._run_clips(clips, {cell: engines[cell] for cell in waiting}, title)

    def _knobs(self, cell: Cell, engine: Engine) -> dict[str, Any]:
        """Return what decides a cell's count, beside its name: only the same is gone on with."""
        knobs = {**engine.method.record(), **self._current}
        knobs |= {"tasks": list(cell.clips.tasks), "first": cell.clips.first}
        if not cell.lite:
            knobs["selector"] = None
        return knobs

    def _is_current(self, knobs: Mapping[str, Any]) -> bool:
        """Whether a row, of whatever cell, is of these weights and counted as is done now."""
        return knobs.get("selector") in (None, self._current.get("selector")) and all(
            knobs.get(name) == self._current[name] for name in ("checkpoint", "counting")
        )

    def _engine(self, cell: Cell) -> Engine:
        method = replace(cell.method, selector=self.selector) if cell.lite else cell.method  # type: ignore[call-arg]
        return Engine(self.model, method)

    def _run_clips(self, clips: Clips, engines: dict[Cell, Engine], title: str) -> None:
        start = min(self.tallies[cell.key].videos for cell in engines)
        stop = max(cell.count for cell in engines)
        label = f"{self.name} {title} {clips.key}"
        for done in _progress(range(start, stop), label):
            shown, following = (self._video(clips, clips.first + done + i) for i in (0, 1))
            lite = any(cell.lite for cell in engines)
            opened = flexselect.open_video(
                self.model,
                self.processor,
                shown.path,
                method=FlexSelect(selector=self.selector) if lite else Full(),
                frames=clips.frames,
            )
            for cell, engine in engines.items():
                tally = self.tallies[cell.key]
                if not tally.videos <= done < cell.count:
                    continue
                source = following if cell.control == "shuffled" else shown
                for question in source.questions:
                    self._ask(replace(opened, engine=engine), cell, question, tally)
                tally.videos = done + 1
            self._save(engines)

    def _video(self, clips: Clips, index: int) -> NeedleVideo:
        return make_needle_video(
            self.videos / clips.key / f"{index:05d}.mp4",
            split=clips.split,
            index=index,
            frames=clips.frames,
            tasks=clips.tasks,
        )

    def _ask(self, video: Any, cell: Cell, question: VideoQuestion, tally: Tally) -> None:
        tally.asked += 1
        if cell.control == "blind":
            text = plain_answer(self.family, self.model, None, question.text)
            _count(tally, question, text == question.answer)
            return
        if cell.ranks_only:
            content = [{"type": "video"}, {"type": "text", "text": question.text}]
            encoded = video.encoded([{"role": "user", "content": content}], 0)
            selection = video.engine.select(encoded)
        else:
            answer = video.ask(question.text, max_new_tokens=MAX_NEW_TOKENS)
            selection = answer.selection
            _count(tally, question, answer.text == question.answer)
            for stage, seconds in answer.seconds.items():
                tally.seconds[stage] = tally.seconds.get(stage, 0.0) + seconds
        tally.visual += selection.num_visual
        tally.kept += len(selection.kept)
        if cell.control is not None:
            return
        needle = needle_tokens(video, question)
        tally.kept_needle += float(needle[selection.kept].sum() / needle.sum())
        if selection.scores is not None:
            tally.recall += recall_at_k(selection.scores, needle, len(selection.kept))
            hits = [_shows(moment, question.needles[0]) for moment in selection.moments(5)]
            tally.first_moment += bool(hits[:1] and hits[0])
            tally.five_moments += any(hits)

    def _save(self, cells: Iterable[Cell]) -> None:
        """Put the tallies of ``cells`` into the file, beside those of other processes."""
        with held(self.results.parent):
            everything = read_results(self.results)
            mine = everything.setdefault(self.name, {})
            for key, row in self._void.items():
                # Another process may have counted it anew meanwhile.
                if mine.get(key) == row:
                    del mine[key]
            mine |= {cell.key: vars(self.tallies[cell.key]) for cell in cells}
            write_json(self.results, everything)


def _count(tally: Tally, question: VideoQuestion, right: bool) -> None:
    tally.right += right
    tally.hits += "01"[right]
    task = tally.by_task.setdefault(question.task, [0, 0])
    task[0] += right
    task[1] += 1


def _shows(moment: Moment, needle: NeedleSpot) -> bool:
    """Whether any of the needle's pictures is on screen within a moment."""
    first, last = needle.frames[0] / FPS, (needle.frames[-1] + 1) / FPS
    return moment.start < last and first < moment.end


def _training_seed(folder: Path, family: str) -> int:
    """Return the seed that a checkpoint was trained with, as its ``training.json`` says."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder. --model takes that of a checkpoint.")
    path = folder / "training.json"
    try:
        record = json.loads(path.read_text())
        trained, seed, student = record["family"], int(record["seed"]), record["student"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} does not say what seed the checkpoint was trained with. Name a folder that "
            "python -m flexselect.testbed.train has written."
        ) from error
    if trained != family:
        raise CheckpointError(f"{folder} holds a {trained}. Say --family {trained}.")
    if student:
        raise CheckpointError(f"{folder} holds a student, not a checkpoint to select for.")
    return seed


def _checksum(folder: Path) -> str:
    """Name the weights of a checkpoint."""
    return f"{zlib.crc32((folder / 'model.safetensors').read_bytes()):08x}"


def read_results(path: Path) -> dict[str, Any]:
    """Read the tallies of every checkpoint, none where there is no file yet."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
        return {
            name: {key: vars(Tally(**row)) for key, row in cells.items()}
            for name, cells in found.items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} does not hold results of this study ({error}). Restore it, move it away, or "
            "name another file with --results."
        ) from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    replace_file(path, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.part is None and options.report is None:
        parser.error("nothing to do: give --part to measure, --report to write, or both")
    if options.part != "knobs" and options.count is not None:
        parser.error("--count is for --part knobs; the table's cells have a size of their own")
    if options.part != "table" and options.frames is not None:
        parser.error("--frames is for --part table; knobs are looked at on 512 frames")
    if options.part is None and options.model is not None:
        parser.error("--model is what --part measures; --report writes what was measured")
    if options.model is not None and len(options.family) > 1:
        parser.error("--model is one checkpoint: name its --family")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    torch.set_num_threads(options.threads)
    try:
        for family in options.family if options.part else []:
            folder = options.model or checkpoint_folder(family)
            study = Study(family, folder, options.results, options.videos)
            layers = study.engine.architecture.num_layers
            count = options.count or 35
            if options.part == "knobs":
                study.run(layer_cells(layers, "validation", count), "layers")
                study.run(knob_cells(study.preset, count), "knobs")
            else:
                cells = table_cells(study.preset, study.tokens_per_frame)
                cells += layer_cells(layers, "test", count)
                lengths = options.frames or (16, *LENGTHS)
                study.run([c for c in cells if c.clips.frames in lengths], "table")
        if options.report:
            write_report(read_results(options.results), options.report)
    except (FlexSelectError, OSError) as error:
        logger.error("error: %s", error)
        return 2
    return 0


def _progress(indices: range, label: str) -> Iterator[int]:
    yield from track(indices, description=label, console=Console(stderr=True))


def _some(text: str) -> int:
    """Read a whole number of at least one."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flexselect.scripts.testbed_study",
        description="Measure selection on needle videos with the tiny models.",
    )
    parser.add_argument("--part", choices=("knobs", "table"), help="what to measure")
    parser.add_argument(
        "--family",
        nargs="+",
        choices=FAMILIES,
        default=list(FAMILIES),
        help="whose checkpoints to measure (default: all)",
    )
    parser.add_argument(
        "--model",
        type=Path,
        help="a checkpoint of another seed, listed by it: retrieval only, without Lite",
    )
    parser.add_argument(
        "--frames",
        type=int,
        nargs="+",
        choices=(16, *LENGTHS),
        help="lengths of --part table to measure now (default: all)",
    )
    parser.add_argument(
        "--count", type=_some, help="validation videos a cell of --part knobs (default: 35)"
    )
    parser.add_argument("--threads", type=_some, default=1, help="CPU threads")
    parser.add_argument(
        "--results",
        type=Path,
        default=ROOT / "docs" / "testbed.json",
        help="JSON file that the counts gather in (default: docs/testbed.json of the project)",
    )
    parser.add_argument(
        "--videos",
        type=Path,
        default=Path("outputs") / "testbed-videos",
        help="folder of the videos, made where missing (default: outputs/testbed-videos)",
    )
    parser.add_argument("--report", type=Path, help="Markdown file to write the tables to")
    return parser


if __name__ == "__main__":
    sys.exit(main())
