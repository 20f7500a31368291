"""Runs of `flexselect eval` side by side: figures, paired differences, and settings that differ."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..core.errors import OptionError
from .pairing import DRAWS, Paired, holm, paired
from .plan import RECORD, ROWS, SAMPLES, SUMMARY, read_json
from .prompts import LOCAL
from .scores import half_width

Row = dict[str, Any]

#: Settings in which methods may differ: they are what is compared.
COMPARED = (
    "method",
    "budget",
    "layer",
    "selector",
    "selector_checkpoint",
    "aggregation",
    "query",
    "frames_per_set",
    "sets_per_batch",
    "positions",
    "seed",
)

#: Settings that say the same as another one, or where on a machine something lies.
_SILENT = ("model", "flexselect", "torch", "transformers")

_HEAD = ("", "samples", "frames", "visual tokens", "accuracy", "first token")
_PAIRED = ("", "against", "shared", "gained", "lost", "difference", "p", "p (Holm)")


@dataclass(frozen=True, eq=False)
class Contender:
    """One method of one run.

    Attributes
    ----------
    label : what the tables call it.
    folder : of the run.
    rows : task to its figures.
    samples : task to samples by row of the data set.
    settings : everything that decided it, by name.
    """

    label: str
    folder: Path
    rows: Mapping[str, Row]
    samples: Mapping[str, Mapping[Any, Row]]
    settings: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Pair:
    """Two contenders on the samples of a task that both have.

    Attributes
    ----------
    task, first, second : which; the difference is the second's gain.
    result : None where they share no sample.
    left_out : samples that could not be paired, by reason.
    """

    task: str
    first: str
    second: str
    result: Paired | None
    left_out: Mapping[str, int]


@dataclass(frozen=True, eq=False)
class Comparison:
    """What `compare` finds.

    Attributes
    ----------
    contenders : every method of every run.
    pairs : each against the baseline, task by task.
    differences : settings besides the method that are not the same everywhere: values by label.
    """

    contenders: Sequence[Contender]
    pairs: Sequence[Pair]
    differences: Mapping[str, Mapping[str, Any]]


def compare(folders: Sequence[Path], against: str | None = None) -> Comparison:
    """Put runs side by side.

    Parameters
    ----------
    folders : of finished runs; at least two methods in all.
    against : label of the contender that the others are compared with; default: the first.

    Raises
    ------
    OptionError
        A folder holds no finished run, the runs share no task, or there is nothing to compare.
    """
    runs = list(dict.fromkeys(Path(folder).resolve() for folder in folders))
    contenders = _labelled([each for folder in runs for each in _read_run(folder)])
    if len(contenders) < 2:
        raise OptionError(
            "There is only one method in all; name another run, or one that compares methods."
        )
    labels = [each.label for each in contenders]
    if against is not None and against not in labels:
        raise OptionError(f"--against {against!r} is none of {', '.join(labels)}.")
    baseline = contenders[0 if against is None else labels.index(against)]
    pairs = [
        _pair(task, baseline, other)
        for task in baseline.rows
        for other in contenders
        if other is not baseline and _ran(baseline, task) and _ran(other, task)
    ]
    if not pairs:
        raise OptionError(
            f"{baseline.label} shares no task with the others: it has "
            f"{', '.join(t for t in baseline.rows if _ran(baseline, t)) or 'not been run'}. Name "
            "runs of the same tasks, or another --against."
        )
    return Comparison(contenders, pairs, _differences(contenders))


def markdown(comparison: Comparison) -> str:
    """Write a comparison as a page."""
    lines = ["# Comparison of runs", ""]
    lines += [
        f"- {each.label}: `{Path(*each.folder.parts[-2:])}`" for each in comparison.contenders
    ]
    lines += ["", *_warnings(comparison)]
    tested = [pair for pair in comparison.pairs if pair.result is not None]
    values = holm([pair.result.p for pair in tested if pair.result is not None])
    adjusted = dict(zip(map(id, tested), values, strict=True))
    tasks = dict.fromkeys(task for each in comparison.contenders for task in each.rows)
    for task in tasks:
        lines += ["", f"## {task}", "", *_table(_HEAD, _figures(comparison, task))]
        pairs = [pair for pair in comparison.pairs if pair.task == task]
        rows = [_pair_cells(pair, adjusted.get(id(pair))) for pair in pairs]
        if rows:
            lines += ["", *_table(_PAIRED, rows)]
        lines += [f"\n- {note}" for note in _left_out(comparison, task)]
    return "\n".join([*lines, "", *_explanation(comparison), ""])


# Reading -----------------------------------------------------------------------------------------


def _read_run(folder: Path) -> Iterator[Contender]:
    record, figures = read_json(folder / RECORD), read_json(folder / ROWS)
    if not isinstance(record, dict) or "decides" not in record:
        inside = " Name one of the runs in it." if any(folder.glob(f"*/{RECORD}")) else ""
        raise OptionError(
            f"{folder} is no run: there is no readable {RECORD} in it.{inside} A run is a folder "
            "that `flexselect eval` has written."
        )
    if not isinstance(figures, list) or not (folder / SUMMARY).exists():
        raise OptionError(
            f"{folder} is a run that has not finished: there is no {SUMMARY} in it. Start the same "
            "`flexselect eval` again, it continues."
        )
    for method in dict.fromkeys(row["method"] for row in figures):
        rows = [row for row in figures if row["method"] == method]
        samples = _read_samples(folder / method / SAMPLES) if rows[0]["note"] is None else {}
        yield Contender(
            label=method,
            folder=folder,
            rows={row["task"].removesuffix(LOCAL): row for row in rows},
            samples=samples,
            settings=_settings(record, method),
        )


def _read_samples(path: Path) -> dict[str, dict[Any, Row]]:
    found: dict[str, dict[Any, Row]] = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            sample = json.loads(line)
            found.setdefault(sample["task"].removesuffix(LOCAL), {})[sample["doc_id"]] = sample
    except (OSError, ValueError, KeyError) as error:
        raise OptionError(
            f"{path} cannot be read ({error}), so nothing can be paired. Start the same "
            "`flexselect eval` with --fresh."
        ) from error
    return found


def _labelled(contenders: Sequence[Contender]) -> list[Contender]:
    """Tell apart methods of the same name by their run."""
    names = [each.label for each in contenders]
    doubled = {name for name in names if names.count(name) > 1}
    labels = [
        f"{each.label} @ {_told_apart(each.folder, contenders)}"
        if each.label in doubled
        else each.label
        for each in contenders
    ]
    return [
        Contender(label, each.folder, each.rows, each.samples, each.settings)
        for label, each in zip(labels, contenders, strict=True)
    ]


def _told_apart(folder: Path, contenders: Sequence[Contender]) -> str:
    """Name a folder by as much of its path as no other has."""
    others = {each.folder for each in contenders} - {folder}
    for depth in range(1, len(folder.parts)):
        name = Path(*folder.parts[-depth:])
        if all(Path(*other.parts[-depth:]) != name for other in others):
            return str(name)
    return str(folder)


def _settings(record: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Collect everything that decided a method's figures, by name."""
    kept = (record.get("methods") or {}).get(method) or {}
    settings = dict(kept.get("settings") or {})
    versions = settings.pop("versions", {})
    for name in _SILENT:
        settings.pop(name, None)
    for name, version in versions.items():
        settings[f"version of {name}"] = version
    settings["limit"] = record["decides"].get("limit")
    machine = record.get("machine") or {}
    settings["machine (times only)"] = ", ".join(machine.get("gpus") or [machine.get("cpu", "?")])
    for task, generation in (kept.get("generation") or {}).items():
        settings[f"generation of {task.removesuffix(LOCAL)}"] = generation
    for task, prompt in (kept.get("prompts") or {}).items():
        settings[f"prompt of {task.removesuffix(LOCAL)}"] = prompt.get("settings")
    return settings


# Comparing ---------------------------------------------------------------------------------------


def _ran(contender: Contender, task: str) -> bool:
    row = contender.rows.get(task)
    return row is not None and row["note"] is None


def _pair(task: str, first: Contender, second: Contender) -> Pair:
    ours, theirs = second.samples.get(task, {}), first.samples.get(task, {})
    left_out = {
        "asked in one run only": len(ours.keys() ^ theirs.keys()),
        "of another question in the two runs": 0,
        "without a usable video in one or both": 0,
        "without a score": 0,
    }
    shared = []
    for doc_id in sorted(ours.keys() & theirs.keys(), key=str):
        two = (theirs[doc_id], ours[doc_id])
        if _question(two[0]) != _question(two[1]):
            left_out["of another question in the two runs"] += 1
        elif any(sample["error"] for sample in two):
            left_out["without a usable video in one or both"] += 1
        elif any(sample["score"] is None for sample in two):
            left_out["without a score"] += 1
        else:
            shared.append(two)
    result = None
    if shared:
        result = paired(
            [each["score"] for each, _ in shared],
            [each["score"] for _, each in shared],
            [_question(each)[1] or index for index, (each, _) in enumerate(shared)],
        )
    return Pair(task, first.label, second.label, result, left_out)


def _question(sample: Row) -> tuple[str, tuple[str, ...]]:
    """Tell a question from others: its right answer and its videos, wherever those lie."""
    return sample["target"], tuple(Path(video).name for video in sample["videos"])


def _differences(contenders: Sequence[Contender]) -> dict[str, dict[str, Any]]:
    ran = [each for each in contenders if each.settings.get("method") is not None]
    names = dict.fromkeys(name for each in ran for name in each.settings)
    found = {}
    for name in names:
        if name in COMPARED:
            continue
        # A task that only some have makes no difference to those that have it.
        values = {each.label: each.settings[name] for each in ran if name in each.settings}
        if any(one != other for one, other in pairwise(values.values())):
            found[name] = values
    return found


# Writing -----------------------------------------------------------------------------------------


def _warnings(comparison: Comparison) -> list[str]:
    if not comparison.differences:
        return ["Apart from the methods' own settings the runs are alike."]
    lines = ["**These runs differ in more than their methods:**", ""]
    for name, values in comparison.differences.items():
        groups: dict[str, list[str]] = {}
        for label, value in values.items():
            groups.setdefault(_short(value), []).append(label)
        said = "; ".join(f"{value} ({', '.join(labels)})" for value, labels in groups.items())
        lines.append(f"- {name}: {said}")
    return lines


def _short(value: Any) -> str:
    return f"`{json.dumps(value, default=str, ensure_ascii=False)}`"


def _figures(comparison: Comparison, task: str) -> Iterator[list[str]]:
    for each in comparison.contenders:
        row = each.rows.get(task)
        if row is None:
            continue
        if row["note"] is not None:
            yield [each.label, "", "", "", f"not run: {row['note']}", ""]
            continue
        accuracy = "?" if row["accuracy"] is None else f"{row['accuracy']:.3f}"
        if (half := half_width(row)) is not None:
            accuracy += f" ± {half:.3f}"
        if row["failed"]:
            accuracy += f" ({row['failed']} without video)"
        measured = row["visual_tokens"] is not None
        tokens = f"{row['visual_tokens']:,.0f} → {row['kept_tokens']:,.0f}" if measured else "?"
        frames = f"{row['frames']:,.0f}" if measured else "?"
        first = f"{row['ttft_s']:.3f} s" if measured else "?"
        yield [each.label, f"{row['samples']:,}", frames, tokens, accuracy, first]


def _pair_cells(pair: Pair, adjusted: float | None) -> list[str]:
    found = pair.result
    if found is None or adjusted is None:
        return [pair.second, pair.first, "0", "", "", "no shared sample", "", ""]
    difference = f"{found.difference:+.3f}"
    if found.low is not None and found.high is not None:
        difference += f" [{found.low:+.3f}, {found.high:+.3f}]"
    p = _probability(found.p) + ("" if found.exact else " (sign flips)")
    return [
        pair.second,
        pair.first,
        f"{found.samples:,} ({found.clusters:,} videos)",
        f"{found.gained:,}",
        f"{found.lost:,}",
        difference,
        p,
        _probability(adjusted),
    ]


def _probability(p: float) -> str:
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}"


def _left_out(comparison: Comparison, task: str) -> Iterator[str]:
    for pair in comparison.pairs:
        if pair.task == task:
            for reason, count in pair.left_out.items():
                if count:
                    who = f"{pair.second} against {pair.first}"
                    yield f"{who}: {count:,} samples left out, {reason}."


def _explanation(comparison: Comparison) -> list[str]:
    count = sum(pair.result is not None for pair in comparison.pairs)
    return [
        "Accuracy is lmms-eval's figure of the task, ± how far its 95 % interval reaches. The "
        "difference is of the mean score of the samples that both have (gained: only the first "
        f"named has it right), with a 95 % interval from {DRAWS:,} paired bootstrap draws of "
        "videos. p is McNemar's test, exact and two-sided, which takes questions about one video "
        f"for independent; p (Holm) is corrected for the number of comparisons, {count}."
    ]


def _table(head: Sequence[str], rows: Any) -> list[str]:
    lines = [list(head), ["---"] * len(head), *rows]
    return ["| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |" for cells in lines]
