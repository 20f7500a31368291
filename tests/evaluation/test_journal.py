"""The journal: what was answered is there after a kill, once, and half a line is not."""

from __future__ import annotations

import logging

import pytest

from flexselect.core.errors import FlexSelectError
from flexselect.evaluation.journal import Journal, digest, read_journal


def test_processes_read_what_all_of_them_wrote(tmp_path):
    first, second = Journal(tmp_path / "run", 0), Journal(tmp_path / "run", 1)
    first.append([{"key": "a", "answer": "1\n2"}])
    second.append([{"key": "b", "answer": "é"}, {"key": "c", "answer": ""}])
    assert first.read() == second.read() == read_journal(tmp_path / "run")
    assert [row["answer"] for row in first.read().values()] == ["1\n2", "é", ""]


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_line_cut_by_a_kill_is_answered_again_and_harms_no_other(tmp_path, cut, caplog):
    journal = Journal(tmp_path)
    journal.append([{"key": "a", "answer": "1"}])
    journal.append([{"key": "b", "answer": "long enough"}])
    journal.close()
    path = tmp_path / "answers-0.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])

    again = Journal(tmp_path)
    # A line that lacks only its end is whole.
    assert set(again.read()) == ({"a", "b"} if cut == 1 else {"a"})
    again.append([{"key": "c", "answer": "3"}])
    with caplog.at_level(logging.WARNING):
        found = again.read()
    assert found["c"]["answer"] == "3"
    assert ("interruption" in caplog.text) == (cut > 1)


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FlexSelectError, match="file"):
        Journal(tmp_path / "file" / "run")


def test_a_digest_follows_content_and_not_order():
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert digest({"a": 1}) != digest({"a": "1"})
