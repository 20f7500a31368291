"""Figures of a run: shares, errors, intervals, tokens and times."""

from __future__ import annotations

import math

import pytest

from flexselect.evaluation.scores import (
    group_row,
    half_width,
    missing_row,
    sample_score,
    task_row,
    task_samples,
)
from flexselect.evaluation.tables import cells, markdown, remarks, savings


@pytest.mark.parametrize(
    ("value", "score"),
    [
        (1.0, 1.0),
        (False, 0.0),
        ({"score": 1.0, "videoID": "a"}, 1.0),
        ({"pred_answer": "b", "answer": "B"}, 1.0),
        ({"pred_answer": "", "answer": "B"}, 0.0),
        ({"parsed_pred": "A", "answer": "B"}, 0.0),
        ({"pred": 2, "ground_truth": "2"}, 1.0),
        ({"id": "x"}, None),
        ("text", None),
    ],
)
def test_the_score_of_a_sample(value, score):
    assert sample_score(value) == score


def sample(doc_id: int, score: float, error: str | None = None, opened: int = 1, **numbers) -> dict:
    return {
        "doc_id": doc_id,
        "score": score,
        "error": error,
        "pictures": 0 if error else 16,
        "visual_tokens": 0 if error else 64,
        "kept_tokens": 0 if error else 8,
        "opened": 0 if error else opened,
        "seconds": {} if error else {"decode": 1.0, "encode": 2.0, "rank": 0.5, "answer": 9.0},
        **numbers,
    }


def test_a_row_sums_up_its_samples():
    samples = [
        sample(0, 1.0),
        sample(1, 0.0, opened=0),
        sample(2, 1.0, opened=0),
        sample(3, 0.0, error="a.mp4: no such file"),
    ]
    row = task_row("full", "t", "acc", samples, {"acc,none": 0.5, "acc_stderr_clt,none": 0.25})
    assert (row["samples"], row["failed"], row["accuracy"], row["stderr"]) == (4, 1, 0.5, 0.25)
    # A video that could not be read does not make the others look shorter.
    assert (row["frames"], row["visual_tokens"], row["kept_tokens"]) == (16, 64, 8)
    assert row["stages"]["decode"] == 1.0
    # The answer's further tokens come after the first.
    assert row["ttft_s"] == pytest.approx(3.5)
    assert (row["opened"], row["spared_s"]) == (1, 6.0)
    assert "1 of 4 without" in remarks([row])[0]
    assert cells(row)[6] == "1000+2000+500+0+0"
    assert "6.0 s" in str(savings([row]))


@pytest.mark.parametrize(("figure", "share"), [(50.0, 0.5), (0.5, 0.5), (48.0, 0.48)])
def test_percents_become_shares(figure, share):
    samples = [sample(0, 1.0), sample(1, 0.0)]
    assert task_row("m", "t", "acc", samples, {"acc,none": figure})["accuracy"] == share


def test_one_percent_is_not_everything():
    samples = [sample(i, float(i == 0)) for i in range(100)]
    assert task_row("m", "t", "acc", samples, {"acc,none": 1.0})["accuracy"] == 0.01


def test_errors_come_by_cluster_else_from_the_samples():
    samples = [sample(i, float(i % 2)) for i in range(8)]
    results = {"acc,none": 0.5, "acc_stderr_clt,none": 0.2, "acc_stderr_clustered,none": 0.3}
    assert task_row("m", "t", "acc", samples, results)["stderr"] == 0.3
    del results["acc_stderr_clustered,none"], results["acc_stderr_clt,none"]
    results["acc_stderr_clt,none"] = "N/A"
    expected = math.sqrt(8 * 0.25 / 7 / 8)
    assert task_row("m", "t", "acc", samples, results)["stderr"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("share", "count", "bound"),
    # Wilson's interval at 95 %, from tables: 10 of 10 is [0.722, 1]; 5 of 10 [0.237, 0.763].
    [(1.0, 10, 0.278), (0.0, 10, 0.278), (0.5, 10, 0.263), (0.8, 100, 0.089)],
)
def test_the_interval_has_a_width_even_where_all_are_right(share, count, bound):
    row = {"samples": count, "accuracy": share, "stderr": 0.0}
    assert half_width(row) == pytest.approx(bound, abs=0.001)
    assert half_width({**row, "stderr": 1.0}) == pytest.approx(1.96)


def test_samples_join_what_was_scored_with_what_was_asked():
    journal = [
        {"task": "t", "doc_id": 1, "ordinal": 0, "answer": "B", "error": None, "videos": ["b"]},
        {"task": "t", "doc_id": 0, "ordinal": 0, "answer": "A", "error": None, "videos": ["a"]},
        {"task": "u", "doc_id": 0, "ordinal": 0, "answer": "Z", "error": None, "videos": ["z"]},
    ]
    logged = [{"doc_id": i, "target": "A", "acc": float(i == 0)} for i in (1, 0)]
    samples = task_samples("m", "t", logged, journal, "acc")
    assert [(s["doc_id"], s["answer"], s["score"]) for s in samples] == [(0, "A", 1), (1, "B", 0)]


def test_a_group_counts_every_task_alike_in_accuracy_and_every_question_in_the_rest():
    results = {"acc,none": 1.0, "acc_stderr_clt,none": 0.3}
    one = task_row("full", "a", "acc", [sample(0, 1.0)], results)
    none = [sample(i, 0.0, pictures=32) for i in range(3)]
    three = task_row("full", "b", "acc", none, {"acc,none": 0.0, "acc_stderr_clt,none": 0.4})
    row = group_row("g", [one, three])
    assert (row["task"], row["accuracy"], row["samples"]) == ("g", 0.5, 4)
    assert row["stderr"] == pytest.approx(0.25)
    assert row["frames"] == (16 + 3 * 32) / 4
    assert row["stages"]["decode"] == 1.0
    assert set(row) == set(one)


def test_a_task_without_any_usable_video_still_has_a_row():
    row = task_row("full", "t", "acc", [sample(0, 0.0, error="gone")], {"acc,none": 0.0})
    assert (row["failed"], row["ttft_s"], row["visual_tokens"]) == (1, None, None)
    assert "1 of 1 without" in remarks([row])[0]
    assert cells(row)[2:4] == ["?", "?"]
    assert group_row("g", [row])["ttft_s"] is None


def test_a_method_that_could_not_run_says_why():
    row = missing_row("flexselect-lite", "t", "there is no selector")
    ran = task_row("full", "t", "acc", [sample(0, 1.0)], {"acc,none": 1.0})
    assert set(row) == set(ran)
    text = markdown([ran, row], "title", ["a note"])
    assert "| full | t | 16 | 64 → 8 | 1.000 ±" in text
    assert "there is no selector" in text
    assert "- a note" in text
