"""Figures of a run: what the harness scored beside what the journal measured, one row a task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

#: Stages up to the first token, in order; the first two are shared by the questions of a video.
TO_FIRST_TOKEN = ("decode", "encode", "rank", "gather", "prefill")
STAGES = (*TO_FIRST_TOKEN, "answer")

#: What the benchmarks that keep no score of a sample compare.
_COMPARED = (("pred_answer", "answer"), ("parsed_pred", "answer"), ("pred", "ground_truth"))

Row = dict[str, Any]

#: What ``summary.json`` says of a row.
SUMMARISED = (
    "method",
    "task",
    "frames",
    "samples",
    "accuracy",
    "stderr",
    "visual_tokens",
    "kept_tokens",
    "ttft_s",
    "stages",
)


def sample_score(value: Any) -> float | None:
    """Return 0 or 1 from what a task's ``process_results`` gives for a metric; None if it cannot.

    Some give a number, some a dict with a score, some only the answer and the right one.
    """
    if isinstance(value, bool | int | float):
        return float(value)
    if isinstance(value, Mapping):
        if isinstance(value.get("score"), bool | int | float):
            return float(value["score"])
        for said, right in _COMPARED:
            if said in value and right in value:
                return float(str(value[said]).lower() == str(value[right]).lower())
    return None


def task_samples(
    method: str, task: str, logged: Sequence[Mapping[str, Any]], journal: Sequence[Row], metric: str
) -> list[Row]:
    """Join the harness's samples of a task with the journal's lines, in the order of its rows."""
    lines = {row["doc_id"]: row for row in journal if row["task"] == task and not row["ordinal"]}
    samples = []
    for sample in sorted(logged, key=lambda each: int(each["doc_id"])):
        line = lines.get(sample["doc_id"], {})
        samples.append(
            {
                "method": method,
                "task": task,
                "doc_id": sample["doc_id"],
                "score": sample_score(sample.get(metric)),
                "answer": line.get("answer"),
                "target": str(sample["target"]),
                "error": line.get("error"),
                "videos": line.get("videos", []),
                "pictures": line.get("pictures", 0),
                "pictures_lost": line.get("pictures_lost", 0),
                "visual_tokens": line.get("visual_tokens", 0),
                "kept_tokens": line.get("kept_tokens", 0),
                "opened": line.get("opened", 0),
                "seconds": line.get("seconds", {}),
                **({"selection": line["selection"]} if "selection" in line else {}),
            }
        )
    return samples


def task_row(
    method: str, task: str, metric: str, samples: Sequence[Row], results: Mapping[str, Any]
) -> Row:
    """Sum up a task.

    Parameters
    ----------
    method, task, metric : what was evaluated, and the harness's name of the figure.
    samples : from `task_samples`.
    results : the harness's results of the task.

    Returns
    -------
    ``accuracy`` is the harness's own figure, as a share; ``stderr`` its error, by clusters where
    the task has them. Tokens, frames and times are means over the questions whose video could be
    read; times count decoding and encoding as if every question were the first about its video.
    """
    scores = [sample["score"] for sample in samples if sample["score"] is not None]
    asked = [sample for sample in samples if not sample["error"]]
    stages = {
        stage: fmean([sample["seconds"].get(stage, 0.0) for sample in asked]) if asked else 0.0
        for stage in STAGES
    }
    spared = sum(
        sample["seconds"].get("decode", 0.0) + sample["seconds"].get("encode", 0.0)
        for sample in asked
        if not sample["opened"]
    )
    return {
        "method": method,
        "task": task,
        "metric": metric,
        "frames": _mean([sample["pictures"] for sample in asked]),
        "samples": len(samples),
        "failed": len(samples) - len(asked),
        "accuracy": _share(_figure(results, metric), scores),
        "stderr": _error(results, metric, scores),
        "visual_tokens": _mean([sample["visual_tokens"] for sample in asked]),
        "kept_tokens": _mean([sample["kept_tokens"] for sample in asked]),
        "ttft_s": sum(stages[stage] for stage in TO_FIRST_TOKEN) if asked else None,
        "stages": stages,
        "opened": sum(sample["opened"] for sample in samples),
        "spared_s": spared,
        "note": None,
    }


def group_row(group: str, members: Sequence[Row]) -> Row:
    """Sum up the tasks of a group: every task counts alike in accuracy, every question in the rest.

    ``members`` are rows of one method.
    """
    first = members[0]
    known = [row for row in members if row["accuracy"] is not None]
    errors = [row["stderr"] for row in known if row["stderr"] is not None]
    stages = {stage: _weighed(members, ("stages", stage)) for stage in STAGES}
    means = ("frames", "visual_tokens", "kept_tokens", "ttft_s")
    sums = ("samples", "failed", "opened", "spared_s")
    return {
        **first,
        "task": group,
        "metric": f"mean of {len(members)} tasks",
        "accuracy": _mean([row["accuracy"] for row in known]),
        "stderr": math.sqrt(sum(e * e for e in errors)) / len(errors) if errors else None,
        **{name: _weighed(members, (name,)) for name in means},
        **{name: sum(row[name] for row in members) for name in sums},
        "stages": stages,
    }


def missing_row(method: str, task: str, reason: str) -> Row:
    """Stand for a method that could not run, and say why."""
    empty = dict.fromkeys(
        ("metric", "frames", "accuracy", "stderr", "visual_tokens", "kept_tokens", "ttft_s")
    )
    counts = {"samples": 0, "failed": 0, "stages": {}, "opened": 0, "spared_s": 0.0}
    return {"method": method, "task": task, **empty, **counts, "note": reason}


def half_width(row: Row) -> float | None:
    """How far the 95 % interval of a row's accuracy reaches, to its farther end.

    Of a share it is Wilson's, which has a width even where all answers are right; a larger error
    that the harness gives, as by clusters, is taken instead.
    """
    count, share = row["samples"], row["accuracy"]
    if not count or share is None:
        return None
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    spread = math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    spread *= z / (1 + z * z / count)
    return max(abs(middle - share) + spread, z * (row["stderr"] or 0.0))


def _figure(results: Mapping[str, Any], metric: str) -> float | None:
    return next(
        (
            float(value)
            for name, value in results.items()
            if name.split(",")[0] == metric and isinstance(value, bool | int | float)
        ),
        None,
    )


def _share(figure: float | None, scores: Sequence[float]) -> float | None:
    """Return the harness's figure as a share: some tasks give percents, and none says so."""
    mean = _mean(scores)
    if figure is None or mean is None:
        return mean if figure is None else figure
    return min((figure, figure / 100), key=lambda value: abs(value - mean))


def _error(results: Mapping[str, Any], metric: str, scores: Sequence[float]) -> float | None:
    for kind in ("stderr_clustered", "stderr_clt"):
        value = _figure(results, f"{metric}_{kind}")
        if value is not None and not math.isnan(value):
            return value
    return stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else None


def _weighed(rows: Sequence[Row], path: Sequence[str]) -> float | None:
    """Mean over the questions of several rows; ``path`` leads to the value of a row."""
    total, count = 0.0, 0
    for row in rows:
        value: Any = row
        for name in path:
            value = value[name]
        asked = row["samples"] - row["failed"]
        if asked and value is not None:
            total, count = total + value * asked, count + asked
    return total / count if count else None


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
