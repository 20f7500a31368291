"""The table of a run: in Markdown for its folder, and for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from rich import box
from rich.table import Table

from .scores import TO_FIRST_TOKEN, half_width

_COLUMNS = (
    ("method", "left"),
    ("task", "left"),
    ("frames", "right"),
    ("visual tokens", "right"),
    ("accuracy", "right"),
    ("first token", "right"),
    (f"{'+'.join(TO_FIRST_TOKEN)}, ms", "right"),
)

EXPLANATION = (
    "Accuracy ± how far its 95 % interval reaches. Time to first token, and its stages, as if "
    "every question were the first about its video."
)

Row = dict[str, Any]


def cells(row: Row) -> list[str]:
    """Write a row as text, in the order of the columns."""
    if row["note"] is not None:
        return [row["method"], row["task"], "", "", "not run", "", ""]
    interval = half_width(row)
    accuracy = "?" if row["accuracy"] is None else f"{row['accuracy']:.3f}"
    if interval is not None:
        accuracy += f" ± {interval:.3f}"
    tokens = stages = ttft = frames = "?"
    if row["visual_tokens"] is not None:
        frames = f"{row['frames']:,.0f}"
        tokens = f"{row['visual_tokens']:,.0f} → {row['kept_tokens']:,.0f}"
        ttft = f"{row['ttft_s']:.3f} s"
        stages = "+".join(f"{row['stages'][stage] * 1000:.0f}" for stage in TO_FIRST_TOKEN)
    return [row["method"], row["task"], frames, tokens, accuracy, ttft, stages]


def markdown(rows: Sequence[Row], title: str, notes: Sequence[str]) -> str:
    """Write the table with what it was made from."""
    head = "| " + " | ".join(name for name, _ in _COLUMNS) + " |"
    rule = "| " + " | ".join("---:" if side == "right" else "---" for _, side in _COLUMNS) + " |"
    lines = [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in cells(row)) + " |" for row in rows
    ]
    below = [f"- {note}" for note in (EXPLANATION, *remarks(rows), *notes)]
    return "\n".join([f"# {title}", "", head, rule, *lines, "", *below, ""])


def terminal(rows: Sequence[Row], title: str) -> Table:
    """Make the table for a terminal, a line between tasks."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name, side in _COLUMNS:
        whole = name in ("method", "accuracy")
        justify: Literal["left", "right"] = "right" if side == "right" else "left"
        table.add_column(name, justify=justify, overflow="fold", no_wrap=whole)
    for index, row in enumerate(rows):
        last = index + 1 == len(rows) or rows[index + 1]["task"] != row["task"]
        table.add_row(*cells(row), end_section=last)
    return table


def remarks(rows: Sequence[Row]) -> list[str]:
    """Say what the figures hide: methods that did not run, videos that were not there."""
    reasons = {row["method"]: row["note"] for row in rows if row["note"] is not None}
    found = [f"{method}: {reason}" for method, reason in reasons.items()]
    found += [
        f"{row['method']}, {row['task']}: {row['failed']} of {row['samples']} without a usable "
        "video; samples.jsonl says why."
        for row in rows
        if row["failed"]
    ]
    return found


def savings(rows: Sequence[Row]) -> str | None:
    """Say what sharing videos between questions and methods spared; None where nothing was."""
    spared = sum(row["spared_s"] for row in rows)
    if not spared:
        return None
    questions = sum(row["samples"] - row["failed"] for row in rows)
    opened = sum(row["opened"] for row in rows)
    return (
        f"Asked {questions:,} times with {opened:,} {'opening' if opened == 1 else 'openings'} of "
        f"videos: {spared:,.1f} s of decoding and encoding spared."
    )
