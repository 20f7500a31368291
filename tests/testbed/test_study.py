"""The study: cells are counted once, resumed where they stopped, and void when knobs change."""

import json
import shutil
import threading

import pytest

from flexselect.core.errors import CheckpointError, OptionError
from flexselect.core.selection import Moment
from flexselect.inference.methods import FlexSelect, Full, Random
from flexselect.scripts import testbed_cells as cells_module
from flexselect.scripts import testbed_study as study_module
from flexselect.scripts.testbed_cells import Cell, Clips, knob_cells, layer_cells, table_cells
from flexselect.scripts.testbed_study import Study
from flexselect.scripts.testbed_tables import difference, interval, write_report
from flexselect.testbed.locate import checkpoint_folder, student_folder
from flexselect.testbed.questions import RETRIEVAL
from flexselect.testbed.videos import NeedleSpot, held

CLIPS = Clips("validation", 32, 3, RETRIEVAL)
CELLS = [
    Cell("all tokens", CLIPS, Full()),
    Cell("all tokens, another video's question", CLIPS, Full(), control="shuffled"),
    Cell("no video", CLIPS, Full(), control="blind"),
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

    def stop_after_saving(self, cells):
        save(self, cells)
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
        "no video": 9,
        "random tokens": 9,
        "training-free": 9,
        "first only": 3,
    }
    # The tiny model reads 32 frames well, and nothing of what it was not shown.
    assert cells["all tokens"]["right"] >= 7
    assert cells["all tokens, another video's question"]["right"] <= 4
    assert cells["no video"]["right"] <= 4
    assert cells["no video"]["visual"] == 0
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


def test_a_checkpoint_of_another_seed_is_listed_by_it_with_retrieval_alone(tmp_path):
    other = tmp_path / "other"
    shutil.copytree(checkpoint_folder("qwen2_5_vl"), other)
    record = json.loads((other / "training.json").read_text())
    (other / "training.json").write_text(json.dumps({**record, "seed": 7}))
    clips = Clips("validation", 16, 1, ("number",))
    cells = [
        Cell("all tokens", clips, Full()),
        Cell("Lite", clips, FlexSelect(budget=8), lite=True),
        Cell("all tokens", Clips("validation", 16, 1, ("count",)), Full()),
    ]
    study(tmp_path).run(cells, "test")
    Study("qwen2_5_vl", other, tmp_path / "results.json", tmp_path / "videos").run(cells, "test")
    found = json.loads((tmp_path / "results.json").read_text())
    assert {name: len(counts) for name, counts in found.items()} == {
        "qwen2_5_vl": 3,
        "qwen2_5_vl, seed 7": 1,
    }
    (other / "training.json").unlink()
    with pytest.raises(CheckpointError, match=r"training\.json does not say what seed"):
        Study("qwen2_5_vl", other, tmp_path / "results.json", tmp_path / "videos")
    for folder, reason in (
        (student_folder("qwen2_5_vl"), "holds a student"),
        (tmp_path / "nowhere", "is no folder"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            Study("qwen2_5_vl", folder, tmp_path / "results.json", tmp_path / "videos")


@pytest.mark.parametrize(
    ("start", "end", "shows"),
    [(4.0, 5.0, True), (0.0, 4.5, True), (4.5, 9.0, True), (0.0, 4.0, False), (5.0, 6.0, False)],
)
def test_a_moment_shows_a_needle_that_is_on_screen_in_it(start, end, shows):
    # Pictures 8 and 9 of two a second are on screen from 4 to 5.
    needle = NeedleSpot((8, 9), 0, 0, "red star 3", "asked")
    moment = Moment(start, end, 1.0, 2)
    assert study_module._shows(moment, needle) is shows


def test_what_another_checkpoint_or_counting_gave_leaves_the_file(tmp_path, monkeypatch):
    clips = Clips("validation", 16, 1, ("number",))
    cells = [Cell("all tokens", clips, Full()), Cell("random tokens", clips, Random(budget=8))]
    study(tmp_path).run(cells, "test")
    monkeypatch.setattr(study_module, "COUNTING", study_module.COUNTING + 1)
    study(tmp_path).run(cells[:1], "test")
    assert [key.rpartition("/")[2] for key in counted(tmp_path)] == ["all tokens"]


def test_what_one_process_has_counted_anew_another_does_not_take_for_void(tmp_path, monkeypatch):
    early, late = (Clips("validation", frames, 2, ("number",)) for frames in (16, 32))
    for clips in (early, late):
        study(tmp_path).run([Cell("all tokens", clips, Full())], "test")
    monkeypatch.setattr(study_module, "COUNTING", study_module.COUNTING + 1)
    first, second = study(tmp_path), study(tmp_path)
    second.run([Cell("all tokens", late, Full())], "test")
    first.run([Cell("all tokens", early, Full())], "test")
    assert {key: cell["videos"] for key, cell in counted(tmp_path).items()} == {
        "validation/16/retrieval/all tokens": 2,
        "validation/32/retrieval/all tokens": 2,
    }


def test_while_one_process_writes_results_another_waits(tmp_path):
    run = study(tmp_path)
    cell = Cell("all tokens", Clips("validation", 16, 1, ("number",)), Full())
    run.tallies[cell.key] = study_module.Tally(knobs=run._knobs(cell, run._engine(cell)))
    done = threading.Event()
    thread = threading.Thread(target=lambda: (run._save([cell]), done.set()))
    with held(tmp_path):
        thread.start()
        assert not done.wait(0.3)
    thread.join()
    assert list(counted(tmp_path)) == [cell.key]


def test_the_command_looks_at_layers_and_knobs_of_validation_videos(tmp_path, monkeypatch):
    monkeypatch.setattr(cells_module, "LENGTHS", (32,))
    results, page = tmp_path / "results.json", tmp_path / "page.md"
    arguments = ["--part", "knobs", "--family", "qwen2_5_vl", "--count", "1"]
    arguments += ["--results", str(results), "--videos", str(tmp_path / "videos")]
    assert study_module.main(arguments) == 0
    cells = json.loads(results.read_text())["qwen2_5_vl"]
    assert all(key.startswith("validation/32/retrieval/") for key in cells)
    names = {key.removeprefix("validation/32/retrieval/") for key in cells}
    assert {"positions original", "query last", "aggregation mean", "budget 256"} < names
    assert {f"layer {layer}, max of last" for layer in range(6)} < names
    assert {cell["asked"] for cell in cells.values()} == {6}
    moved = {key.replace("/32/", "/512/"): cell for key, cell in cells.items()}
    write_report({"qwen2_5_vl": moved}, page)
    lines = page.read_text().splitlines()
    assert sum(line.startswith(("| max of", "| mean of")) for line in lines) == 3
    assert any(line.startswith("| budget | 16 |") for line in lines)
    rows = [line for line in lines if line.startswith("| budget |")]
    assert [row.split("|")[2].strip() for row in rows if "| preset |" in row] == ["64"]
    assert all("preset" in row or " to " in row for row in rows)
    assert rows == sorted(rows, key=lambda row: int(row.split("|")[2]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--part to measure, --report to write"),
        (["--part", "table", "--count", "3"], "--count is for --part knobs"),
        (["--part", "knobs", "--count", "0"], "must be at least 1"),
        (["--part", "table", "--threads", "0"], "must be at least 1"),
        (["--part", "knobs", "--frames", "16"], "--frames is for --part table"),
        (["--report", "page.md", "--model", "folder"], "--model is what --part measures"),
        (["--part", "table", "--model", "folder"], "name its --family"),
    ],
)
def test_options_that_do_nothing_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        study_module.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_checkpoint_of_another_family_is_refused(tmp_path, caplog):
    arguments = ["--part", "table", "--family", "internvl"]
    arguments += ["--model", str(checkpoint_folder("llava_video")), "--results", "nowhere.json"]
    assert study_module.main(arguments) == 2
    assert "holds a llava_video. Say --family llava_video." in caplog.text


@pytest.mark.parametrize("content", ["{", "[]", '{"a": {"b": {"wrong": 1}}}', '{"a": 3}'])
def test_damaged_results_are_left_alone(content, tmp_path, caplog):
    results, page = tmp_path / "results.json", tmp_path / "page.md"
    results.write_text(content)
    assert study_module.main(["--results", str(results), "--report", str(page)]) == 2
    assert f"{results} does not hold results of this study" in caplog.text
    assert results.read_text() == content
    assert not page.exists()


def test_budgets_of_the_table_are_those_that_it_names():
    for cell in table_cells({"budget": 32}, 2):
        if cell.name.endswith("1/16"):
            assert cell.method.budget * 16 == cell.clips.frames * 2
    # A budget that is a sixteenth already is not measured twice.
    names = [c.name for c in table_cells({"budget": 64}, 2) if c.clips.frames == 512]
    assert not any(name.endswith("1/16") for name in names)
    assert len(names) == len(set(names)) + 2


def test_knobs_never_see_a_test_video_and_retrieval_is_measured_on_unseen_ones():
    knobs = [*layer_cells(6, "validation", 4), *knob_cells({"budget": 64}, 4)]
    assert {cell.clips.split for cell in knobs} == {"validation"}
    table = [*table_cells({"budget": 64}, 2), *layer_cells(6, "test", 4)]
    assert {cell.clips.split for cell in table} == {"test"}
    firsts = {"retrieval" in cell.key: cell.clips.first for cell in table}
    assert firsts == {True: cells_module.UNSEEN, False: 0}


def test_the_first_video_of_a_cell_decides_which_it_sees(tmp_path):
    for first in (0, 5):
        clips = Clips("validation", 16, 2, ("number",), first)
        study(tmp_path).run([Cell("all tokens", clips, Full())], "test")
        (cell,) = counted(tmp_path).values()
        assert (cell["videos"], cell["asked"], cell["knobs"]["first"]) == (2, 2, first)
    made = sorted(path.stem for path in (tmp_path / "videos").rglob("*.mp4"))
    # One more, whose question could be asked of the last.
    assert made == ["00000", "00001", "00002", "00005", "00006", "00007"]


def test_intervals_hold_at_the_edges_and_narrow_with_more_questions():
    assert interval(0, 10)[0] == 0
    assert interval(10, 10)[1] == 1
    low, high = interval(95, 100)
    assert low < 0.95 < high
    # A textbook value of Wilson's interval.
    assert interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    wide, narrow = interval(9, 10), interval(900, 1000)
    assert narrow[1] - narrow[0] < (wide[1] - wide[0]) / 5


def test_differences_are_of_the_same_questions():
    # Of 100 questions: 5 only ours, 2 only theirs.
    ours, theirs = "1" * 90 + "11111" + "00" + "000", "1" * 90 + "00000" + "11" + "000"
    found, low, high = difference(ours, theirs)
    assert found == pytest.approx(0.03)
    # (5 - 2 ± 1.96 √(8 - 9/102)) / 102
    assert (low, high) == pytest.approx((-0.0247, 0.0835), abs=1e-4)
    assert difference(theirs, ours) == pytest.approx((-found, -high, -low))
    alike = difference("1" * 50, "1" * 50)
    assert alike[0] == 0
    assert alike[1] < 0 < alike[2]


@pytest.mark.parametrize("page", ["<!-- tables -->\nmine", "mine\n<!-- end of tables -->"])
def test_a_page_with_half_of_the_marks_is_left_alone(page, tmp_path):
    path = tmp_path / "page.md"
    path.write_text(page)
    with pytest.raises(OptionError, match="Mend the marks"):
        write_report({}, path)
    assert path.read_text() == page


def test_the_report_has_every_cell_and_leaves_other_text_alone(tmp_path):
    study(tmp_path).run(CELLS[:5], "test")
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
