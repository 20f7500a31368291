"""Recall curves: the figures of every layer, what is averaged, and what a run leaves behind."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

import flexselect
from flexselect import FlexSelect
from flexselect.cli import app
from flexselect.core.errors import OptionError
from flexselect.core.metrics import precision_at_k, recall_at_k
from flexselect.inference.scoring import score_layers
from flexselect.testbed.locate import checkpoint_folder
from flexselect.testbed.videos import NeedleVideo
from flexselect.tests.paths import SMALL_MEDIA
from flexselect.visualization import measuring
from flexselect.visualization.asked import ask_layers
from flexselect.visualization.needles import generated_videos, needle_tokens
from flexselect.visualization.recall import AGGREGATIONS, Rows, estimate, measure, summarise

from .conftest import BUDGET, loaded


def test_every_layer_is_what_flexselect_scores_there(
    opened: flexselect.Video, needle_video: NeedleVideo
) -> None:
    question = needle_video.questions[0]
    row = measure(opened, question)
    asked = ask_layers(opened, question.text)
    needle = needle_tokens(opened, question)
    architecture = opened.engine.architecture
    together = score_layers(
        asked.prompt,
        asked.sets,
        asked.features,
        asked.scorer,
        layers=range(6),
        aggregations=AGGREGATIONS,
    )
    assert row["ks"] == {"budget": BUDGET, "frame": 4}
    for layer in range(6):
        for aggregation in AGGREGATIONS:
            method = FlexSelect(budget=BUDGET, layer=layer, aggregation=aggregation)
            method = method.resolve(architecture, opened.engine.preset.method)
            _, scores = method.keep(asked.encoded, architecture)
            assert scores is not None
            assert torch.equal(scores, together[layer, aggregation])
            for k, value in row["ks"].items():
                recall, precision = row["recall"][aggregation][k], row["precision"][aggregation][k]
                assert recall[layer] == recall_at_k(scores, needle, value)
                assert precision[layer] == precision_at_k(scores, needle, value)


def test_the_question_is_asked_as_ask_asks_it(
    opened: flexselect.Video, needle_video: NeedleVideo, answered: flexselect.Answer
) -> None:
    asked = ask_layers(opened, needle_video.questions[0].text)
    method = opened.engine.method
    assert isinstance(method, FlexSelect)
    assert method.layer is not None
    found = score_layers(
        asked.prompt,
        asked.sets,
        asked.features,
        asked.scorer,
        layers=[method.layer],
        aggregations=["max"],
    )
    assert answered.selection.scores is not None
    assert torch.equal(found[method.layer, "max"], answered.selection.scores)


def test_needle_tokens_are_the_cells_of_the_sidecar(
    opened: flexselect.Video, opened_with_tags: flexselect.Video, needle_video: NeedleVideo
) -> None:
    for question in needle_video.questions:
        [spot] = question.needles
        assert spot.row is not None
        assert spot.column is not None
        cell = 2 * spot.row + spot.column
        # Two pictures a frame: the scene is one frame.
        pairs = {4 * (frame // 2) + cell for frame in spot.frames}
        assert set(needle_tokens(opened, question).nonzero()[:, 0].tolist()) == pairs
        # A tag before and after each frame's four tokens.
        single = {6 * frame + 1 + cell for frame in spot.frames}
        assert set(needle_tokens(opened_with_tags, question).nonzero()[:, 0].tolist()) == single


def row(name: str, video: str, recall: list[float], needle: int = 2) -> dict[str, Any]:
    """Make a row of 100 tokens with the same figures for either aggregation and K."""
    figures = {a: {"budget": recall, "frame": recall} for a in AGGREGATIONS}
    return {
        "id": name,
        "video": video,
        "ks": {"budget": 10, "frame": 4},
        "visual": 100,
        "needle": needle,
        "recall": figures,
        "precision": {a: {k: [r / 4 for r in recall] for k in f} for a, f in figures.items()},
    }


def test_videos_count_once_however_many_their_questions() -> None:
    rows = [
        row("a#0", "a", [1.0, 0.0]),
        row("a#1", "a", [1.0, 0.0]),
        row("a#2", "a", [1.0, 0.0]),
        row("b#0", "b", [0.0, 1.0]),
    ]
    curves = summarise(rows)
    assert [point.recall.mean for point in curves.of("max", "budget")] == [0.5, 0.5]
    assert (curves.videos, curves.questions) == (2, 4)
    assert curves.chance == {"budget": 0.1, "frame": 0.04}
    assert curves.most_precise == 0.5


def test_the_lowest_of_equal_layers_is_recommended_and_rivals_are_named() -> None:
    recalls = [[0.0, 0.9, 0.5, 0.9, 1.0 if i % 2 else 0.7] for i in range(20)]
    curves = summarise([row(f"{i}#0", str(i), recall) for i, recall in enumerate(recalls)])
    assert (curves.layer, curves.aggregation) == (1, "max")
    assert curves.best.recall.mean == pytest.approx(0.9)
    # Layer 3 is the same, layer 4 is lower by less than chance may do; 0 and 2 are lower for sure.
    assert curves.rivals == (3, 4)


def test_rows_that_measure_nothing_are_named_and_not_averaged() -> None:
    empty = {"id": "c#0", "video": "c", "left_out": "the needle is in no picture"}
    curves = summarise([row("a#0", "a", [0.25]), empty])
    assert curves.best.recall.mean == 0.25
    assert curves.left_out == {"c#0": "the needle is in no picture"}
    with pytest.raises(OptionError, match="Nothing could be measured: the needle is in no picture"):
        summarise([empty])


def test_the_interval_is_wilsons() -> None:
    found = estimate([1.0] * 8 + [0.0] * 2)
    assert found.mean == 0.8
    # (0.8 + z²/20 ± z·sqrt(0.016 + z²/400)) / (1 + z²/10) with z = 1.96.
    assert found.low == pytest.approx(0.4902, abs=1e-4)
    assert found.high == pytest.approx(0.9433, abs=1e-4)
    certain = estimate([1.0] * 10)
    assert certain.high == 1.0
    assert 0.6 < certain.low < 1.0
    scaled = estimate([0.2] * 8 + [0.0] * 2, 0.2)
    assert scaled.high == pytest.approx(0.2 * found.high)


def test_rows_survive_an_interruption(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    Rows(path, {"k": 1}).add({"id": "a", "value": 1})
    with path.open("a") as file:
        file.write('{"id": "b", "val')
    again = Rows(path, {"k": 1})
    assert "a" in again
    assert "b" not in again
    again.add({"id": "b", "value": 2})
    assert [row["value"] for row in Rows(path, {"k": 1}).of(["b", "a"])] == [2, 1]
    with pytest.raises(OptionError, match=r"other settings \(k differ\)"):
        Rows(path, {"k": 2})


def test_a_measurement_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    videos = generated_videos(tmp_path / "videos", frames=16, count=3)
    model, processor = loaded("qwen2_5_vl")
    method = FlexSelect(budget=8)
    opened: list[Path] = []
    original = measuring.open_video

    def counting(model: Any, processor: Any, path: Path, **options: Any) -> Any:
        opened.append(path)
        if len(opened) == 3:
            raise KeyboardInterrupt
        return original(model, processor, path, **options)

    monkeypatch.setattr(measuring, "open_video", counting)

    def run(folder: Path) -> Any:
        return measuring.measure_recall(model, processor, videos, folder, method=method, frames=16)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out")
    assert not (tmp_path / "out" / "recall.json").exists()
    resumed = run(tmp_path / "out")
    assert [path.name for path in opened[3:]] == [videos[2].path.name]
    assert run(tmp_path / "whole") == resumed


def test_other_weights_in_the_same_folder_are_another_measurement(tmp_path: Path) -> None:
    [video] = generated_videos(tmp_path / "videos", frames=16, count=1)
    folder = tmp_path / "model"
    shutil.copytree(checkpoint_folder("qwen2_5_vl"), folder)
    processor = flexselect.load_processor(folder)

    def run() -> Any:
        model = flexselect.load_model(folder)
        options: dict[str, Any] = {"method": FlexSelect(budget=8), "frames": 16}
        return measuring.measure_recall(model, processor, [video], tmp_path / "out", **options)

    assert run() == run()
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-7] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(OptionError, match=r"other settings \(weights differ\)"):
        run()


def recall(*options: Any) -> Result:
    return CliRunner().invoke(app, ["recall", "--quiet", *map(str, options)])


def test_the_command_writes_curves_that_agree_and_recommends(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = recall("--count", 2, "--frames", 48, "--budget", 12, "--out", out)
    assert result.exit_code == 0, result.stderr
    told = json.loads((out / "recall.json").read_text())
    best = told["recommended"]
    assert f"Read layer {best['layer']} with {best['aggregation']}: recall@12" in result.stdout
    assert told["k"] == {"budget": 12, "frame": 4}
    with (out / "recall.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(told["layers"]) == 6 * 2 * 2
    for line, point in zip(table, told["layers"], strict=True):
        assert (int(line["layer"]), line["aggregation"]) == (point["layer"], point["aggregation"])
        assert float(line["recall"]) == pytest.approx(point["recall"]["mean"], abs=1e-4)
        assert float(line["precision_high"]) == pytest.approx(point["precision"]["high"], abs=1e-4)
    # Other seeds put needles elsewhere.
    assert recall("--count", 1, "--frames", 48, "--seed", 1, "--out", tmp_path / "b").exit_code == 0
    first = {path.name for path in (out / "videos").glob("*.mp4")}
    assert first.isdisjoint(path.name for path in (tmp_path / "b" / "videos").glob("*.mp4"))


def test_pictures_hidden_in_real_videos_are_measured(tmp_path: Path) -> None:
    """The V-NIAH format; the needle is every token of its frame."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    noise = np.random.RandomState(0).randint(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(pictures / "noise.png")
    listing = [{"path": "noise.png", "prompt": "What number is on the red star?", "answer": "7"}]
    (pictures / "dataset.json").write_text(json.dumps(listing))
    haystack = tmp_path / "haystack"
    haystack.mkdir()
    (haystack / "talk.mp4").write_bytes((SMALL_MEDIA / "h265_video.mp4").read_bytes())
    hidden = ["--needles", pictures, "--videos", haystack, "--frames", 8, "--budget", 4]
    result = recall(*hidden, "--count", 2, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert [row["needle"] for row in rows[1:]] == [4, 4]
    assert rows[1]["visual"] == 16


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--needles", "somewhere"], "name a folder of them with --videos"),
        (["--videos", SMALL_MEDIA], "no needle videos there"),
        (["--videos", "nowhere"], "nowhere is no folder"),
        (["--count", 1, "--frames", 8, "--budget", 64], "covers all 16 visual tokens"),
        (["--model", "x", "--family", "qwen"], "leave it out where --model is given"),
        (["--family", "lama"], "no model family 'lama'"),
    ],
)
def test_what_cannot_be_measured_is_said(tmp_path: Path, options: list[Any], said: str) -> None:
    result = recall(*options, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert said in result.stderr


def test_a_number_below_its_least_is_named(tmp_path: Path) -> None:
    """Counted from the end, all videos but the last would be measured."""
    result = recall("--videos", tmp_path, "--count", -1)
    assert result.exit_code == 2
    assert "--count" in result.stderr


def test_results_that_cannot_be_written_cost_no_measurement(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = recall("--model", tmp_path / "none", "--out", tmp_path / "file" / "out")
    assert result.exit_code == 1
    assert f"cannot write to {tmp_path / 'file'}" in result.stderr


@pytest.mark.parametrize("command", [["recall"], ["show", SMALL_MEDIA / "h265_video.mp4", "What?"]])
def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, command: list[Any]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = CliRunner().invoke(app, list(map(str, command)))
    assert result.exit_code == 1
    assert "pip install 'flexselect[show]'" in result.stderr
