"""Training: what may not change its result does not, and what is killed goes on as if it had not.

The testbed's tiny Qwen2.5-VL teaches its student on a few rendered clips; every comparison is of
the weights and of the whole log.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import flexselect
from flexselect.core.errors import CheckpointError
from flexselect.inference.presets import preset_of
from flexselect.testbed.locate import checkpoint_folder
from flexselect.tests.paths import ROOT
from flexselect.training import trainer
from flexselect.training.accuracy import needle_videos
from flexselect.training.examples import read_examples
from flexselect.training.lessons import Tutor
from flexselect.training.rank import rank
from flexselect.training.recipe import Recipe, read_recipe
from flexselect.training.run import Trained, train
from flexselect.training.trainer import checkpoints, quality_of

FAMILY = "qwen2_5_vl"
SETTINGS = {
    "family": FAMILY,
    "source": "this test",
    "frames": 16,
    "frames_per_set": 4,
    "epochs": 2,
    "learning_rate": 1e-3,
    "samples_per_device": 2,
    "devices": 1,
    "bf16": False,
    "checkpointing": False,
    "hold_out": 3,
    "evaluate_every": 3,
    "workers": 0,
    "log_scores": True,
    "temperature": 0.3,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four clips of 16 pictures with three questions each: 9 samples to train on."""
    folder = tmp_path_factory.mktemp("clips")
    needle_videos(folder, split="train", frames=16, count=4, questions=3)
    return folder


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(yaml.safe_dump(SETTINGS))
    return path


def _train(recipe_file: Path, data: Path, out: Path, **changes: Any) -> Trained:
    options = {name: changes.pop(name) for name in ("scores", "progress") if name in changes}
    recipe: Recipe = read_recipe(recipe_file, **changes)
    examples = read_examples(data)
    return train(recipe, examples, out, device="cpu", dtype="float32", **options)


@pytest.fixture(scope="module")
def plain(recipe_file: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without anything special: 9 steps of 2 samples."""
    out = tmp_path_factory.mktemp("plain")
    assert _train(recipe_file, data, out).steps == 9
    return out


def _log(out: Path) -> list[dict[str, float]]:
    """Every row of the log of a run, without what depends on the clock."""
    _, last = checkpoints(out / "checkpoints")[-1]
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    timed = ("runtime", "per_second", "epoch")
    return [{k: v for k, v in row.items() if not any(t in k for t in timed)} for row in history]


def _weights(out: Path) -> dict[str, torch.Tensor]:
    _, last = checkpoints(out / "checkpoints")[-1]
    return load_file(last / "model.safetensors")


def _same_run(one: Path, other: Path, tolerance: float) -> None:
    first, second = _log(one), _log(other)
    assert [row["step"] for row in first] == [row["step"] for row in second]
    for mine, theirs in zip(first, second, strict=True):
        assert mine == pytest.approx(theirs, rel=tolerance, abs=tolerance)
    weights = _weights(other)
    for name, value in _weights(one).items():
        torch.testing.assert_close(value, weights[name], rtol=tolerance, atol=tolerance)


def _command(recipe_file: Path, data: Path, out: Path, *launcher: str) -> list[str]:
    return [
        sys.executable,
        *(launcher or (str(Path(sys.executable).with_name("flexselect")),)),
        *f"train-selector {FAMILY} --data {data} --recipe {recipe_file} --out {out}".split(),
        *["--device", "cpu", "--dtype", "float32", "--report-to", "none", "--quiet"],
    ]


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def test_training_teaches(plain):
    # The second epoch knows what the first has seen.
    losses = [row["loss"] for row in _log(plain) if "loss" in row]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


def test_accumulated_batches_equal_one_larger_batch(plain, recipe_file, data, tmp_path):
    _train(recipe_file, data, tmp_path, samples_per_device=1, accumulation=2)
    # Two halves are summed in another order than their whole.
    _same_run(plain, tmp_path, 1e-3)


def test_checkpointing_changes_nothing(plain, recipe_file, data, tmp_path, monkeypatch):
    again = []
    recompute = trainer.checkpoint

    def count(*inputs: Any, **options: Any) -> Any:
        again.append(inputs[0])
        return recompute(*inputs, **options)

    monkeypatch.setattr(trainer, "checkpoint", count)
    _train(recipe_file, data, tmp_path, checkpointing=True)
    assert again
    _same_run(plain, tmp_path, 1e-6)


def test_remembered_lessons_change_nothing_but_the_order(plain, recipe_file, data, tmp_path):
    from flexselect.training import run

    drawn = run.order
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "order", lambda samples, recipe: drawn(samples, _uncached(recipe)))
        _train(recipe_file, data, tmp_path, cache=True)
    _same_run(plain, tmp_path, 1e-6)


def _uncached(recipe: Recipe) -> Recipe:
    from dataclasses import replace

    return replace(recipe, cache=False)


def test_stored_scores_teach_as_the_teacher_itself(plain, recipe_file, data, tmp_path):
    folder = checkpoint_folder(FAMILY)
    rank(
        flexselect.load_model(folder, dtype="float32", device="cpu"),
        flexselect.load_processor(folder),
        read_examples(data),
        tmp_path / "scores",
        sampling={"frames": 16},
        frames_per_set=4,
    )
    _train(recipe_file, data, tmp_path / "out", scores=tmp_path / "scores")
    _same_run(plain, tmp_path / "out", 1e-6)


def test_workers_change_nothing_and_each_video_is_encoded_once(
    plain, recipe_file, data, tmp_path, monkeypatch
):
    encoded = []
    encode = Tutor._encode
    monkeypatch.setattr(
        Tutor, "_encode", lambda self, pixels: encoded.append(1) or encode(self, pixels)
    )
    _train(recipe_file, data, tmp_path, workers=2)
    assert len(encoded) == 4
    _same_run(plain, tmp_path, 1e-6)
    # Who decodes is no part of what a run is.
    assert _train(recipe_file, data, tmp_path, workers=0).steps == 9


def test_a_killed_run_goes_on_as_if_nothing_had_been(plain, recipe_file, data, tmp_path):
    process = subprocess.Popen(
        _command(recipe_file, data, tmp_path), env=_environment(), stderr=subprocess.DEVNULL
    )
    first = tmp_path / "checkpoints" / "checkpoint-3"
    while not first.exists():
        assert process.poll() is None, "ended before its first checkpoint"
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (tmp_path / "model.safetensors").exists()
    # What a kill in the middle of a checkpoint leaves behind.
    (tmp_path / "checkpoints" / ".partial" / "checkpoint-6").mkdir(parents=True, exist_ok=True)
    done = [step for step, _ in checkpoints(tmp_path / "checkpoints")]
    trained = _train(recipe_file, data, tmp_path)
    assert done
    assert done[-1] < 9
    assert trained.steps == 9
    _same_run(plain, tmp_path, 1e-6)


#: The command, without the messages through shared memory that DeepSpeed compiles for CPUs.
_PLAIN_MESSAGES = """
from deepspeed import ops
from flexselect.cli import main
ops.__compatible_ops__["deepspeed_shm_comm"] = False
main()
"""


def _two_processes(data: Path, folder: Path, *options: str, script: Path | None = None) -> Path:
    """Train with half of the samples of a step in each of two processes, with gloo."""
    halves = folder / "recipe.yaml"
    halves.write_text(yaml.safe_dump({**SETTINGS, "samples_per_device": 1}))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    program = str(script or Path(sys.executable).with_name("flexselect"))
    done = subprocess.run(
        [*_command(halves, data, folder / "out", *launcher, program), *options],
        env={
            **_environment(),
            "DS_ACCELERATOR": "cpu",
            # Whatever is compiled after all shows here.
            "TORCH_EXTENSIONS_DIR": str(folder / "compiled"),
        },
        stderr=subprocess.PIPE,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr.decode()
    return folder / "out"


def test_two_processes_equal_one(plain, data, tmp_path):
    _same_run(plain, _two_processes(data, tmp_path), 1e-3)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_deepspeed_shards_learns_the_same(stage, plain, data, tmp_path):
    pytest.importorskip("deepspeed")
    config = ROOT / "shared_configs" / "deepspeed" / f"zero{stage}.json"
    script = tmp_path / "train.py"
    script.write_text(_PLAIN_MESSAGES)
    out = _two_processes(data, tmp_path, "--deepspeed", str(config), script=script)
    assert not (tmp_path / "compiled").exists()
    ours, theirs = ([r for r in _log(run) if "grad_norm" in r] for run in (plain, out))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-3, abs=1e-3)
    weights = _weights(out)
    for name, value in _weights(plain).items():
        torch.testing.assert_close(value, weights[name], rtol=1e-3, atol=1e-3)


def test_a_finished_run_is_not_trained_again_and_another_one_is_refused(
    recipe_file, data, tmp_path
):
    spent = []

    def look(stage: str, step: int, steps: int) -> None:
        spent.append(json.loads((tmp_path / "run.json").read_text()).get("seconds", 0))

    first = _train(recipe_file, data, tmp_path, epochs=1.0, progress=look)
    # After the checkpoint of step 3 a kill loses no more than the time since then.
    assert [seconds > 0 for seconds in spent] == [False, False, False, True]
    stamp = (checkpoints(tmp_path / "checkpoints")[-1][1] / "model.safetensors").stat().st_mtime_ns
    second = _train(recipe_file, data, tmp_path, epochs=1.0)
    assert second.metrics == first.metrics
    assert second.seconds == first.seconds
    again = (checkpoints(tmp_path / "checkpoints")[-1][1] / "model.safetensors").stat().st_mtime_ns
    assert again == stamp
    with pytest.raises(CheckpointError, match="learning_rate"):
        _train(recipe_file, data, tmp_path, epochs=1.0, learning_rate=2e-3)


def test_the_best_selector_is_kept_and_serves_its_model(plain):
    log = [row for row in _log(plain) if "eval_recall_at_k" in row]
    best = max(log, key=lambda row: row["eval_recall_at_k"])
    kept = dict(checkpoints(plain / "checkpoints"))
    assert set(kept) == {int(best["step"]), 9}
    model = flexselect.load_model(checkpoint_folder(FAMILY), dtype="float32", device="cpu")
    selector = flexselect.load_selector(plain, model)
    stored = load_file(kept[int(best["step"])] / "model.safetensors")
    for name, value in selector.state_dict().items():
        assert torch.equal(value, stored[name].bfloat16().float()), name
    preset = preset_of(flexselect.architecture_of(model))
    assert selector.config.teacher_layer == preset.method["layer"]


def test_a_damaged_video_is_left_out_and_named(recipe_file, data, tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    for file in data.iterdir():
        os.symlink(file, folder / file.name)
    rotten = sorted(folder.glob("*.mp4"))[1]
    rotten.unlink()
    rotten.write_bytes(b"no video at all")
    # What a worker finds must reach the process that counts.
    trained = _train(recipe_file, folder, tmp_path / "out", epochs=1.0, workers=2)
    assert trained.steps == 4
    [reason] = trained.damaged
    assert rotten.name in reason


def test_quality_tells_the_top_from_the_bulk():
    target = torch.linspace(0, 1, 32)[None]
    [perfect] = quality_of(target * 2 - 5, target, 1 / 8)
    assert tuple(perfect) == pytest.approx((1, 1, 1))
    swapped = target.clone()
    swapped[0, -1] = -1
    [off] = quality_of(swapped, target, 1 / 8)
    assert off.recall_at_k == 3 / 4
    assert off.top_1_recall == 0
    assert 0.8 < off.spearman < 1
