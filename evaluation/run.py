"""A run from its plan to its table: processes started, figures gathered, files written."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..core.errors import FlexSelectError, OptionError
from ..inference.registry import family_of
from .plan import (
    RECORD,
    ROWS,
    SUMMARY,
    TABLE,
    Plan,
    hold,
    point_latest,
    read_json,
    write_json,
    write_text,
)
from .scores import SUMMARISED, missing_row
from .tables import markdown, savings

Row = dict[str, Any]

#: PR_SET_PDEATHSIG of prctl(2).
_SIGNAL_AT_PARENTS_DEATH = 1


def perform(folder: Path, plan: Plan) -> list[Row]:
    """Do what is planned for a folder; returns the rows of its table, by task and method.

    Raises
    ------
    OptionError
        There are more processes than GPUs, or the checkpoint is of another family.
    FlexSelectError
        Another process works on the folder, or one that was started failed.
    """
    family = family_of(plan.checkpoint)
    if family != plan.family:
        raise OptionError(
            f"{plan.checkpoint} is a {family} model, not {plan.family}. Name its family: "
            f"flexselect eval {family}, or make eval MODEL={family}."
        )
    lock = hold(folder)
    try:
        began = time.perf_counter()
        if plan.processes > 1:
            _start_processes(folder, plan.processes, lock)
        else:
            # Imports the harness, which takes seconds.
            from .worker import evaluate_run

            evaluate_run(folder)
        rows = gather_rows(folder, plan)
        notes = _notes(folder, rows, time.perf_counter() - began)
        title = f"{plan.family}: {', '.join(plan.tasks)}"
        write_text(folder / TABLE, markdown(rows, title, notes))
        _finish_record(folder, plan)
        write_json(folder / ROWS, rows)
        point_latest(folder)
        # Last: a run with a summary is finished, and is not continued.
        write_json(folder / SUMMARY, [{name: row[name] for name in SUMMARISED} for row in rows])
        return rows
    finally:
        os.close(lock)


def gather_rows(folder: Path, plan: Plan) -> list[Row]:
    """Collect the rows of every method, task by task, those that could not run included."""
    by_method = {method: read_json(folder / method / ROWS) for method in plan.methods}
    absent = [method for method, rows in by_method.items() if rows is None]
    if absent:
        raise FlexSelectError(f"{folder}: {', '.join(absent)} left no figures; see the logs there.")
    named = list(plan.tasks)
    # The members of a group that was named come after the tasks that were.
    members = {row["task"]: None for rows in by_method.values() for row in rows}
    tasks = [task for task in named if task in members]
    tasks += [task for task in members if task not in named]
    found = []
    for task in tasks:
        for method in (*plan.methods, *plan.missing):
            if method in plan.missing:
                found.append(missing_row(method, task, plan.missing[method]))
            else:
                found += [row for row in by_method[method] if row["task"] == task]
    return found


def _start_processes(folder: Path, count: int, lock: int) -> None:
    gpus = torch.cuda.device_count()
    if 0 < gpus < count:
        raise OptionError(f"{count} processes need {count} GPUs, this machine has {gpus}.")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc_per_node", str(count), "-m", f"{__package__}.worker", str(folder)),
    ]
    code = run_to_the_end(command, {**os.environ, "TQDM_DISABLE": "1"}, lock)
    if code:
        raise FlexSelectError(
            f"{folder}: a process failed with exit code {code}; what it said is above. "
            "The same command continues with the questions that are left."
        )


def run_to_the_end(command: Sequence[str], environment: Mapping[str, str], lock: int) -> int:
    """Run a command that ends with this process, even if that is killed; return its exit code.

    Otherwise the GPUs stay busy, and the run is taken for one that is going on. Where the system
    cannot do this (only Linux can), the command goes on alone, and ``lock`` says so.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def end_with_parent() -> None:
        if libc is not None:
            libc.prctl(_SIGNAL_AT_PARENTS_DEATH, signal.SIGTERM)

    done = subprocess.run(
        command, env=environment, pass_fds=[lock], preexec_fn=end_with_parent, check=False
    )
    return done.returncode


def _notes(folder: Path, rows: list[Row], seconds: float) -> list[str]:
    record = read_json(folder / RECORD)
    gpus = record["machine"]["gpus"]
    where = gpus[0] if gpus else f"CPU, {record['machine']['threads']} thread(s)"
    notes = [
        f"Model {record['plan']['checkpoint']}, {where}, {record['plan']['processes']} process(es),"
        f" {seconds:.0f} s.",
        savings(rows),
    ]
    return [note for note in notes if note is not None]


def _finish_record(folder: Path, plan: Plan) -> None:
    """Add to the run record what was known only once tasks and model were loaded."""
    record = read_json(folder / RECORD)
    record["methods"] = {name: read_json(folder / name / "settings.json") for name in plan.methods}
    record["finished"] = time.strftime("%Y-%m-%d %H:%M:%S %z")
    write_json(folder / RECORD, record)
