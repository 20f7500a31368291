"""One process of a run: asks every method every question through lmms-eval, and keeps what it says.

``python -m flexselect.evaluation.worker FOLDER`` does what ``FOLDER/run.json`` plans; several such
processes share the work.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.loggers.evaluation_tracker import EvaluationTracker
from lmms_eval.tasks import TaskManager
from loguru import logger as harness_log
from transformers.utils import logging as logging_of_transformers

from ..core.errors import FlexSelectError, OptionError
from ..inference.terminal import err, progress_bars, user_errors
from .arguments import parse_arguments
from .loaded import Loaded
from .model import CLASSES, FlexSelectModel
from .needle import TASKS, prepare
from .plan import ROWS, SAMPLES, Plan, load_plan, write_json, write_text
from .prompts import give_prompt
from .scores import group_row, task_row, task_samples

logger = logging.getLogger(__name__)

#: What the harness writes, below a method's folder.
HARNESS = "lmms_eval"

#: A process may wait this long for the slowest one.
_PATIENCE = datetime.timedelta(hours=24)


class Tasks(TaskManager):
    """The harness's tasks and ours, each with the prompt of its published figures.

    Attributes
    ----------
    prompts : settings of each loaded task.
    """

    def __init__(self, plan: Plan) -> None:
        self.family = plan.family
        self.prompts: dict[str, Any] = {}
        folders = [str(TASKS), *plan.include]
        super().__init__(include_path=folders, include_defaults=False)
        if not set(plan.tasks) <= set(self.all_tasks):
            # Indexing the hundreds of tasks of the harness takes seconds.
            super().__init__(include_path=folders)
        unknown = sorted(set(plan.tasks) - set(self.all_tasks))
        if unknown:
            raise OptionError(
                f"There is no task {', '.join(unknown)}. `python -m lmms_eval --tasks list` names "
                "those of the harness; --include adds a folder of more."
            )

    def load_task_or_group(self, task_list: Any = None, task_type: str = "simple") -> Any:
        """Load tasks and give each its prompt; `FlexSelectError` where the data is not there."""
        try:
            loaded = super().load_task_or_group(task_list, task_type)
        # Whatever datasets and the hub raise: there is no narrower class.
        except Exception as error:
            raise FlexSelectError(
                f"Task {task_list} cannot be loaded ({_first_line(error)}). Its data must be on "
                "this machine, or the hub within reach: scripts/prepare_data.py prepares a "
                "benchmark and names what is missing."
            ) from error
        for name, task in _leaves(loaded):
            self.prompts[name] = give_prompt(task, self.family)
        return loaded


def evaluate_run(folder: Path) -> None:
    """Evaluate every method of a run, as one of the processes that the environment names."""
    plan = load_plan(folder)
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    patience = InitProcessGroupKwargs(timeout=_PATIENCE)
    # Without a GPU accelerate sees other processes only when told to use the CPU.
    on_cpu = not torch.cuda.is_available()
    accelerator = Accelerator(cpu=on_cpu, kwargs_handlers=[patience]) if several else None
    rank = int(os.environ.get("RANK", "0"))
    harness_log.remove()
    harness_log.add(folder / f"lmms_eval-{rank}.log", level="INFO")
    logging_of_transformers.disable_progress_bar()
    tasks = Tasks(plan)
    if rank == 0:
        with progress_bars() as progress:
            prepare(plan.tasks, plan.limit, progress)
    if accelerator is not None:
        accelerator.wait_for_everyone()
    first = next(iter(plan.methods))
    with progress_bars(silent=rank != 0) as progress:
        progress("load", 0, 1)
        loaded = Loaded.of(parse_arguments(plan.arguments(first, folder)))
        progress("load", 1, 1)
    for method in plan.methods:
        lm = CLASSES[plan.family](loaded, **plan.arguments(method, folder))
        if accelerator is not None:
            lm.accelerator = accelerator
        tracker = EvaluationTracker(output_path=str(folder / method / HARNESS))
        with _harness_bars_to(folder / f"lmms_eval-{rank}.log"):
            results = simple_evaluate(
                model=lm,
                model_args=f"pretrained={plan.checkpoint},method={method}",
                tasks=list(plan.tasks),
                task_manager=tasks,
                limit=plan.limit,
                batch_size=lm.batch_size,
                evaluation_tracker=tracker,
                log_samples=True,
                datetime_str=folder.name,
            )
        # The tracker copies whatever it holds, and must not copy a model.
        tracker.general_config_tracker.model_source = f"flexselect_{plan.family}"
        if rank == 0:
            _keep(folder / method, method, lm, results, tracker, tasks.prompts)
    if accelerator is not None:
        accelerator.wait_for_everyone()
        accelerator.end_training()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run as a process of its own."""
    (folder,) = sys.argv[1:] if arguments is None else arguments
    with user_errors():
        evaluate_run(Path(folder))


@contextmanager
def _harness_bars_to(log: Path) -> Iterator[None]:
    """Keep the harness's many progress bars off the terminal, where ours is."""
    err.file = sys.stderr
    try:
        with log.open("a") as file, redirect_stderr(file):
            yield
    finally:
        err.file = None  # type: ignore[assignment] # as rich leaves it: whatever stderr is


def _keep(
    folder: Path,
    method: str,
    lm: FlexSelectModel,
    results: Mapping[str, Any],
    tracker: EvaluationTracker,
    prompts: Mapping[str, Any],
) -> None:
    """Write a method's samples, figures and settings, and the harness's own outputs."""
    logged = {task: list(samples) for task, samples in results["samples"].items()}
    journal = list(lm.answered.values())
    rows, kept = [], []
    for task, samples in logged.items():
        metric = results["configs"][task]["metric_list"][0]["metric"]
        own = task_samples(method, task, samples, journal, metric)
        kept += own
        rows.append(task_row(method, task, metric, own, results["results"][task]))
    for group, members in results["group_subtasks"].items():
        of_group = [row for row in rows if row["task"] in members]
        if of_group:
            rows.append(group_row(group, of_group))
    examples = {row["task"]: row["prompt"] for row in reversed(journal)}
    generation = {task: results["configs"][task].get("generation_kwargs") for task in logged}
    record = {
        "settings": lm.settings,
        "prompts": {
            task: {"settings": prompts.get(task), "example": examples.get(task)} for task in logged
        },
        "generation": generation,
    }
    write_json(folder / "settings.json", record)
    write_text(folder / SAMPLES, "".join(_line(sample) for sample in kept))
    _save_harness(folder / HARNESS, results, logged, tracker)
    write_json(folder / ROWS, rows)


def _save_harness(
    folder: Path,
    results: Mapping[str, Any],
    logged: Mapping[str, list[dict[str, Any]]],
    tracker: EvaluationTracker,
) -> None:
    # The harness appends to what an earlier try has left, and only logs a failure to write.
    shutil.rmtree(folder, ignore_errors=True)
    for samples in logged.values():
        samples.sort(key=lambda sample: int(sample["doc_id"]))
    whole = {name: value for name, value in results.items() if name != "samples"}
    stamp = folder.parent.parent.name
    tracker.save_results_aggregated(results=whole, samples=dict(logged), datetime_str=stamp)
    for task, samples in logged.items():
        tracker.save_results_samples(task_name=task, samples=samples)
    written = {path.name.split("_", 1)[1] for path in folder.rglob("*.json*")}
    wanted = {"results.json", *(f"samples_{task}.jsonl" for task in logged)}
    if not wanted <= written:
        raise FlexSelectError(
            f"{folder}: lmms-eval could not write {', '.join(sorted(wanted - written))}. Its log "
            f"beside it says why."
        )


def _leaves(loaded: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    for name, task in loaded.items():
        if isinstance(task, Mapping):
            yield from _leaves(task)
        else:
            yield str(name), task[1] if isinstance(task, tuple) else task


def _line(value: Any) -> str:
    return json.dumps(value, default=str) + "\n"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


if __name__ == "__main__":
    main()
