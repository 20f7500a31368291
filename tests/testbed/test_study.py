"""The study: cells are counted once, resumed where they stopped, and void when knobs change."""

import json
import shutil

import pytest

from flexselect.core.errors import CheckpointError
from flexselect.core.selection import Moment
from flexselect.inference.methods import FlexSelect, Full, Random
from flexselect.scripts import testbed_study as study_module
from flexselect.scripts.testbed_study import Cell, Clips, Study, layer_cells, table_cells
from flexselect.scripts.testbed_tables import interval, write_report
from flexselect.testbed.locate import checkpoint_folder
from flexselect.testbed.questions import RETRIEVAL
from flexselect.testbed.videos import NeedleSpot

CLIPS = Clips("validation", 32, 3, RETRIEVAL)
CELLS = [
    Cell("all tokens", CLIPS, Full()),
    Cell("all tokens, another video's question", CLIPS, Full(), control="shuffled"),
    Cell("random tokens", CLIPS, Random(budget=8)),
    Cell("training-free", CLIPS, FlexSelect(budget=16)),
    Cell("first only", CLIPS, FlexSelect(budget=16), ranks_only=True, limit=1),
]


def study(folder):
    return Study(
        "qwen2_5_vl",
        checkpoint_folder("qwen2_5_vl"),
        folder / "results.json",
        folder / "videos",
    )


def counted(folder):
    cells = json.loads((folder / "results.json").read_text())["qwen2_5_vl"]
    return {key: {**cell, "seconds": None} for key, cell in cells.items()}


def test_a_stopped_study_goes_on_and_counts_every_video_once(tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    study(whole).run(CELLS, "test")
    save = Study._save

    def stop_after_saving(self):
        save(self)
        raise KeyboardInterrupt

    for _ in range(CLIPS.count):
        with monkeypatch.context() as patch:
            patch.setattr(Study, "_save", stop_after_saving)
            with pytest.raises(KeyboardInterrupt):
                study(parts).run(CELLS, "test")
    study(parts).run(CELLS, "test")
    assert counted(parts) == counted(whole)
    cells = {key.rpartition("/")[2]: cell for key, cell in counted(whole).items()}
    assert {name: cell["asked"] for name, cell in cells.items()} == {
        "all tokens": 9,
        "all tokens, another video's question": 9,
        "random tokens": 9,
        "training-free": 9,
        "first only": 3,
    }
    # The tiny model reads 32 frames well, and nothing of what it was not shown.
    assert cells["all tokens"]["right"] >= 7
    assert cells["all tokens, another video's question"]["right"] <= 4
    assert cells["all tokens"]["kept_needle"] == 9
    assert cells["random tokens"]["kept_needle"] < cells["training-free"]["kept_needle"]
    assert cells["first only"]["right"] == 0
    assert cells["first only"]["recall"] > 0


def test_what_was_counted_with_other_knobs_is_void(tmp_path):
    clips = Clips("validation", 16, 1, ("number",))
    study(tmp_path).run([Cell("random tokens", clips, Random(budget=8))], "test")
    study(tmp_path).run([Cell("random tokens", clips, Random(budget=12))], "test")
    (cell,) = counted(tmp_path).values()
    assert (cell["videos"], cell["asked"], cell["kept"]) == (1, 1, 12)


def test_a_checkpoint_of_another_seed_is_listed_by_it_and_has_no_lite(tmp_path):
    other = tmp_path / "other"
    shutil.copytree(checkpoint_folder("qwen2_5_vl"), other)
    record = json.loads((other / "training.json").read_text())
    (other / "training.json").write_text(json.dumps({**record, "seed": 7}))
    clips = Clips("validation", 16, 1, ("number",))
    cells = [
        Cell("all tokens", clips, Full()),
        Cell("Lite", clips, FlexSelect(budget=8), lite=True),
    ]
    study(tmp_path).run(cells, "test")
    Study("qwen2_5_vl", other, tmp_path / "results.json", tmp_path / "videos").run(cells, "test")
    found = json.loads((tmp_path / "results.json").read_text())
    assert {name: len(counts) for name, counts in found.items()} == {
        "qwen2_5_vl": 2,
        "qwen2_5_vl, seed 7": 1,
    }
    (other / "training.json").unlink()
    with pytest.raises(CheckpointError, match=r"training\.json does not say what seed"):
        Study("qwen2_5_vl", other, tmp_path / "results.json", tmp_path / "videos")


@pytest.mark.parametrize(
    ("start", "end", "shows"),
    [(4.0, 5.0, True), (0.0, 4.5, True), (4.5, 9.0, True), (0.0, 4.0, False), (5.0, 6.0, False)],
)
def test_a_moment_shows_a_needle_that_is_on_screen_in_it(start, end, shows):
    # Pictures 8 and 9 of two a second are on screen from 4 to 5.
    needle = NeedleSpot((8, 9), 0, 0, "red star 3", "asked")
    moment = Moment(start, end, 1.0, 2)
    assert study_module._shows(moment, needle) is shows


def test_budgets_of_the_table_are_those_that_it_names():
    for cell in table_cells({"budget": 32}, 2):
        if cell.name.endswith("1/16"):
            assert cell.method.budget * 16 == cell.clips.frames * 2
    # A budget that is a sixteenth already is not measured twice.
    names = [c.name for c in table_cells({"budget": 64}, 2) if c.clips.frames == 512]
    assert not any(name.endswith("1/16") for name in names)
    assert len(names) == len(set(names)) + 2


def test_no_cell_is_looked_at_on_both_splits():
    for split in ("validation", "test"):
        assert {cell.clips.split for cell in layer_cells(6, split, 4)} == {split}


def test_intervals_hold_at_the_edges_and_narrow_with_more_questions():
    assert interval(0, 10)[0] == 0
    assert interval(10, 10)[1] == 1
    low, high = interval(95, 100)
    assert low < 0.95 < high
    # A textbook value of Wilson's interval.
    assert interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    wide, narrow = interval(9, 10), interval(900, 1000)
    assert narrow[1] - narrow[0] < (wide[1] - wide[0]) / 5


def test_the_report_has_every_cell_and_leaves_other_text_alone(tmp_path):
    study(tmp_path).run(CELLS[:4], "test")
    results = json.loads((tmp_path / "results.json").read_text())
    cells = results["qwen2_5_vl"]
    for key in list(cells):
        cells[key.replace("validation/32", "test/512")] = cells.pop(key)
    page = tmp_path / "page.md"
    page.write_text("Before.\n\n<!-- tables -->\nold\n<!-- end of tables -->\n\nAfter.\n")
    write_report(results, page)
    text = page.read_text()
    assert text.startswith("Before.\n")
    assert text.endswith("After.\n")
    assert "old" not in text
    for name in ("all tokens", "random tokens", "training-free"):
        right, asked = (cells[f"test/512/retrieval/{name}"][k] for k in ("right", "asked"))
        assert f"{right / asked:.3f}" in next(x for x in text.splitlines() if f"| {name} |" in x)
    write_report(results, page)
    assert page.read_text() == text


def test_the_command_writes_the_report_of_what_is_there(tmp_path):
    results, page = tmp_path / "r.json", tmp_path / "page.md"
    results.write_text("{}")
    arguments = ["--results", str(results), "--report", str(page)]
    assert study_module.main(arguments) == 0
    assert "<!-- tables -->" in page.read_text()
