"""Reports of the questions that an evaluation got wrong: asked again, and shown.

Of a run of ``flexselect eval`` only its files are read: ``run.json``, and for each method the
journal ``answers-*.jsonl`` and ``samples.jsonl``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import OptionError, VideoError
from ..inference.apply import method_from
from ..inference.features import Progress
from ..inference.methods import METHODS, FlexSelect, Method
from ..inference.session import Video, open_video
from ..testbed.videos import read_sidecar, replace_file
from .needles import needle_tokens
from .page import page, section, text
from .report import write_report

_LITE = "flexselect-lite"


@dataclass(frozen=True)
class Wrong:
    """A question that a method of a run answered wrongly.

    Attributes
    ----------
    method : as the run calls it.
    task, doc_id : which question.
    video, question : the file, and what was asked of it.
    answer, expected : what was said, and what should have been.
    settings : what decided the answer, as the run recorded it.
    generation : options of ``generate`` that it was asked with.
    """

    method: str
    task: str
    doc_id: int
    video: str
    question: str
    answer: str
    expected: str
    settings: dict[str, Any]
    generation: dict[str, Any]


def wrong_answers(
    run: Path, methods: Sequence[str] = (), limit: int | None = None
) -> tuple[str, list[Wrong]]:
    """Read what a run got wrong.

    Parameters
    ----------
    run : folder of a run of ``flexselect eval``.
    methods : whose answers; default: all.
    limit : most questions a method.

    Returns
    -------
    The checkpoint, and the wrong answers, method by method. Questions without a usable video, or
    with anything but one video and one turn, are left out.

    Raises
    ------
    OptionError
        The folder is no run, or a method was not part of it.
    """
    try:
        record = json.loads((run / "run.json").read_text(encoding="utf-8"))
        checkpoint = record["decides"]["checkpoint"]
        known: dict[str, Any] = record.get("methods") or {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OptionError(
            f"{run} is no run of `flexselect eval`: it has no readable run.json ({error})."
        ) from error
    missing = sorted(set(methods) - set(known))
    if missing:
        raise OptionError(f"{run} has no answers of {', '.join(missing)}; it has {list(known)}.")
    found: list[Wrong] = []
    for method in methods or known:
        found += list(_of_method(run / method, method, known[method]))[:limit]
    return checkpoint, found


def report_wrong(
    model: Any,
    processor: Any,
    wrong: Sequence[Wrong],
    out: Path,
    *,
    progress: Progress | None = None,
) -> Path:
    """Ask every question again and write a report of each, and ``index.html`` that links them.

    Parameters
    ----------
    model, processor : of the run.
    wrong : see `wrong_answers`.
    out : folder to write to, made if missing; reports that are there already stay.
    progress : called with ("report", done, total).

    Returns
    -------
    The index.
    """
    rows = []
    for done, item in enumerate(wrong):
        if progress is not None:
            progress("report", done, len(wrong))
        name = f"{item.method}-{item.task}-{item.doc_id}.html"
        trouble = None
        if not (out / name).exists():
            try:
                _write(model, processor, item, out / name)
            except VideoError as error:
                trouble = str(error)
        rows.append(_row(item, name, trouble))
    if progress is not None:
        progress("report", len(wrong), len(wrong))
    head = "".join(f"<th>{name}</th>" for name in ("Question", "Method", "Answer", "Expected"))
    table = f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'
    note = "" if wrong else "There are none."
    body = (
        '<main><p class="kicker">FlexSelect evaluation</p><h1>What went wrong</h1>'
        + section(f"{len(wrong)} wrong answers", note, table if wrong else "")
        + "</main>"
    )
    replace_file(out / "index.html", page("What went wrong – FlexSelect", body).encode())
    return out / "index.html"


def _of_method(folder: Path, method: str, known: dict[str, Any]) -> Iterator[Wrong]:
    asked = {
        (row["task"], row["doc_id"]): row
        for path in sorted(folder.glob("answers-*.jsonl"))
        for row in _lines(path)
        if not row.get("ordinal")
    }
    for sample in _lines(folder / "samples.jsonl"):
        row = asked.get((sample["task"], sample["doc_id"]))
        if sample["score"] != 0 or sample["error"] or row is None:
            continue
        content = [part for turn in row["prompt"] for part in turn["content"]]
        words = [part["text"] for part in content if part["type"] == "text"]
        if len(row["prompt"]) != 1 or len(row["videos"]) != 1 or len(content) != len(words) + 1:
            continue
        yield Wrong(
            method=method,
            task=sample["task"],
            doc_id=sample["doc_id"],
            video=row["videos"][0],
            question="\n".join(words),
            answer=row["answer"],
            expected=sample["target"],
            settings=known["settings"],
            generation=(known.get("generation") or {}).get(sample["task"]) or {},
        )


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Read the whole lines of a file; a run that was killed may have cut its last."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def _write(model: Any, processor: Any, item: Wrong, path: Path) -> None:
    settings = item.settings
    video = open_video(
        model,
        processor,
        item.video,
        method=_method(item),
        backend=settings.get("backend") or "pyav",
        **(settings.get("sampling") or {}),
    )
    length = settings.get("max_new_tokens") or item.generation.get("max_new_tokens") or 64
    answer = video.ask(item.question, max_new_tokens=length)
    note = None
    if answer.text != item.answer:
        note = (
            f"In the run it said: {item.answer}. Since then the weights, the code or the machine "
            "has changed."
        )
    write_report(
        path,
        video,
        item.question,
        answer,
        expected=item.expected,
        right=answer.text.strip() == item.expected.strip(),
        needle=_needle(video, item),
        note=note,
    )


def _method(item: Wrong) -> Method:
    """Build the method as the run had it."""
    kind = FlexSelect if item.method == _LITE else METHODS.get(item.settings["method"])
    if kind is None:
        raise OptionError(f"The run's method {item.method!r} is unknown to this version.")
    names = {field.name for field in dataclasses.fields(kind)}
    knobs = {
        name: value for name, value in item.settings.items() if name in names and value is not None
    }
    return method_from(kind, knobs)


def _needle(video: Video, item: Wrong) -> Any:
    """Mark where the answer is, for a needle video whose sidecar knows the question."""
    try:
        told = read_sidecar(Path(item.video))
    except VideoError:
        return None
    for known in told.questions:
        if known.text.strip() == item.question.strip():
            return needle_tokens(video, known)
    return None


def _row(item: Wrong, name: str, trouble: str | None) -> str:
    question = (
        f"{text(item.question)} ({text(trouble)})"
        if trouble is not None
        else f'<a href="{text(name)}">{text(item.question)}</a>'
    )
    cells = "".join(f"<td>{text(v)}</td>" for v in (item.method, item.answer, item.expected))
    return f"<tr><td>{question}</td>{cells}</tr>"
