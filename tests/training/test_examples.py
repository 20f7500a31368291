"""Every published form of a data set reads alike, and what is malformed is named."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from flexselect.core.errors import OptionError
from flexselect.testbed.make import make_videos
from flexselect.training.examples import Example, hold_out, read_examples


def conversation(name: object, video: str, *questions: str, **more: Any) -> dict[str, Any]:
    turns = []
    for question in questions:
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": "An answer."}]
    return {"id": name, "video": video, "conversations": turns, **more}


ENTRIES = [
    conversation("cat", "a/cat.mp4", "<image>\nWhat does the cat do?", "And then?"),
    conversation("dog", "a/dog.mp4", "<video>\nWhere is the dog?"),
    conversation("dog", "a/dog.mp4", "Look at <video> again.\nWhere is the dog now?"),
    conversation(7, "b/fish.mp4", "How many fish?\u2028Count.\n<image>"),
    conversation("owl", "b/owl.mp4", "Is it night?"),
]


def write_json(path: Path, entries: Sequence[Any]) -> Path:
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


def write_jsonl(path: Path, entries: Sequence[Any]) -> Path:
    lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def write_yaml(path: Path, entries: Sequence[Any]) -> Path:
    write_json(path.parent / "one.json", entries[:2])
    write_jsonl(path.parent / "two.jsonl", entries[2:])
    parts = [
        {"json_path": "one.json", "sampling_strategy": "all"},
        {"json_path": str(path.parent / "two.jsonl")},
    ]
    path.write_text(yaml.safe_dump({"datasets": parts}), encoding="utf-8")
    return path


def write_parts(path: Path, entries: Sequence[Any]) -> Path:
    write_jsonl(path.parent / "all.jsonl", entries)
    part = {"root": ".", "annotation": "all.jsonl", "data_augment": False, "repeat_time": 1}
    path.write_text(json.dumps({"sample": part}), encoding="utf-8")
    return path


FORMS = {
    "list.json": write_json,
    "lines.jsonl": write_jsonl,
    "parts.yaml": write_yaml,
    "parts.json": write_parts,
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_reads_alike(tmp_path: Path, name: str) -> None:
    examples = read_examples(FORMS[name](tmp_path / name, ENTRIES))
    assert [(e.video, e.question) for e in examples] == [
        (tmp_path / "a/cat.mp4", "What does the cat do?"),
        (tmp_path / "a/cat.mp4", "And then?"),
        (tmp_path / "a/dog.mp4", "Where is the dog?"),
        (tmp_path / "a/dog.mp4", "Look at again.\nWhere is the dog now?"),
        (tmp_path / "b/fish.mp4", "How many fish?\u2028Count."),
        (tmp_path / "b/owl.mp4", "Is it night?"),
    ]
    reference = read_examples(write_json(tmp_path / "reference.json", ENTRIES))
    assert examples == reference


def test_ids_are_unique_and_do_not_depend_on_the_place(tmp_path: Path) -> None:
    entries = [*ENTRIES, *ENTRIES, conversation("cat", "c/cat.mp4", "And then?")]
    here = read_examples(write_json(tmp_path / "here.json", entries))
    ids = [example.id for example in here]
    assert len(set(ids)) == len(ids) == 13
    there = tmp_path / "there"
    there.mkdir()
    moved = read_examples(write_jsonl(tmp_path / "there.jsonl", entries), there)
    assert [example.id for example in moved] == ids
    assert moved[0].video == there / "a/cat.mp4"
    # An id goes with its question, wherever that stands in the file.
    turned = read_examples(write_json(tmp_path / "turned.json", ENTRIES[::-1]))
    assert {e.id: e.question for e in turned} == {e.id: e.question for e in here[:6]}


def test_equal_names_below_two_roots_are_two_videos(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", ENTRIES[:1])
    parts = {
        "one": {"root": "r1", "annotation": "x.jsonl"},
        "two": {"root": "r2", "annotation": "x.jsonl", "repeat_time": 1.5},
    }
    source = tmp_path / "parts.json"
    source.write_text(json.dumps(parts))
    both = read_examples(source)
    source.write_text(json.dumps(parts | {"one": parts["two"], "two": parts["one"]}))
    swapped = read_examples(source)
    assert len({example.id for example in both}) == len(both) == 4
    assert both[0].video == tmp_path / "r1/a/cat.mp4"
    assert not {e.id for e in both[:2]} & {e.id for e in both[2:]}
    assert len(swapped) == 4


def test_a_limit_keeps_the_start(tmp_path: Path) -> None:
    source = write_json(tmp_path / "all.json", [*ENTRIES, *ENTRIES])
    whole = read_examples(source)
    for limit in (1, 3, 12, 50):
        assert read_examples(source, limit=limit) == whole[:limit]
    with pytest.raises(OptionError, match="limit"):
        read_examples(source, limit=0)


def numbered(count: int) -> list[dict[str, Any]]:
    return [conversation(n, f"{n}.mp4", "What?") for n in range(count)]


def sampled(folder: Path, strategy: str, count: int = 25, seed: int = 0) -> list[int]:
    write_json(folder / "part.json", numbered(count))
    source = folder / "data.yaml"
    part = {"json_path": "part.json", "sampling_strategy": strategy}
    source.write_text(yaml.safe_dump({"datasets": [part]}))
    return [int(example.video.stem) for example in read_examples(source, seed=seed)]


def test_sampling_strategies(tmp_path: Path) -> None:
    assert sampled(tmp_path, "all") == list(range(25))
    assert sampled(tmp_path, "first:4") == [0, 1, 2, 3]
    assert sampled(tmp_path, "first:10%") == [0, 1, 2]  # rounded up
    assert sampled(tmp_path, "end:2") == [23, 24]
    assert sampled(tmp_path, "end:0.5%") == [24]
    assert sampled(tmp_path, "first:99") == list(range(25))
    drawn = sampled(tmp_path, "random:20%")
    assert len(drawn) == 5
    assert drawn == sorted(set(drawn)) == sampled(tmp_path, "random:5")
    assert drawn != sampled(tmp_path, "random:5", seed=1)


@pytest.mark.parametrize("strategy", ["first", "first:", "all:3", "middle:3", "first:x", "end:-1"])
def test_unknown_strategies_are_refused(tmp_path: Path, strategy: str) -> None:
    with pytest.raises(OptionError, match=r"data\.yaml, part 0.*sampling_strategy"):
        sampled(tmp_path, strategy)


def test_videos_may_lie_in_folders_of_their_source(tmp_path: Path) -> None:
    (tmp_path / "academic").mkdir()
    entries = [
        conversation(1, "x/1.mp4", "What?", data_source="academic"),
        conversation(2, "academic/x/2.mp4", "What?", data_source="academic"),
        conversation(3, "x/3.mp4", "What?", data_source="not unpacked here"),
        conversation(4, "/elsewhere/4.mp4", "What?", data_source="academic"),
    ]
    examples = read_examples(write_json(tmp_path / "data.json", entries))
    assert [str(example.video) for example in examples] == [
        f"{tmp_path}/academic/x/1.mp4",
        f"{tmp_path}/academic/x/2.mp4",
        f"{tmp_path}/x/3.mp4",
        "/elsewhere/4.mp4",
    ]


def test_what_asks_nothing_about_a_video_is_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entries = [
        {"id": 1, "image": "a.png", "conversations": [{"from": "human", "value": "What?"}]},
        conversation(2, "a.mp4", "<image>\n", "Why?"),
        conversation(3, "", "No film."),
    ]
    with caplog.at_level(logging.WARNING, "flexselect"):
        examples = read_examples(write_json(tmp_path / "data.json", entries))
    assert [example.question for example in examples] == ["Why?"]
    assert "2 conversations show no video" in caplog.text
    assert "1 human turns ask nothing" in caplog.text
    with pytest.raises(OptionError, match=r"data\.json holds no question about a video"):
        read_examples(write_json(tmp_path / "data.json", entries[:1]))


GOOD = conversation("fine", "a.mp4", "What?")
MALFORMED: dict[str, tuple[str, str]] = {
    "no json": ("{'a': 1}", r"data\.json is no JSON.*line 1"),
    "a text": ('"hello"', r"data\.json must hold a list"),
    "no object": (json.dumps([GOOD, 3]), r"data\.json, entry 1: must be an object"),
    "video": (json.dumps([GOOD, {**GOOD, "video": 4}]), r"entry 1 \(id 'fine'\): 'video'"),
    "two videos": (json.dumps([{**GOOD, "video": ["a", "b"]}]), r"entry 0.*must name one file"),
    "turns": (json.dumps([{"id": 5, "video": "a"}]), r"entry 0 \(id 5\): 'conversations'"),
    "turn": (
        json.dumps([{**GOOD, "conversations": [{"from": "human"}]}]),
        r"entry 0.*turn 0 must have",
    ),
    "speaker": (
        json.dumps([{**GOOD, "conversations": [{"from": "user", "value": "What?"}]}]),
        r"entry 0.*no turn is from 'human', only from \['user'\]",
    ),
    "part": (json.dumps({"x": {"root": "."}}), r"part 'x': 'annotation'"),
    "missing part": (json.dumps({"x": {"annotation": "no.jsonl"}}), r"part 'x': there is no file"),
    "empty": ("[]", r"data\.json holds no question"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_named(tmp_path: Path, case: str) -> None:
    content, message = MALFORMED[case]
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(OptionError, match=message):
        read_examples(tmp_path / "data.json")


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(f"{json.dumps(GOOD)}\n\n{{broken\n")
    with pytest.raises(OptionError, match=r"data\.jsonl, line 3 is no JSON"):
        read_examples(tmp_path / "data.jsonl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n", "'datasets' must be a list"),
        ("datasets: [{path: x.json}]\n", r"part 0: 'json_path'"),
        ("datasets: [{json_path: gone.json}]\n", r"part 0: there is no file .*gone\.json"),
        ("datasets: [\n", "is no YAML"),
    ],
)
def test_a_bad_list_of_parts_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "data.yaml").write_text(content)
    with pytest.raises(OptionError, match=message):
        read_examples(tmp_path / "data.yaml")


def test_a_source_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="There is no data at"):
        read_examples(tmp_path / "gone.json")
    (tmp_path / "data.csv").write_text("a,b")
    with pytest.raises(OptionError, match=r"must be a \.yaml, \.json or \.jsonl"):
        read_examples(tmp_path / "data.csv")
    with pytest.raises(OptionError, match="is no folder"):
        read_examples(write_json(tmp_path / "data.json", ENTRIES), tmp_path / "gone")
    with pytest.raises(OptionError, match="holds no question"):
        read_examples(tmp_path)


def test_a_folder_of_needle_videos(tmp_path: Path) -> None:
    videos = make_videos(tmp_path, split="train", frames=4, count=2, questions=2)
    examples = read_examples(tmp_path)
    assert [(e.video, e.question) for e in examples] == [
        (video.path, question.text) for video in videos for question in video.questions
    ]
    assert len({example.id for example in examples}) == 4
    videos[0].path.with_suffix(".json").unlink()
    with pytest.raises(OptionError, match="does not exist"):
        read_examples(tmp_path)


def test_nothing_held_out_is_trained_on() -> None:
    examples = [Example(f"{n}", Path(f"{n % 7}.mp4"), "What?") for n in range(30)]
    train, held = hold_out(examples, 6)
    assert 6 <= len(held) <= 10
    assert not {e.video for e in train} & {e.video for e in held}
    assert sorted([*train, *held], key=examples.index) == examples
    assert train == sorted(train, key=examples.index)
    assert hold_out(examples, 6) == (train, held)
    assert hold_out(examples, 6, seed=1)[1] != held
    assert hold_out(examples, 0) == (examples, [])
    with pytest.raises(OptionError, match="leaves none of 30"):
        hold_out(examples, 30)
