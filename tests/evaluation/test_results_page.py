"""docs/results.md: current, its figures consistent, its commands understood by the real command."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flexselect.cli import app
from flexselect.core.errors import OptionError
from flexselect.evaluation import plan as planning
from flexselect.evaluation.arguments import LITE
from flexselect.evaluation.data import BENCHMARKS
from flexselect.evaluation.published import COLUMNS, MODELS, keep, kept_runs, page
from flexselect.tests.paths import ROOT

PAGE = (ROOT / "docs" / "results.md").read_text()
COMMANDS = re.findall(r"^HF_HOME=.*$", PAGE, re.MULTILINE)


def script() -> Any:
    spec = importlib.util.spec_from_file_location(
        "results_page", ROOT / "scripts" / "results_page.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_its_script_writes(capsys: pytest.CaptureFixture[str]) -> None:
    assert script().main(["--check"]) == 0, "run python scripts/results_page.py"


def test_a_page_that_is_not_current_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script().main(["--check", "--docs", str(tmp_path)]) == 1
    assert "is not current" in capsys.readouterr().err
    assert script().main(["--docs", str(tmp_path)]) == 0
    assert script().main(["--check", "--docs", str(tmp_path)]) == 0
    (tmp_path / "results.md").write_text(page().replace("59.8", "99.8"))
    assert script().main(["--check", "--docs", str(tmp_path)]) == 1


# The gains over the model alone as the same table states them: another reading of its figures.
GAINS = {
    ("LLaVA-Video-7B", "flexselect"): (6.9, 4.5, 4.6, 3.7, 9.8),
    ("LLaVA-Video-7B", LITE): (5.4, 3.9, 3.2, 2.5, 9.1),
    ("InternVL2.5-8B", "flexselect"): (5.3, 2.8, 3.0, 0.6, 6.3),
    ("InternVL2.5-8B", LITE): (5.1, 3.0, 3.0, 1.7, 6.5),
    ("Qwen2.5-VL-7B", "flexselect"): (3.7, 2.8, 2.3, 2.9, 5.9),
    ("Qwen2.5-VL-7B", LITE): (3.0, 2.0, 0.1, 2.4, 4.7),
    ("LLaVA-Video-72B", "flexselect"): (4.2, 3.1, 4.8, 4.5, 10.0),
    ("Qwen2.5-VL-72B", "flexselect"): (3.0, 1.0, 0.3, 0.2, 9.3),
}


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_published_figures_differ_by_the_published_gains(model: Any) -> None:
    alone = model.figures["full"]
    for method, figures in model.figures.items():
        assert len(figures) == len(COLUMNS)
        if method != "full":
            gains = [round(ours - theirs, 1) for ours, theirs in zip(figures, alone, strict=True)]
            assert gains == list(GAINS[model.name, method])


def test_every_row_has_its_command() -> None:
    assert len(COMMANDS) == sum(len(model.figures) for model in MODELS) == 13
    tasks = {task for benchmark in BENCHMARKS.values() for task in benchmark.tasks}
    assert set(COLUMNS) <= tasks, "what prepare_data.py prepares"


@pytest.mark.skipif(not shutil.which("make"), reason="no make on this machine")
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = dict(word.split("=", 1) for word in shlex.split(command) if "=" in word)
    words = shlex.split(command)[1:]
    assert words[:2] == ["make", "eval"]
    # Which Python installs does not matter here, and looking for it takes time.
    made = subprocess.run(
        ["make", "-n", "PYTHON=python3", *words[1:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = made.stdout.replace("\\\n", " ").splitlines()
    [line] = [line for line in lines if "flexselect eval" in line]
    plans: list[Any] = []

    def stop(base: Path, plan: Any, fresh: bool) -> None:
        plans.append(plan)
        raise OptionError("far enough")

    monkeypatch.setattr(planning, "choose_folder", stop)
    done = CliRunner().invoke(app, shlex.split(line)[1:])
    assert "far enough" in done.output, done.output
    [plan] = plans
    assert plan.checkpoint == wanted["CKPT"]
    assert plan.tasks == wanted["TASKS"].split(",")
    assert list(plan.methods) == wanted["METHODS"].split(",")
    assert plan.methods[wanted["METHODS"]].get("selector") == wanted.get("SELECTOR")
    assert plan.shared.get("frames") == (int(wanted["FRAMES"]) if "FRAMES" in wanted else None)
    assert plan.processes == int(wanted.get("GPUS", 1))
    assert plan.shared.get("device_map") == ("auto" if "72B" in command else None)


# Ours --------------------------------------------------------------------------------------------


def run_of(folder: Path, checkpoint: str, rows: list[dict[str, Any]], **changed: Any) -> Path:
    folder.mkdir(parents=True)
    plan: dict[str, Any] = {"family": "qwen2_5_vl", "checkpoint": checkpoint}
    plan.update(tasks=[], limit=None, shared={})
    plan["methods"] = {row["method"]: {"method": row["method"]} for row in rows}
    record = {
        "plan": {**plan, **changed, "include": ["/home/me/tasks"]},
        "decides": {"versions": {"torch": "2"}},
        "machine": {"gpus": ["H200", "H200"], "cpu": "x86_64"},
        "started": folder.name,
    }
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "summary.json").write_text("[]")
    return folder


def row(method: str, task: str, accuracy: float | None) -> dict[str, Any]:
    figures = {"accuracy": accuracy, "stderr": 0.0, "frames": 512.0, "ttft_s": 1.5}
    tokens = {"visual_tokens": 9000.0, "kept_tokens": 64.0}
    counts = {"samples": 1000, "failed": 0, "note": None}
    return {"method": method, "task": task, **counts, **figures, **tokens}


def line_of(text: str, model: str, method: str) -> str:
    """Return the row "here" below a method's published one."""
    lines = text.split(f"## {model}\n")[1].splitlines()
    index = next(i for i, line in enumerate(lines) if line.startswith(f"| {method} | published"))
    return lines[index + 1]


def test_runs_fill_their_cells_and_no_others(tmp_path: Path) -> None:
    name = "Qwen/Qwen2.5-VL-7B-Instruct"
    old = run_of(tmp_path / "1", name, [row("flexselect", "lvbench", 0.1)])
    new = run_of(
        tmp_path / "2",
        "/models/Qwen2.5-VL-7B-Instruct",
        [row("flexselect", "lvbench_local", 0.512), row("flexselect", "videomme", None)],
    )
    part = run_of(tmp_path / "3", name, [row("flexselect", "videomme", 0.9)], limit=10)
    for run in (old, new, part):
        keep(run, tmp_path / "kept")
    text = page(kept_runs(tmp_path / "kept"))
    assert line_of(text, "Qwen2.5-VL-7B", "flexselect") == "| | here |  |  |  |  | 51.2 ± 3.1 |"
    assert line_of(text, "Qwen2.5-VL-7B", "full") == "| | here |  |  |  |  |  |"
    assert line_of(text, "Qwen2.5-VL-72B", "flexselect") == "| | here |  |  |  |  |  |"


LLAVA = "lmms-lab/LLaVA-Video-7B-Qwen2"


@pytest.mark.parametrize(
    ("given", "shared", "fills"),
    [
        ({"method": "full"}, {"frames": 64}, True),
        ({"method": "full"}, {"frames": 64, "device": "cuda", "batch_size": 4}, True),
        ({"method": "full"}, {"frames": 512}, False),
        ({"method": "full"}, {}, False),
        ({"method": "flexselect"}, {}, True),
        ({"method": "flexselect"}, {"fps": 1}, False),
        ({"method": "flexselect", "budget": 9}, {}, False),
        ({"method": LITE, "selector": "/data/flexselect_llava_video"}, {}, True),
        ({"method": LITE, "selector": "/data/mine"}, {}, False),
    ],
)
def test_only_what_the_command_runs_fills_a_cell(
    tmp_path: Path, given: dict[str, Any], shared: dict[str, Any], fills: bool
) -> None:
    method = given["method"]
    rows = [row(method, "lvbench", 0.512) | {"failed": 3}]
    run = run_of(tmp_path / "1", LLAVA, rows, methods={method: given}, shared=shared)
    keep(run, tmp_path / "kept")
    [kept] = kept_runs(tmp_path / "kept")
    cell = line_of(page([kept]), "LLaVA-Video-7B", method).split(" | ")[-1]
    assert ("51.2 ± 3.1 (3 without video)" in cell) == fills


def test_a_kept_run_says_nothing_about_folders_of_a_machine(tmp_path: Path) -> None:
    tiny = str(ROOT / "testbed" / "checkpoints" / "qwen2_5_vl")
    methods = {"full": {"method": "full"}, LITE: {"selector": "/home/me/selectors/mine"}}
    run = run_of(tmp_path / "1", tiny, [row("full", "needle_16", 1.0)], methods=methods)
    path = keep(run, tmp_path / "kept")
    assert path.name == "qwen2_5_vl-1.json"
    assert "/home" not in path.read_text()
    assert str(ROOT) not in path.read_text()
    [kept] = kept_runs(tmp_path / "kept")
    assert kept.checkpoint == "testbed/checkpoints/qwen2_5_vl"
    text = page([kept])
    assert "qwen2_5_vl, 2 x H200, `qwen2_5_vl-1`:" in text
    assert "| needle_16 | full | 512 | 9,000 → 64 | 100.0 ± 0.4 | 1.500 |" in text


def test_what_is_no_run_is_not_kept(tmp_path: Path) -> None:
    run = run_of(tmp_path / "1", "a/b", [row("full", "t", 1.0)])
    (run / "summary.json").unlink()
    with pytest.raises(OptionError, match="is no finished run"):
        keep(run, tmp_path / "kept")
    assert script().main(["--add", str(run), "--docs", str(tmp_path)]) == 1
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "x.json").write_text("{}")
    with pytest.raises(OptionError, match=r"x\.json is no kept run"):
        kept_runs(tmp_path / "results")
