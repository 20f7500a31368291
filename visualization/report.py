"""The report: one HTML file that shows what an answer was read from.

Question, answer, the moments with their pictures and what was kept of them, relevance over time,
tokens and time by stage, and everything that decided the result. It loads nothing but, where a
reader asks for a moment, the video file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor

from ..core.layout import Grid
from ..core.selection import Moment, Selection
from ..inference.session import Answer, Video
from ..inference.terminal import stamp
from ..testbed.videos import replace_file
from .overlays import box_overlay, heat_overlay, kept_overlay
from .page import facts, page, record_table, section, text
from .stills import TINY, Still, on_grid, read_stills
from .timeline import Pin, timeline

#: Frames shown besides those of the moments.
_FRAMES = 24

_STAGES = {
    "load": "load the model",
    "decode": "decode the video",
    "encode": "encode its frames (vision tower)",
    "rank": "rank the visual tokens",
    "gather": "gather what stays",
    "prefill": "read the prompt (to the first token)",
    "answer": "write the answer",
}


def write_report(
    path: str | Path,
    video: Video,
    question: str,
    answer: Answer,
    *,
    moments: int = 6,
    expected: str | None = None,
    right: bool | None = None,
    needle: Tensor | None = None,
    note: str | None = None,
) -> Path:
    """Write a report of one answer.

    Parameters
    ----------
    path : the HTML file to write, whole or not at all; its folder is made if missing.
    video, question, answer : the opened video, what was asked of it, and what `Video.ask` gave.
    moments : most moments to show.
    expected : the right answer, where it is known.
    right : whether ``answer`` is it, as an evaluation judged.
    needle : bool ``(visual,)``, the visual tokens that show the answer, where they are known; see
        `visualization.needles.needle_tokens`.
    note : a remark under the answer.

    Returns
    -------
    ``path``.

    Raises
    ------
    VideoError
        The video file is no longer there: its pictures are read from it.
    """
    path = Path(path)
    sheet = _Sheet(video, answer.selection, moments, needle)
    selection = answer.selection
    parts = [
        '<main><p class="kicker">FlexSelect report</p>',
        f"<h1>{text(question)}</h1>",
        _answer(answer, expected, right, note),
        facts(_facts(video, answer)),
        _where(sheet, _film(path, video, sheet)),
        _moments(sheet),
        _frames(sheet),
        _needle(sheet),
        _cost(video, answer),
        section(
            "What decided it",
            "",
            "<details><summary>The run record</summary>"
            + record_table(_record(selection.settings))
            + "</details>",
        ),
        "</main>",
        "<footer><p>Made by flexselect "
        f"{text(selection.settings.get('flexselect', ''))}. Everything is in this file; nothing "
        "is loaded from the network.</p></footer>",
    ]
    replace_file(path, page(f"{question} – FlexSelect", "\n".join(parts), script=True).encode())
    return path


class _Sheet:
    """What the sections share: the selection on the grid of pictures, and the pictures."""

    def __init__(
        self, video: Video, selection: Selection, limit: int, needle: Tensor | None
    ) -> None:
        self.video = video
        self.selection = selection
        self.grid: Grid = video.engine.architecture.grid(video.clip)
        frames = video.clip.frames
        stays = torch.zeros(selection.num_visual, dtype=torch.bool)
        stays[selection.kept] = True
        self.kept = on_grid(stays, self.grid, frames).numpy()
        self.per_frame = stays.view(frames, -1).sum(1)
        self.heat = None
        self.relevance: list[float] | None = None
        if selection.scores is not None:
            heat = on_grid(selection.scores.double(), self.grid, frames)
            # What is on no picture may score highest; the best visible cell is full colour.
            self.heat = (heat / heat.max().clamp(min=1e-30)).numpy()
            self.relevance = selection.frame_scores().tolist()
        ranks = selection.moment_scores()
        self.ranks = None if ranks is None else ranks.tolist()
        self.moments = selection.moments(limit)
        self.peaks = [self._peak(moment) for moment in self.moments]
        self.needle = None if needle is None else on_grid(needle, self.grid, frames).numpy()
        self.needle_tokens = needle
        self.needle_frames: list[int] = []
        if self.needle is not None:
            self.needle_frames = [i for i in range(frames) if self.needle[i].any()]
        self.others = self._others()
        wanted = [*self.peaks, *self.others, *self.needle_frames[:_FRAMES]]
        self.stills = read_stills(video, wanted)

    @property
    def tokens(self) -> int:
        """Visual tokens of a frame."""
        return len(self.grid.cells)

    @property
    def end(self) -> float:
        """When the video ends, in seconds."""
        return float(self.video.record["duration"])

    def _peak(self, moment: Moment) -> int:
        assert self.ranks is not None
        frames = range(moment.first_frame, moment.last_frame + 1)
        return max(frames, key=self.ranks.__getitem__)

    def _others(self) -> list[int]:
        """Frames that are also worth a look: the most relevant, or some of them, in order."""
        kept = self.per_frame.tolist()
        read = [i for i, count in enumerate(kept) if count and i not in self.peaks]
        if self.ranks is None:
            step = max(1, -(-len(read) // _FRAMES))
            return read[::step]
        return sorted(sorted(read, key=self.ranks.__getitem__, reverse=True)[:_FRAMES])

    def figure(self, frame: int, caption: str) -> str:
        """Show a frame with its overlays over HTML of a caption."""
        still = self.stills.get(frame)
        if still is None:
            return f"<figure><figcaption>{caption}</figcaption></figure>"
        overlays = kept_overlay(self.kept[frame])
        if self.heat is not None:
            overlays += heat_overlay(self.heat[frame])
        if self.needle is not None and self.needle[frame].any():
            overlays += box_overlay(self.needle[frame])
        count = int(self.per_frame[frame])
        alt = f"The video at {stamp(still.seconds)}; {count} of {self.tokens} visual tokens kept"
        return (
            f'<figure><div class="frame{_tiny(still)}"><img src="{still.data_uri()}" '
            f'width="{still.size[0]}" height="{still.size[1]}" alt="{text(alt)}">{overlays}</div>'
            f"<figcaption>{caption}</figcaption></figure>"
        )


def _answer(answer: Answer, expected: str | None, right: bool | None, note: str | None) -> str:
    kind = "" if right is None else " right" if right else " wrong"
    parts = [f'<div class="answer{kind}"><div class="kicker">Answer</div>']
    parts.append(f"<p>{text(answer.text or '(the model said nothing)')}</p>")
    if right is not None or expected is not None:
        verdict = "" if right is None else "Right. " if right else "Wrong. "
        wanted = "" if expected is None or right else f"Expected: {expected}"
        parts.append(f'<p class="verdict">{text(verdict + wanted)}</p>')
    if answer.cut:
        parts.append('<p class="kicker">Cut at the most tokens an answer was allowed.</p>')
    if note:
        parts.append(f'<p class="kicker">{text(note)}</p>')
    return "".join(parts) + "</div>"


def _facts(video: Video, answer: Answer) -> list[tuple[str, str, str]]:
    selection, settings = answer.selection, answer.selection.settings
    kept, before = len(selection.kept), selection.num_visual
    read = int((selection.kept_per_frame() > 0).sum())
    seconds = {**video.seconds, **answer.seconds}
    first = sum(spent for stage, spent in answer.seconds.items() if stage != "answer")
    layer = settings.get("layer")
    how = "" if layer is None else f"layer {layer}, {settings.get('aggregation')}"
    return [
        ("Visual tokens read", f"{kept:,}", f"of {before:,} ({_share(kept, before)})"),
        (
            "Frames read",
            f"{read:,}",
            f"of {video.clip.frames:,} over {stamp(float(video.record['duration']))}",
        ),
        (
            "Time",
            f"{sum(seconds.values()):.2f} s",
            f"{first:.2f} s from question to first token",
        ),
        ("Method", str(settings.get("method", "")), how or f"preset {settings.get('preset')}"),
    ]


def _film(path: Path, video: Video, sheet: _Sheet) -> str:
    """Embed the video by its name beside the report, and by its place now."""
    file = Path(str(video.record["video"]))
    places = [_relative(file, path), file.name]
    sources = "".join(f'<source src="{text(quote(place))}">' for place in dict.fromkeys(places))
    poster = ""
    shown = next((f for f in (*sheet.peaks, *sheet.others) if f in sheet.stills), None)
    if shown is not None:
        poster = f' poster="{sheet.stills[shown].data_uri()}"'
    return (
        f'<video controls preload="none" playsinline aria-label="The video"{poster}>{sources}'
        "</video>"
        f'<p class="trouble" role="status" hidden>The video cannot be played here. Put '
        f"{text(file.name)} beside this page, or open it in a player: the times below hold.</p>"
    )


def _where(sheet: _Sheet, film: str) -> str:
    pins = [
        Pin(number, moment.start, f"Moment {number}: {_span(moment)}")
        for number, moment in enumerate(sheet.moments, 1)
    ]
    times = sheet.video.times.tolist()
    ranked = sheet.relevance is not None
    note = (
        "How relevant each frame is to the question, and how much of it the model then read."
        if ranked
        else "How much of each frame the model read. With this method, or this budget, frames are "
        "not ranked before."
    )
    if pins:
        note += " A number plays the video from that moment."
    return section(
        "Where it looked",
        note,
        film
        + timeline(
            times,
            sheet.end,
            (sheet.per_frame / sheet.tokens).tolist(),
            sheet.relevance,
            pins=pins,
            needles=[times[i] for i in sheet.needle_frames],
            plays=True,
        ),
    )


def _moments(sheet: _Sheet) -> str:
    if not sheet.moments:
        return ""
    items = []
    for number, (moment, peak) in enumerate(zip(sheet.moments, sheet.peaks, strict=True), 1):
        frames = moment.last_frame - moment.first_frame + 1
        caption = (
            f'<div class="head"><span class="badge" aria-hidden="true">{number}</span>'
            f"{_span(moment)}"
            f'<button class="go" type="button" data-at="{moment.start:.3f}" '
            f'aria-label="Play the video from {stamp(moment.start)}">Play</button></div>'
            f'<span class="soft">{moment.kept:,} of {frames * sheet.tokens:,} tokens kept, '
            f"relevance {moment.score:.2g}</span>"
        )
        items.append(f"<li>{sheet.figure(peak, caption)}</li>")
    together = ""
    if sheet.selection.reading is not None:
        together = (
            " Relevance counts here both in its set of frames and when the model read all that was "
            "kept, to answer."
            if sheet.selection.scores is not None
            else " Relevance is here what the model looked at when it read all that was kept, to "
            "answer."
        )
    return section(
        "The moments it was read from",
        f"The most relevant stretches, best first, each with its most relevant frame.{together} "
        "Framed and bright: the visual tokens that were kept. Dark: those that were dropped.",
        _switch(sheet) + f'<ol class="pictures">{"".join(items)}</ol>',
    )


def _frames(sheet: _Sheet) -> str:
    if not sheet.others:
        return ""
    items = []
    for frame in sheet.others:
        seconds = float(sheet.video.times[frame])
        count = int(sheet.per_frame[frame])
        caption = (
            f'<span class="number">{stamp(seconds)}</span> '
            f'<span class="soft">{count} of {sheet.tokens} kept</span>'
        )
        items.append(f"<li>{sheet.figure(frame, caption)}</li>")
    more = int((sheet.per_frame > 0).sum()) - len(sheet.others) - len(set(sheet.peaks))
    which = "The most relevant of the other" if sheet.ranks is not None else "Some of the"
    note = f"{which} frames of which something was kept, in order of time."
    if more > 0:
        note += f" {more:,} more are not shown."
    switch = "" if sheet.moments else _switch(sheet)
    return section(
        "What else was kept" if sheet.moments else "What was kept",
        note,
        switch + f'<ul class="pictures strip-of-pictures">{"".join(items)}</ul>',
    )


def _needle(sheet: _Sheet) -> str:
    if sheet.needle_tokens is None:
        return ""
    total = int(sheet.needle_tokens.sum())
    if not total:
        return section("Where the answer is", "In no picture that was looked at.", "")
    stays = int(sheet.needle_tokens[sheet.selection.kept].sum())
    items = []
    for frame in sheet.needle_frames[:_FRAMES]:
        caption = (
            f'<span class="number">{stamp(float(sheet.video.times[frame]))}</span> '
            f'<span class="soft">{int(sheet.per_frame[frame])} of {sheet.tokens} kept</span>'
        )
        items.append(f"<li>{sheet.figure(frame, caption)}</li>")
    return section(
        "Where the answer is",
        f"Visual tokens that show it (dashed in green): {total:,}. Kept of them: {stays:,}.",
        f'<ul class="pictures strip-of-pictures">{"".join(items)}</ul>',
    )


def _cost(video: Video, answer: Answer) -> str:
    selection = answer.selection
    kept, before = len(selection.kept), selection.num_visual
    seconds = {**video.seconds, **answer.seconds}
    longest = max(seconds.values(), default=0.0) or 1.0
    tokens = [("visual tokens before", before, ""), ("visual tokens kept", kept, ' class="kept"')]
    rows = "".join(
        f'<tr><th scope="row">{name}</th><td class="number">{count:,}</td>'
        f'<td class="bar"><span{kind} style="width:{100 * count / before:.2f}%"></span></td></tr>'
        for name, count, kind in tokens
    )
    stages = "".join(
        f'<tr><th scope="row">{text(_STAGES.get(stage, stage))}</th>'
        f'<td class="number">{spent:.2f} s</td>'
        f'<td class="bar"><span style="width:{100 * spent / longest:.2f}%"></span></td></tr>'
        for stage, spent in seconds.items()
    )
    return section(
        "What it cost",
        "Decoding and encoding are paid once a video, the rest once a question.",
        '<div class="scroll"><table aria-label="Visual tokens before and after selection">'
        f"{rows}</table>"
        f'<table aria-label="Time by stage">{stages}</table></div>',
    )


def _switch(sheet: _Sheet) -> str:
    """Choose what lies over the pictures; works without script."""
    choices = [("kept", "what was kept")]
    if sheet.heat is not None:
        choices.append(("heat", "relevance"))
    choices.append(("plain", "nothing"))
    return (
        "<fieldset><legend>Show over the pictures</legend>"
        + "".join(
            f'<label><input type="radio" name="see" id="see-{name}"'
            f"{' checked' if name == 'kept' else ''}>{label}</label>"
            for name, label in choices
        )
        + "</fieldset>"
    )


def _record(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Put what people look for first, first."""
    first: Sequence[str] = ("question", "video", "model", "method", "selector", "layer", "budget")
    return {**{name: settings[name] for name in first if name in settings}, **settings}


def _relative(file: Path, report: Path) -> str:
    try:
        return Path(os.path.relpath(file.resolve(), report.resolve().parent)).as_posix()
    except ValueError:  # another drive
        return file.name


def _tiny(still: Still) -> str:
    return " tiny" if max(still.size) < TINY else ""


def _span(moment: Moment) -> str:
    return f"{stamp(moment.start)} – {stamp(moment.end)}"


def _share(part: int, whole: int) -> str:
    share = 100 * part / whole
    return f"{share:.0f}%" if share >= 10 or part == whole else f"{share:.1f}%"
