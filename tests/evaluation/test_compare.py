"""Runs side by side: the statistics against enumeration, the pairing, and what is flagged."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from flexselect.cli import app
from flexselect.core.errors import OptionError
from flexselect.evaluation.compare import compare, markdown
from flexselect.evaluation.pairing import holm, mcnemar, paired

# Statistics --------------------------------------------------------------------------------------


@given(st.integers(0, 5), st.integers(0, 5))
def test_mcnemar_is_the_share_of_coin_tosses_as_uneven(gained: int, lost: int) -> None:
    total = gained + lost
    uneven = [
        tosses
        for tosses in itertools.product((0, 1), repeat=total)
        if abs(2 * sum(tosses) - total) >= abs(gained - lost)
    ]
    assert mcnemar(gained, lost) == pytest.approx(len(uneven) / 2**total)


def test_mcnemar_of_thousands_of_samples_is_a_number() -> None:
    assert mcnemar(1500, 1500) == 1
    assert 0 < mcnemar(900, 700) < 1e-6
    assert mcnemar(2000, 100) == pytest.approx(0, abs=1e-100)


def test_holm_is_bonferroni_for_the_smallest_and_never_turns_the_order() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([]) == []


bits = st.sampled_from([0, 1])
scores = st.lists(st.tuples(bits, bits), min_size=1, max_size=12)


@settings(max_examples=30)
@given(scores)
def test_to_swap_the_two_is_to_turn_the_signs(pairs: list[tuple[int, int]]) -> None:
    first, second = [p[0] for p in pairs], [p[1] for p in pairs]
    one = paired(first, second, range(len(pairs)))
    other = paired(second, first, range(len(pairs)))
    assert one.difference == -other.difference
    assert (one.gained, one.lost, one.p) == (other.lost, other.gained, other.p)
    assert one.exact
    if None not in (one.low, one.high):
        assert one.low is not None
        assert one.high is not None
        assert other.low is not None
        assert other.high is not None
        assert one.low <= one.difference <= one.high
        assert (one.low, one.high) == pytest.approx((-other.high, -other.low), abs=0.15)


def test_samples_of_one_video_are_drawn_together() -> None:
    # Ten videos with ten samples each that change alike: ten draws, not a hundred.
    change = [1, 1, 1, 1, 1, 1, 1, 0, 0, 0]
    second = [value for value in change for _ in range(10)]
    first = [0] * 100
    apart = paired(first, second, range(100))
    together = paired(first, second, [i // 10 for i in range(100)])
    assert apart.low is not None
    assert apart.high is not None
    assert together.low is not None
    assert together.high is not None
    assert (together.clusters, apart.clusters) == (10, 100)
    # The error grows by the square root of ten.
    ratio = (together.high - together.low) / (apart.high - apart.low)
    assert ratio == pytest.approx(10**0.5, rel=0.15)


@pytest.mark.parametrize(
    ("first", "second", "videos"), [([0, 0], [1, 0], "aa"), ([0, 1], [0, 1], "ab"), ([0], [1], "a")]
)
def test_where_draws_cannot_differ_there_is_no_interval(
    first: list[int], second: list[int], videos: str
) -> None:
    found = paired(first, second, videos)
    assert (found.low, found.high) == (None, None)


def test_scores_between_are_tested_by_flipping_signs() -> None:
    first, second = [0.0, 0.5, 0.2, 0.3, 0.0], [0.5, 0.75, 0.1, 0.9, 0.4]
    change = [b - a for a, b in zip(first, second, strict=True)]
    flips = [
        abs(sum(s * c for s, c in zip(signs, change, strict=True)))
        for signs in itertools.product((1, -1), repeat=5)
    ]
    wanted = sum(flip >= abs(sum(change)) - 1e-12 for flip in flips) / 32
    found = paired(first, second, range(5))
    assert not found.exact
    assert found.p == pytest.approx(wanted, abs=0.02)


# Runs --------------------------------------------------------------------------------------------


def sample(task: str, doc_id: int, score: float | None, **other: Any) -> dict[str, Any]:
    video = f"/data/{doc_id // 2}.mp4"
    row = {"task": task, "doc_id": doc_id, "score": score, "target": "A", "videos": [video]}
    return {**row, "error": None, **other}


def make_run(
    folder: Path,
    methods: Mapping[str, Mapping[str, Sequence[dict[str, Any]]]],
    missing: Mapping[str, str] | None = None,
    knobs: Mapping[str, Any] | None = None,
    **record: Any,
) -> Path:
    """Write what `flexselect eval` leaves that a comparison reads."""
    folder.mkdir(parents=True)
    rows = []
    for method, tasks in methods.items():
        (folder / method).mkdir()
        lines = [json.dumps({"method": method, **s}) for each in tasks.values() for s in each]
        # The order of samples means nothing.
        (folder / method / "samples.jsonl").write_text("".join(f"{s}\n" for s in lines[::-1]))
        rows += [summary(method, task, samples) for task, samples in tasks.items()]
    for method, reason in (missing or {}).items():
        empty = dict.fromkeys(("accuracy", "stderr", "frames", "visual_tokens", "ttft_s"))
        row = {"method": method, "task": rows[0]["task"], "samples": 0, "failed": 0, **empty}
        rows.append({**row, "note": reason})
    kept = {
        method: {
            "settings": {"method": method, "budget": 64, "dtype": "bfloat16", **(knobs or {})},
            "prompts": {task: {"settings": {"post_prompt": "?"}} for task in tasks},
        }
        for method, tasks in methods.items()
    }
    content = {"decides": {"limit": None}, "machine": {"cpu": "x86"}, "methods": kept, **record}
    (folder / "run.json").write_text(json.dumps(content))
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "summary.json").write_text("[]")
    return folder


def summary(method: str, task: str, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    values = [s["score"] for s in samples if s["score"] is not None]
    return {
        "method": method,
        "task": task,
        "samples": len(samples),
        "failed": sum(s["error"] is not None for s in samples),
        "accuracy": sum(values) / len(values),
        "stderr": None,
        "frames": 512.0,
        "visual_tokens": 107520.0,
        "kept_tokens": 6720.0,
        "ttft_s": 1.25,
        "note": None,
    }


def samples_of(task: str, values: Sequence[float | None]) -> list[dict[str, Any]]:
    return [sample(task, i, value) for i, value in enumerate(values)]


def test_methods_are_paired_by_sample_whatever_their_order(tmp_path: Path) -> None:
    ours, theirs = [1, 1, 1, 0, 1, 1], [0, 0, 1, 1, 0, 0]
    run = make_run(
        tmp_path / "run",
        {"full": {"t": samples_of("t", theirs)}, "flexselect": {"t": samples_of("t", ours)}},
    )
    [pair] = compare([run]).pairs
    assert (pair.first, pair.second) == ("full", "flexselect")
    assert pair.result is not None
    assert (pair.result.gained, pair.result.lost, pair.result.samples) == (4, 1, 6)
    assert pair.result.clusters == 3
    assert pair.result.p == pytest.approx(0.375)
    page = markdown(compare([run]))
    assert "| full | 6 | 512 | 107,520 → 6,720 | 0.333 ±" in page
    assert "| flexselect | full | 6 (3 videos) | 4 | 1 | +0.500 [" in page
    assert "| 0.3750 | 0.3750 |" in page
    assert "Apart from the methods' own settings the runs are alike." in page


def test_any_method_may_be_the_baseline_and_each_keeps_its_own_p(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "run",
        {
            "full": {"s": samples_of("s", [0] * 8), "t": samples_of("t", [1] * 8)},
            "random": {"t": samples_of("t", [0] * 8), "s": samples_of("s", [0] * 8)},
        },
    )
    page = markdown(compare([run], against="random"))
    first, second = page.split("## t")
    assert "| full | random | 8 (4 videos) | 0 | 0 | +0.000 | 1.0000 | 1.0000 |" in first
    assert "| full | random | 8 (4 videos) | 8 | 0 | +1.000 | 0.0078 | 0.0156 |" in second


def test_runs_of_the_same_method_are_told_apart_by_folder(tmp_path: Path) -> None:
    rows = {"flexselect": {"t": samples_of("t", [1, 0])}}
    runs = [make_run(tmp_path / family / "1", rows) for family in ("a", "b")]
    (tmp_path / "latest").symlink_to("a/1")
    found = compare([*runs, tmp_path / "latest"])
    assert [each.label for each in found.contenders] == ["flexselect @ a/1", "flexselect @ b/1"]


def test_local_rows_are_paired_with_those_of_the_hub(tmp_path: Path) -> None:
    one = make_run(tmp_path / "1", {"full": {"videomme": samples_of("videomme", [1, 0])}})
    rows = samples_of("videomme_local", [1, 1])
    for row in rows:
        row["videos"] = [video.replace("/data", "/elsewhere") for video in row["videos"]]
    two = make_run(tmp_path / "2", {"uniform": {"videomme_local": rows}})
    [pair] = compare([one, two]).pairs
    assert pair.task == "videomme"
    assert pair.result is not None
    assert pair.result.samples == 2


def test_what_cannot_be_paired_is_left_out_and_counted(tmp_path: Path) -> None:
    theirs = samples_of("t", [1, 1, 1, None, 0])
    ours = samples_of("t", [0, 1, 1, 1])
    ours[1]["target"] = "B"
    ours[2].update(score=0, error="no such file")
    run = make_run(tmp_path / "run", {"full": {"t": theirs}, "random": {"t": ours}})
    [pair] = compare([run]).pairs
    assert pair.result is not None
    assert (pair.result.samples, pair.result.lost) == (1, 1)
    page = markdown(compare([run]))
    for reason in (
        "asked in one run only",
        "of another question in the two runs",
        "without a usable video in one or both",
        "without a score",
    ):
        assert f"random against full: 1 samples left out, {reason}." in page
    assert "(1 without video)" in page


def test_without_a_shared_sample_nothing_is_claimed(tmp_path: Path) -> None:
    later = [sample("t", 9, 1)]
    run = make_run(tmp_path / "run", {"full": {"t": samples_of("t", [1])}, "random": {"t": later}})
    assert "| random | full | 0 |  |  | no shared sample |" in markdown(compare([run]))


def test_settings_besides_the_method_that_differ_are_flagged(tmp_path: Path) -> None:
    rows = samples_of("t", [1, 0])
    alike = {"preset_video": {"frames": 512}, "checkpoint": "abc"}
    one = make_run(tmp_path / "1", {"full": {"t": rows}}, knobs={**alike, "budget": 1})
    two = make_run(tmp_path / "2", {"uniform": {"t": rows}}, knobs={**alike, "budget": 2})
    assert compare([one, two]).differences == {}, "the budget is what is compared"

    changed = {
        "preset_video": {"frames": 64},
        "checkpoint": "def",
        "versions": {"torch": "2.11"},
    }
    three = make_run(
        tmp_path / "3",
        {"random": {"t": rows}},
        knobs=changed,
        decides={"limit": 10},
        machine={"gpus": ["H200"]},
    )
    found = compare([one, two, three]).differences
    assert set(found) == {"preset_video", "checkpoint", "limit", "machine (times only)"}
    page = markdown(compare([one, two, three]))
    assert "differ in more than their methods" in page
    line = '- preset_video: `{"frames": 512}` (full, uniform); `{"frames": 64}` (random)'
    assert line in page


def test_another_prompt_is_flagged(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / method, {method: {"t": samples_of("t", [1])}})
        for method in ("full", "uniform")
    ]
    record = json.loads((runs[1] / "run.json").read_text())
    record["methods"]["uniform"]["prompts"]["t"]["settings"]["post_prompt"] = "!"
    (runs[1] / "run.json").write_text(json.dumps(record))
    assert set(compare(runs).differences) == {"prompt of t"}


def test_a_method_that_was_not_run_says_why(tmp_path: Path) -> None:
    rows = samples_of("t", [1, 0])
    run = make_run(
        tmp_path / "run",
        {"full": {"t": rows}, "random": {"t": rows}},
        missing={"flexselect-lite": "There is no selector."},
    )
    page = markdown(compare([run]))
    assert "| flexselect-lite |  |  |  | not run: There is no selector. |" in page
    assert "| flexselect-lite | full |" not in page
    with pytest.raises(OptionError, match="it has not been run"):
        compare([run], against="flexselect-lite")


# Errors ------------------------------------------------------------------------------------------


def test_folders_that_are_no_runs_are_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "base" / "run", {"full": {"t": samples_of("t", [1])}})
    with pytest.raises(OptionError, match=r"nowhere is no run: there is no readable run\.json"):
        compare([tmp_path / "nowhere"])
    with pytest.raises(OptionError, match="Name one of the runs in it"):
        compare([tmp_path / "base"])
    with pytest.raises(OptionError, match="only one method in all"):
        compare([run, run])
    other = make_run(tmp_path / "other", {"full": {"u": samples_of("u", [1])}})
    with pytest.raises(OptionError, match="shares no task with the others: it has t"):
        compare([run, other])
    with pytest.raises(OptionError, match="--against 'best' is none of full @ run, full @ other"):
        compare([run, other], against="best")
    (run / "full" / "samples.jsonl").write_text('{"task": "t"')
    with pytest.raises(OptionError, match=r"samples\.jsonl cannot be read"):
        compare([run, other])
    (run / "summary.json").unlink()
    with pytest.raises(OptionError, match="has not finished"):
        compare([run])
    (run / "run.json").write_text("[]")
    with pytest.raises(OptionError, match="is no run"):
        compare([run])


def test_the_command_prints_and_writes_the_page(tmp_path: Path) -> None:
    rows = samples_of("t", [1, 0])
    run = make_run(tmp_path / "run", {"full": {"t": rows}, "random": {"t": rows}})
    page = tmp_path / "page.md"
    done = CliRunner().invoke(app, ["compare", str(run), "--out", str(page)])
    assert done.exit_code == 0, done.output
    assert page.read_text() == markdown(compare([run]))
    assert "| random | full |" in done.output

    done = CliRunner().invoke(app, ["compare", str(run), "--out", str(tmp_path / "no" / "x.md")])
    assert done.exit_code == 1
    done = CliRunner().invoke(app, ["compare", str(tmp_path)])
    assert done.exit_code == 1
    assert "is no run" in done.output
