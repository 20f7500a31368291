"""Training data: questions about video files, read from whatever form they were published in.

========================  =====================================================================
a folder                  needle videos of ``flexselect.testbed.make``: every video with its sidecar
``*.yaml``                parts of a data set, as LLaVA-NeXT lists them: ``datasets`` with a
                          ``json_path`` and a ``sampling_strategy`` each
``*.json``                a list of conversations; or parts by name with ``root`` and
                          ``annotation``, as InternVL lists them
``*.jsonl``               one conversation a line
========================  =====================================================================

A conversation has a ``video`` and ``conversations``; every human turn of it is a question.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..core.errors import OptionError, VideoError
from ..testbed.videos import read_sidecar

logger = logging.getLogger(__name__)

#: Marks the place of the video in a human turn; the prompt of the model has its own.
_PLACEHOLDER = re.compile(r"\s*<(?:image|video)>\s*")

_STRATEGIES = ("all", "first", "end", "random")


@dataclass(frozen=True)
class Example:
    """One question about one video.

    Attributes
    ----------
    id : unique in its data set, and the same wherever and in whatever form the data set lies: the
        conversation's own id and a digest of video and question.
    video : the file, which may be missing or damaged.
    question : what is asked, without any placeholder of the video.
    """

    id: str
    video: Path
    question: str


def read_examples(
    source: str | Path,
    videos: str | Path | None = None,
    *,
    limit: int | None = None,
    seed: int = 0,
) -> list[Example]:
    """Read the examples of a data set, in its order.

    Conversations about images or without a picture are left out, and so are turns that ask
    nothing; how many is logged. No video is looked at.

    Parameters
    ----------
    source : a folder of needle videos, or a .yaml, .json or .jsonl file.
    videos : folder that the videos' names are relative to; default: the folder of the file that
        names them. Names may also be relative to a folder in it that is called like the
        conversation's ``data_source``, which is how LLaVA-Video-178K unpacks.
    limit : only this many examples, from the start.
    seed : decides what ``random`` of a yaml's ``sampling_strategy`` draws.

    Raises
    ------
    OptionError
        The source is missing, of an unknown kind or malformed (the message names file and entry),
        or it holds no question about a video.
    """
    source = Path(source)
    if limit is not None and (isinstance(limit, bool) or limit < 1):
        raise OptionError(f"limit must be a whole number of at least 1, got {limit!r}.")
    root = None if videos is None else Path(videos)
    if root is not None and not root.is_dir():
        raise OptionError(f"{root} is no folder; name the one that the videos lie in.")
    if source.is_dir():
        turns = _sidecars(source)
    elif source.is_file():
        turns = _turns(_entries(source, root, seed))
    else:
        raise OptionError(
            f"There is no data at {source}. Name a folder of needle videos, or a .yaml, .json or "
            ".jsonl file of conversations."
        )
    examples = _named(turns, limit)
    if not examples:
        raise OptionError(
            f"{source} holds no question about a video. Entries need 'video' and 'conversations' "
            "with a turn from 'human'; a folder needs videos of flexselect.testbed.make."
        )
    return examples


def hold_out(
    examples: Sequence[Example], count: int, seed: int = 0
) -> tuple[list[Example], list[Example]]:
    """Set examples aside for evaluation, with no video on both sides.

    Parameters
    ----------
    examples : of which.
    count : least number to set aside; whole videos are, so there may be a few more.
    seed : decides which videos.

    Returns
    -------
    Those to train on and those set aside, each in the given order.

    Raises
    ------
    OptionError
        Nothing would be left to train on.
    """
    if count < 0:
        raise OptionError(f"The examples to set aside must be at least 0, got {count}.")
    films = list(dict.fromkeys(example.video for example in examples))
    random.Random(f"hold out {seed}").shuffle(films)
    questions = Counter(example.video for example in examples)
    aside: set[Path] = set()
    taken = 0
    for film in films:
        if taken >= count:
            break
        aside.add(film)
        taken += questions[film]
    kept = [example for example in examples if example.video not in aside]
    if not kept:
        raise OptionError(
            f"To set {count} examples aside leaves none of {len(examples)} (about {len(films)} "
            "videos) to train on. Set fewer aside, or take more data."
        )
    return kept, [example for example in examples if example.video in aside]


@dataclass(frozen=True)
class _Entry:
    """One conversation and where it stands. ``root`` is None for the folder of its file."""

    where: str
    folder: Path
    content: Mapping[str, Any]
    part: str = ""


@dataclass(frozen=True)
class _Turn:
    """One question, before it has its id: the key is what the id is made of."""

    name: str
    key: tuple[str, ...]
    video: Path
    question: str


def _named(turns: Iterable[_Turn], limit: int | None) -> list[Example]:
    """Give every turn its id. Turns with one key are one question asked twice: they are counted."""
    seen: Counter[str] = Counter()
    examples: list[Example] = []
    for turn in turns:
        if limit is not None and len(examples) == limit:
            break
        digest = hashlib.sha256("\0".join(turn.key).encode()).hexdigest()[:12]
        name = f"{turn.name}-{digest}"
        seen[name] += 1
        again = f"-{seen[name]}" if seen[name] > 1 else ""
        examples.append(Example(name + again, turn.video, turn.question))
    return examples


def _sidecars(folder: Path) -> Iterator[_Turn]:
    """Yield the questions of a folder of needle videos, by name."""
    for path in sorted(folder.glob("*.mp4")):
        try:
            video = read_sidecar(path)
        except VideoError as error:
            raise OptionError(f"{folder} is no folder of needle videos: {error}") from error
        for number, question in enumerate(video.questions):
            name = f"{path.stem}-{number}"
            yield _Turn(name, (path.name, question.text), video.path, question.text)


def _turns(entries: Iterable[_Entry]) -> Iterator[_Turn]:
    """Yield the human turns of conversations about videos, and log what is left out."""
    without_video = without_question = 0
    prefixed: dict[tuple[Path, str], bool] = {}
    for entry in entries:
        video = _video(entry)
        if video is None:
            without_video += 1
            continue
        path = entry.folder / video
        origin = entry.content.get("data_source")
        if isinstance(origin, str) and not Path(video).is_absolute():
            key = (entry.folder, origin)
            if key not in prefixed:
                prefixed[key] = bool(origin) and (entry.folder / origin).is_dir()
            if prefixed[key] and Path(video).parts[:1] != (origin,):
                path = entry.folder / origin / video
        name = str(entry.content.get("id", Path(video).stem))
        for question in _questions(entry):
            if not question:
                without_question += 1
                continue
            yield _Turn(name, (entry.part, name, video, question), path, question)
    if without_video:
        logger.warning("%d conversations show no video and are left out.", without_video)
    if without_question:
        logger.warning("%d human turns ask nothing and are left out.", without_question)


def _video(entry: _Entry) -> str | None:
    """Return the name of an entry's video, None where it has none."""
    value = entry.content.get("video")
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None or value == [] or value == "":
        return None
    if not isinstance(value, str):
        raise OptionError(f"{entry.where}: 'video' must name one file, got {value!r}.")
    return value


def _questions(entry: _Entry) -> Iterator[str]:
    """Yield what the human says in a conversation, without placeholders."""
    turns = entry.content.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise OptionError(f"{entry.where}: 'conversations' must be a list of turns.")
    asked = False
    for number, turn in enumerate(turns):
        told = isinstance(turn, Mapping) and all(
            isinstance(turn.get(k), str) for k in ("from", "value")
        )
        if not told:
            raise OptionError(
                f"{entry.where}: turn {number} must have the texts 'from' and 'value', "
                f"got {_brief(turn)}."
            )
        if turn["from"] == "human":
            asked = True
            yield _PLACEHOLDER.sub(" ", turn["value"]).strip()
    if not asked:
        speakers = sorted({turn["from"] for turn in turns})
        raise OptionError(f"{entry.where}: no turn is from 'human', only from {speakers}.")


def _entries(source: Path, root: Path | None, seed: int) -> Iterator[_Entry]:
    """Yield the conversations of a file of any form."""
    if source.suffix in (".yaml", ".yml"):
        yield from _parts_of_yaml(source, root, seed)
        return
    content = _load(source)
    if isinstance(content, Mapping):
        yield from _parts_by_name(source, content, root)
    else:
        yield from _conversations(source, content, root)


def _parts_of_yaml(source: Path, root: Path | None, seed: int) -> Iterator[_Entry]:
    try:
        content = yaml.safe_load(source.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise OptionError(f"{source} is no YAML: {' '.join(str(error).split())}") from error
    parts = content.get("datasets") if isinstance(content, Mapping) else None
    if not isinstance(parts, list) or not parts:
        raise OptionError(f"{source}: 'datasets' must be a list of parts with 'json_path'.")
    for number, part in enumerate(parts):
        where = f"{source}, part {number}"
        if not isinstance(part, Mapping) or not isinstance(part.get("json_path"), str):
            raise OptionError(f"{where}: 'json_path' must name a file, got {_brief(part)}.")
        path = source.parent / part["json_path"]
        if not path.is_file():
            raise OptionError(f"{where}: there is no file {path}.")
        entries = list(_conversations(path, _load(path), root))
        strategy = part.get("sampling_strategy", "all")
        yield from _sampled(entries, strategy, where, f"{seed} {number}")


def _parts_by_name(source: Path, parts: Mapping[str, Any], root: Path | None) -> Iterator[_Entry]:
    for name, part in parts.items():
        where = f"{source}, part {name!r}"
        if not isinstance(part, Mapping) or not isinstance(part.get("annotation"), str):
            raise OptionError(
                f"{where}: 'annotation' must name a .jsonl file, got {_brief(part)}. A file of "
                "conversations is a list of them."
            )
        path = source.parent / part["annotation"]
        if not path.is_file():
            raise OptionError(f"{where}: there is no file {path}.")
        folder = part.get("root")
        if folder is not None and not isinstance(folder, str):
            raise OptionError(f"{where}: 'root' must name a folder, got {folder!r}.")
        times = part.get("repeat_time", 1)
        if isinstance(times, bool) or not isinstance(times, (int, float)) or times <= 0:
            raise OptionError(f"{where}: 'repeat_time' must be a number above 0, got {times!r}.")
        own = root
        if own is None and folder is not None:
            own = source.parent / folder
        # The same name below two roots is two videos, so the part belongs to the id.
        several = name if len(parts) > 1 else ""
        entries = [
            _Entry(entry.where, entry.folder, entry.content, several)
            for entry in _conversations(path, _load(path), own)
        ]
        whole, rest = int(times), times - int(times)
        for _ in range(whole):
            yield from entries
        yield from entries[: int(len(entries) * rest)]


def _sampled(entries: list[_Entry], strategy: object, where: str, seed: str) -> list[_Entry]:
    """Apply a ``sampling_strategy``: all, or first, end or random with a number or a percentage."""
    what, _, amount = str(strategy).partition(":")
    found = re.fullmatch(r"(\d+(?:\.\d+)?)%|(\d+)", amount)
    if what not in _STRATEGIES or (found is None) != (what == "all") or (amount and what == "all"):
        raise OptionError(
            f"{where}: 'sampling_strategy' must be 'all', or 'first', 'end' or 'random' with a "
            f"number or percentage such as 'first:10%', got {strategy!r}."
        )
    if found is None:
        return entries
    share, number = found.groups()
    count = int(number) if number else math.ceil(float(share) * len(entries) / 100)
    count = min(count, len(entries))
    if what == "random":
        drawn = random.Random(f"sample {seed}").sample(range(len(entries)), count)
        return [entries[index] for index in sorted(drawn)]
    return entries[:count] if what == "first" else entries[len(entries) - count :]


def _conversations(path: Path, content: Any, root: Path | None) -> Iterator[_Entry]:
    """Yield the entries of a loaded list of conversations."""
    if not isinstance(content, list):
        raise OptionError(f"{path} must hold a list of conversations, got {_brief(content)}.")
    for number, entry in enumerate(content):
        where = f"{path}, entry {number}"
        if not isinstance(entry, Mapping):
            raise OptionError(f"{where}: must be an object with 'video', got {_brief(entry)}.")
        if "id" in entry:
            where += f" (id {entry['id']!r})"
        yield _Entry(where, path.parent if root is None else root, entry)


def _load(path: Path) -> Any:
    """Read a .json or .jsonl file."""
    if path.suffix not in (".json", ".jsonl"):
        raise OptionError(f"{path} must be a .yaml, .json or .jsonl file of conversations.")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            return json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise OptionError(f"{path} is no JSON: {error}.") from error
    rows = []
    # Not splitlines: it also cuts at characters that JSON allows inside a text.
    for number, line in enumerate(text.split("\n")):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise OptionError(f"{path}, line {number + 1} is no JSON: {error}.") from error
    return rows


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
