"""The published figures, and the page that puts ours beside them.

``scripts/results_page.py`` writes ``docs/results.md`` from what is here and from the runs kept in
``docs/results/``; a test fails where the page says anything else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import OptionError
from ..inference.methods import FlexSelect, Full
from ..inference.policy import SAMPLING
from .arguments import LITE
from .identity import ROOT
from .plan import RECORD, ROWS, SUMMARY, read_json, write_json
from .prompts import LOCAL
from .scores import half_width

#: Task of lmms-eval: what the paper's table calls it.
COLUMNS = {
    "videomme_long": "VideoMME (long)",
    "videomme": "VideoMME",
    "mlvu_dev": "MLVU (M-Avg)",
    "longvideobench_val_v": "LongVideoBench (val)",
    "lvbench": "LVBench",
}

SOURCE = (
    "[arXiv 2506.00993](https://arxiv.org/abs/2506.00993), as its table stands in the README of "
    '[the reference](https://github.com/yunzhuzhang0918/flexselect), "Comprehensive Evaluation on '
    'Long Video Benchmarks"'
)


@dataclass(frozen=True)
class Model:
    """A model of the published table.

    Attributes
    ----------
    name : in the table.
    family : what ``make eval MODEL=`` takes.
    checkpoint, selector : hub ids; None where no selector was published.
    frames : of the runs without selection; None for the preset's.
    spread : one GPU does not hold it.
    figures : method to percents, in the order of `COLUMNS`; None where nothing was found.
    """

    name: str
    family: str
    checkpoint: str
    selector: str | None
    frames: int | None
    figures: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    spread: bool = False


MODELS = (
    Model(
        "LLaVA-Video-7B",
        "llava",
        "lmms-lab/LLaVA-Video-7B-Qwen2",
        "yunzhuyunzhu/flexselect_llava_video",
        64,
        {
            Full.name: (52.9, 64.4, 68.6, 58.2, 43.1),
            FlexSelect.name: (59.8, 68.9, 73.2, 61.9, 52.9),
            LITE: (58.3, 68.3, 71.8, 60.7, 52.2),
        },
    ),
    Model(
        "InternVL2.5-8B",
        "internvl",
        "OpenGVLab/InternVL2_5-8B",
        "yunzhuyunzhu/flexselect_internvl2.5",
        64,
        {
            Full.name: (52.8, 64.2, 68.9, 59.5, 43.4),
            FlexSelect.name: (58.1, 67.0, 71.9, 60.1, 49.7),
            LITE: (57.9, 67.2, 71.9, 61.2, 49.9),
        },
    ),
    Model(
        "Qwen2.5-VL-7B",
        "qwen",
        "Qwen/Qwen2.5-VL-7B-Instruct",
        "yunzhuyunzhu/flexselect_qwen2.5vl",
        None,
        {
            Full.name: (55.6, 65.4, 70.2, 59.5, 45.3),
            FlexSelect.name: (59.3, 68.2, 72.5, 62.4, 51.2),
            LITE: (58.6, 67.4, 70.3, 61.9, 50.0),
        },
    ),
    Model(
        "LLaVA-Video-72B",
        "llava",
        "lmms-lab/LLaVA-Video-72B-Qwen2",
        None,
        64,
        {
            Full.name: (61.9, 70.0, 71.2, 62.4, 45.5),
            FlexSelect.name: (66.1, 73.1, 76.0, 66.9, 55.5),
        },
        spread=True,
    ),
    Model(
        "Qwen2.5-VL-72B",
        "qwen",
        "Qwen/Qwen2.5-VL-72B-Instruct",
        None,
        None,
        {
            Full.name: (63.9, 73.4, 76.3, 66.2, 47.3),
            FlexSelect.name: (66.9, 74.4, 76.6, 66.4, 56.6),
        },
        spread=True,
    ),
)


@dataclass(frozen=True)
class Kept:
    """A run that is kept beside the page: what decided it, and its rows."""

    name: str
    record: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]

    @property
    def checkpoint(self) -> str:
        """Hub id or folder of its model."""
        return str(self.record["plan"]["checkpoint"])

    @property
    def hardware(self) -> str:
        """What it ran on."""
        machine = self.record["machine"]
        gpus = machine["gpus"]
        return f"{len(gpus)} x {gpus[0]}" if gpus else f"CPU ({machine['cpu']})"


def keep(run: Path, folder: Path) -> Path:
    """Copy what a page needs of a finished run into the folder of kept runs.

    Raises
    ------
    OptionError
        ``run`` holds no finished run.
    """
    record, rows = read_json(run / RECORD), read_json(run / ROWS)
    finished = (run / SUMMARY).exists()
    if not finished or not isinstance(record, dict) or not isinstance(rows, list) or not rows:
        raise OptionError(
            f"{run} is no finished run of `flexselect eval`: {RECORD} and {SUMMARY} must be in it."
        )
    plan = record["plan"]
    needed = {
        "plan": {
            name: plan[name]
            for name in ("family", "checkpoint", "methods", "tasks", "limit", "shared")
        },
        "versions": record["decides"].get("versions"),
        **{name: record.get(name) for name in ("machine", "started", "finished", "git")},
    }
    path = folder / f"{Path(plan['checkpoint']).name}-{run.resolve().name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, {"record": _portable(needed), "rows": _portable(rows)})
    return path


def _portable(value: Any) -> Any:
    """Shorten paths of this machine: nobody else has them."""
    if isinstance(value, dict):
        return {name: _portable(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_portable(each) for each in value]
    if isinstance(value, str) and value.startswith("/"):
        path = Path(value)
        return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
    return value


def kept_runs(folder: Path) -> list[Kept]:
    """Read the kept runs, oldest first; `OptionError` for a file that is none."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found.append(Kept(path.stem, content["record"], content["rows"]))
        except (ValueError, KeyError, TypeError) as error:
            raise OptionError(f"{path} is no kept run ({error}); remove it.") from error
    return sorted(found, key=lambda run: str(run.record.get("started")))


def command(model: Model, method: str, tasks: Sequence[str] = tuple(COLUMNS)) -> str:
    """Return the command that fills a method's row, or some of its cells."""
    words = ["HF_HOME=$PWD/data make eval", f"MODEL={model.family}", f"CKPT={model.checkpoint}"]
    words += [f"TASKS={','.join(tasks)}", f"METHODS={method}"]
    if method == LITE and model.selector is not None:
        words.append(f"SELECTOR={model.selector}")
    if method == Full.name and model.frames is not None:
        words.append(f"FRAMES={model.frames}")
    words.append("ARGS='--device-map auto'" if model.spread else "GPUS=8")
    return " ".join(words)


def page(runs: Sequence[Kept] = ()) -> str:
    """Write the page."""
    lines = [*_HEAD]
    for model in MODELS:
        lines += ["", f"## {model.name}", "", *_table(model, runs), "", "```sh"]
        lines += [command(model, method) for method in model.figures]
        lines += ["```"]
    lines += ["", *_TAIL]
    others = [run for run in runs if not any(_is_of(run, model) for model in MODELS)]
    if others:
        lines += ["", "## Other models", ""]
        lines += ["The tiny models of the testbed, `make eval MODEL=…` without more."]
        for run in others:
            lines += ["", *_other(run)]
    return "\n".join([*lines, ""])


def _table(model: Model, runs: Sequence[Kept]) -> list[str]:
    lines = [
        "| method | | " + " | ".join(COLUMNS.values()) + " |",
        "|---|---|" + "---:|" * len(COLUMNS),
    ]
    for method, figures in model.figures.items():
        published = ["not found" if value is None else f"{value:.1f}" for value in figures]
        ours = [_ours(model, method, task, runs) for task in COLUMNS]
        lines.append(f"| {method} | published | " + " | ".join(published) + " |")
        lines.append("| | here | " + " | ".join(ours) + " |")
    return lines


def _ours(model: Model, method: str, task: str, runs: Sequence[Kept]) -> str:
    """Return the latest figure of what `command` runs, or nothing."""
    for run in reversed(runs):
        if _is_of(run, model) and _as_commanded(run, model, method):
            for row in run.rows:
                named = (row["method"], row["task"].removesuffix(LOCAL))
                if named == (method, task) and row["accuracy"] is not None:
                    return _percent(row)
    return ""


def _is_of(run: Kept, model: Model) -> bool:
    return Path(run.checkpoint).name == Path(model.checkpoint).name


def _as_commanded(run: Kept, model: Model, method: str) -> bool:
    """Tell whether a run asked a method all questions with the settings that `command` names."""
    plan = run.record["plan"]
    own = {name: v for name, v in plan["methods"].get(method, {}).items() if name != "method"}
    if "selector" in own:
        own["selector"] = Path(own["selector"]).name
    looked_at = {name: v for name, v in plan["shared"].items() if name in SAMPLING}
    selector, frames = {}, {}
    if method == LITE and model.selector is not None:
        selector = {"selector": Path(model.selector).name}
    if method == Full.name and model.frames is not None:
        frames = {"frames": model.frames}
    return plan["limit"] is None and own == selector and looked_at == frames


def _percent(row: Mapping[str, Any]) -> str:
    half = half_width(dict(row))
    text = f"{100 * row['accuracy']:.1f}" + ("" if half is None else f" ± {100 * half:.1f}")
    return text + (f" ({row['failed']} without video)" if row["failed"] else "")


def _other(run: Kept) -> list[str]:
    lines = [
        f"{run.record['plan']['family']}, {run.hardware}, `{run.name}`:",
        "",
        "| task | method | frames | visual tokens | accuracy, % | first token, s |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in run.rows:
        if row["accuracy"] is not None:
            tokens = f"{row['visual_tokens']:,.0f} → {row['kept_tokens']:,.0f}"
            lines.append(
                f"| {row['task']} | {row['method']} | {row['frames']:,.0f} | {tokens} | "
                f"{_percent(row)} | {row['ttft_s']:.3f} |"
            )
    return lines


_HEAD = f"""\
# Results

The reference's published figures, and ours beside them: accuracy in percent, ours with how far its
95 % interval reaches. A cell is empty until somebody has run it; below each table stand the
commands that fill its rows. Each of them needs the hub and a GPU.

Published: {SOURCE}.
Every cell of that table for these models was found there; none is from memory.

The data comes first, once: `python scripts/prepare_data.py BENCHMARK --root data` for videomme,
mlvu, longvideobench and lvbench (`HF_HOME` then also holds what the hub's client downloads). For
one cell name its task alone in `TASKS=`; the columns are, in this order,
{", ".join(f"`{task}`" for task in COLUMNS)}.
A finished run is put into this page with
`python scripts/results_page.py --add results/eval/MODEL/latest`. One with a `LIMIT`, or with a
budget, layer, frames or selector other than these commands', fills no cell.

The page is written by `scripts/results_page.py` from `evaluation/published.py` and the runs kept in
`docs/results/`; do not edit it by hand.""".splitlines()

_TAIL = """\
## What to know before comparing

- Frames, layer and budget of `flexselect` and `flexselect-lite` are the presets in
  `shared_configs/models`, which follow the reference's scripts. How many frames the published rows
  without selection saw is not stated where the figures are. The commands give LLaVA-Video and
  InternVL2.5 64 (inferred from how their authors evaluate) and Qwen2.5-VL its preset. For the
  control "same frames, no selection" leave `FRAMES=` out.
- Prompts are the reference's, family by family (`evaluation/prompts.py`, frozen in
  `tests/evaluation/golden`). InternVL is asked LongVideoBench with subtitles, the others without.
- The reference lets a model say one token on VideoMME, LongVideoBench and LVBench; here lmms-eval's
  limits of 16 and 32 hold, and its parsers read the letter.
- MLVU's figure is lmms-eval's mean over the task types, not over the questions. Answers to
  LongVideoBench and EgoSchema that hold no letter are drawn at random by lmms-eval, which seeds the
  draw.
- For LLaVA-Video-72B no settings were published that we know of: its family's general preset
  applies.
- The reference published nothing for EgoSchema and MVBench. They run the same way:
  `TASKS=egoschema_subset,mvbench`.""".splitlines()
