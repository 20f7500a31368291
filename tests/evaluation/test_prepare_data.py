"""Data of the benchmarks, prepared from archives of the hub's shapes, whole and damaged."""

from __future__ import annotations

import fcntl
import importlib.util
import io
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexselect.core.errors import DataError
from flexselect.evaluation.data import BENCHMARKS, check, prepare
from flexselect.evaluation.data.archives import Archive, Parts, find_archives, members, unpack
from flexselect.tests.evaluation.shapes import (
    TASKS,
    make_source,
    rows_of,
    split,
    tree,
    video,
    write_parquet,
    write_tar,
    write_zip,
)
from flexselect.tests.paths import ROOT

SCRIPT = ROOT / "scripts" / "prepare_data.py"


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Run the script's command in this process: starting Python takes seconds."""
    spec = importlib.util.spec_from_file_location("prepare_data", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def command(*arguments: object) -> Done:
        capsys.readouterr()
        try:
            code = script.main([str(argument) for argument in arguments])
        except SystemExit as ended:
            code = ended.code
        return Done(code, *capsys.readouterr())

    return command


def test_the_script_runs_and_shows_an_example(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", "mlvu")
    shown = f"{SCRIPT} mlvu --root {tmp_path / 'root'} --from {source} --quiet".split()
    done = subprocess.run([sys.executable, *shown], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "3 rows, 2 of 2 videos there" in done.stdout


# Every benchmark -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_is_prepared_from_the_files_of_the_hub(name: str, tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", name)
    before = tree(source)
    report = prepare(BENCHMARKS[name], tmp_path / "root", source)
    found = report.tasks[TASKS[name]]
    assert (found.rows, found.missing, report.damaged) == (len(rows_of(name)), [], [])
    assert report.ok == (name != "mvbench"), "of MVBench's tasks one has rows here"
    assert tree(source) == before, "the source is not ours to change: nothing is joined there"
    again = {p: p.stat().st_mtime_ns for p in (tmp_path / "root").rglob("*.mp4")}
    prepare(BENCHMARKS[name], tmp_path / "root", source)
    assert {p: p.stat().st_mtime_ns for p in again} == again, "nothing is unpacked twice"
    assert len(again) == found.videos


def test_videos_are_the_ones_of_their_rows(tmp_path: Path) -> None:
    prepare(BENCHMARKS["mlvu"], tmp_path, make_source(tmp_path / "source", "mlvu"))
    assert (tmp_path / "mlvu" / "needle_7.mp4").read_bytes() == video(1)
    assert (tmp_path / "mlvu" / "plot_2.mp4").read_bytes() == video(2)
    prepare(BENCHMARKS["mvbench"], tmp_path, make_source(tmp_path / "source2", "mvbench"))
    folder = tmp_path / "mvbench_video" / "star" / "Charades_segment"
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert sizes == {
        "QW7RT_3.4_9.8.mp4": len(video(1)),
        "ZX1CV_0.0_4.1.mp4": len(video(2)),
    }


def test_what_no_row_names_keeps_its_path(tmp_path: Path) -> None:
    prepare(BENCHMARKS["videomme"], tmp_path, make_source(tmp_path / "source", "videomme"))
    assert (tmp_path / "videomme" / "subtitle" / "longOne_601.srt").read_bytes() == b"1\n"
    assert not (tmp_path / "videomme" / "README.md").exists()


def test_two_files_for_one_row_are_told_apart_by_their_folders_or_not_at_all(
    tmp_path: Path,
) -> None:
    source = tmp_path / "source"
    write_parquet(source / "mlvu/test-0.parquet", [{**rows_of("mlvu")[0], "video_name": "1.mp4"}])
    write_zip(source / "a.zip", {"count/1.mp4": video(1), "order/1.mp4": video(2)})
    report = prepare(BENCHMARKS["mlvu"], tmp_path / "root", source)
    assert report.tasks["mlvu_dev"].missing == ["1.mp4"], "either would be a guess"
    assert (tmp_path / "root/mlvu/count/1.mp4").read_bytes() == video(1)

    write_zip(source / "b.zip", {"1.mp4": video(3)})
    assert prepare(BENCHMARKS["mlvu"], tmp_path / "root", source).ok
    assert (tmp_path / "root/mlvu/1.mp4").read_bytes() == video(3)


def test_files_on_another_disk_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    source = make_source(tmp_path / "source", "mvbench")
    report = prepare(BENCHMARKS["mvbench"], tmp_path / "root", source)
    assert not report.tasks["mvbench_action_sequence"].missing
    loose = "star/Charades_segment/QW7RT_3.4_9.8.mp4"
    copy = tmp_path / "root" / "mvbench_video" / loose
    assert copy.read_bytes() == video(1)
    assert copy.stat().st_ino != (source / loose).stat().st_ino


def test_a_snapshot_of_the_hubs_cache_will_do(tmp_path: Path) -> None:
    # There every file is a link to a blob without an ending.
    for name in ("longvideobench", "mvbench"):
        source = make_source(tmp_path / "files" / name, name)
        snapshot = tmp_path / "snapshot" / name
        blobs = tmp_path / "blobs" / name
        blobs.mkdir(parents=True)
        for number, path in enumerate(p for p in sorted(source.rglob("*")) if p.is_file()):
            link = snapshot / path.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.rename(blobs / str(number)))
        report = prepare(BENCHMARKS[name], tmp_path / "root", snapshot)
        assert report.tasks[TASKS[name]].missing == []
    placed = list((tmp_path / "root").rglob("*.mp4"))
    assert placed
    assert not any(path.is_symlink() for path in placed), "the cache may be cleared"


def test_rows_of_an_earlier_version_are_not_read_beside_the_new_ones(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", "lvbench")
    prepare(BENCHMARKS["lvbench"], tmp_path / "root", source)
    old = source / "data/train-00000-of-00001.parquet"
    write_parquet(source / "data/train-00000-of-00002.parquet", rows_of("lvbench")[:2])
    old.unlink()
    report = prepare(BENCHMARKS["lvbench"], tmp_path / "root", source)
    assert report.tasks["lvbench"].rows == 2


# What is missing -----------------------------------------------------------------------------


def test_missing_and_empty_videos_are_named_and_fail_the_command(
    tmp_path: Path, run: Callable[..., Done]
) -> None:
    source = make_source(tmp_path / "source", "videomme")
    (source / "videos_chunked_02.zip").unlink()
    done = run("videomme", "--root", tmp_path / "root", "--from", source, "--quiet")
    assert done.returncode == 1
    assert "3 rows, 1 of 2 videos there" in done.stdout
    assert str(tmp_path / "root/videomme/data/longOne_601.mp4") in done.stdout
    assert "Ready" not in done.stdout

    (tmp_path / "root/videomme/data/longOne_601.mp4").touch()
    report = check(BENCHMARKS["videomme"], tmp_path / "root")
    assert report.tasks["videomme"].missing == ["data/longOne_601.mp4"]

    write_zip(source / "videos_chunked_02.zip", {"data/longOne_601.mp4": video(2)})
    done = run("videomme", "--root", tmp_path / "root", "--from", source, "--quiet")
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 of 2 videos there" in done.stdout
    assert f"HF_HOME={tmp_path / 'root'}" in done.stdout


def test_subtitles_that_prompts_need_are_asked_for_too(
    tmp_path: Path, run: Callable[..., Done]
) -> None:
    source = make_source(tmp_path / "source", "longvideobench")
    (source / "subtitles.tar").unlink()
    done = run("longvideobench", "--root", tmp_path / "root", "--from", source, "--quiet")
    assert done.returncode == 1
    assert "2 of 2 videos there" in done.stdout
    assert "longvideobench/subtitles/q-Trail9_en.json" in done.stdout


def test_videos_that_are_none_are_found_by_opening_them(
    tmp_path: Path, run: Callable[..., Done]
) -> None:
    source = make_source(tmp_path / "source", "lvbench")
    write_zip(source / "video_chunks/videos_chunk_002.zip", {"x/match_Sp4.mp4": b"<html>"})
    arguments = ("lvbench", "--root", tmp_path / "root", "--quiet")
    assert run(*arguments, "--from", source).returncode == 0
    assert run(*arguments, "--check").returncode == 0
    for more in (["--check"], ["--from", source]):
        done = run(*arguments, "--open", *more)
        assert done.returncode == 1
        assert "match_Sp4.mp4" in done.stderr
        assert "river_Tv01.mp4" not in done.stderr
        assert "Ready" not in done.stdout


def test_a_video_of_another_ending_counts_where_lmms_eval_takes_it(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", "videomme")
    write_zip(source / "videos_chunked_02.zip", {"data/longOne_601.mkv": video(2)})
    assert prepare(BENCHMARKS["videomme"], tmp_path / "root", source).ok


def test_checking_changes_nothing(tmp_path: Path, run: Callable[..., Done]) -> None:
    source = make_source(tmp_path / "source", "lvbench")
    nothing = run("lvbench", "--root", tmp_path / "root", "--check")
    assert nothing.returncode == 1
    assert "without --check" in nothing.stderr
    assert not (tmp_path / "root").exists()
    prepare(BENCHMARKS["lvbench"], tmp_path / "root", source)
    (tmp_path / "root/lvbench/match_Sp4.mp4").unlink()
    before = tree(tmp_path / "root")
    done = run("lvbench", "--root", tmp_path / "root", "--check")
    assert done.returncode == 1
    assert "missing" in done.stdout
    assert tree(tmp_path / "root") == before


def test_a_folder_without_rows_is_no_benchmark(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", "lvbench")
    with pytest.raises(DataError, match=r"holds no rows of mlvu: expected mlvu/test-\*\.parquet"):
        prepare(BENCHMARKS["mlvu"], tmp_path / "root", source)
    (source / "data/train-00000-of-00001.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match=r"train-00000-of-00001\.parquet cannot be read"):
        prepare(BENCHMARKS["lvbench"], tmp_path / "root", source)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["kinetics", "--root", "x"], "invalid choice: 'kinetics'"),
        (["mlvu"], "--root"),
    ],
)
def test_wrong_usage_ends_with_two(
    arguments: list[str], said: str, run: Callable[..., Done]
) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert said in done.stderr


def test_help_shows_an_example(run: Callable[..., Done]) -> None:
    done = run("--help")
    assert done.returncode == 0
    assert "python scripts/prepare_data.py videomme --root data" in done.stdout


def test_options_that_contradict_are_refused(tmp_path: Path, run: Callable[..., Done]) -> None:
    done = run("mlvu", "--root", tmp_path, "--from", tmp_path / "nowhere")
    assert done.returncode == 1
    assert "is no folder" in done.stderr
    done = run("mlvu", "--root", tmp_path, "--from", tmp_path, "--check")
    assert done.returncode == 1
    assert "--from has no use" in done.stderr


# Unsafe archives -----------------------------------------------------------------------------


def zip_with(path: Path, name: str, mode: int = 0) -> None:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data/first.mp4", video(9))
        archive.writestr(info, "outside")


def tar_with(path: Path, name: str, kind: bytes, link: str = "") -> None:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = link
    with tarfile.open(path, "w") as archive:
        first = tarfile.TarInfo("data/first.mp4")
        first.size = 3
        archive.addfile(first, io.BytesIO(b"abc"))
        archive.addfile(info, io.BytesIO(b""))


@pytest.mark.parametrize(
    "member",
    ["../escaped.mp4", "data/../../escaped.mp4", "/escaped.mp4", "..\\escaped.mp4", "C:/e.mp4"],
)
def test_a_zip_whose_member_leads_out_is_refused_whole(member: str, tmp_path: Path) -> None:
    source = make_source(tmp_path / "a" / "source", "videomme")
    zip_with(source / "videos_chunked_03.zip", member)
    report = prepare(BENCHMARKS["videomme"], tmp_path / "a" / "root", source)
    [told] = report.damaged
    assert "videos_chunked_03.zip leads out of the folder" in told
    assert not report.ok
    assert not report.tasks["videomme"].missing, "the other archives are unpacked all the same"
    assert not (tmp_path / "a/root/videomme/data/first.mp4").exists()
    assert not [path for path in tmp_path.rglob("*") if "escaped" in path.name]


@pytest.mark.parametrize(
    ("name", "kind", "link"),
    [
        ("data/link.mp4", tarfile.SYMTYPE, "/etc/hostname"),
        ("data/link.mp4", tarfile.SYMTYPE, "first.mp4"),
        ("data/link.mp4", tarfile.LNKTYPE, "../../outside"),
        ("data/pipe", tarfile.FIFOTYPE, ""),
        ("data/device", tarfile.CHRTYPE, ""),
        ("../escaped.mp4", tarfile.REGTYPE, ""),
    ],
)
def test_a_tar_with_links_devices_or_ways_out_is_refused_whole(
    name: str, kind: bytes, link: str, tmp_path: Path
) -> None:
    source = make_source(tmp_path / "source", "longvideobench")
    tar_with(source / "more.tar", name, kind, link)
    report = prepare(BENCHMARKS["longvideobench"], tmp_path / "root", source)
    assert len(report.damaged) == 1
    assert "more.tar" in report.damaged[0] or repr(name) in report.damaged[0]
    target = tmp_path / "root/datasets/longvideobench"
    assert not (target / "data").exists()
    assert not report.tasks["longvideobench_val_v"].missing


def test_a_zip_with_a_link_is_refused(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", "videomme")
    zip_with(source / "videos_chunked_03.zip", "data/link.mp4", 0o120777)
    report = prepare(BENCHMARKS["videomme"], tmp_path / "root", source)
    assert "is no plain file" in report.damaged[0]
    assert not os.path.lexists(tmp_path / "root/videomme/data/link.mp4")


def test_links_in_the_target_are_not_followed(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", "videomme")
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "root/videomme").mkdir(parents=True)
    (tmp_path / "root/videomme/data").symlink_to(outside)
    with pytest.raises(DataError, match="is a link"):
        prepare(BENCHMARKS["videomme"], tmp_path / "root", source)
    assert not list(outside.iterdir())

    shutil.rmtree(tmp_path / "root")
    (tmp_path / "root").mkdir()
    (tmp_path / "root/videomme").symlink_to(outside)
    with pytest.raises(DataError, match="is a link"):
        prepare(BENCHMARKS["videomme"], tmp_path / "root", source)
    assert not list(outside.iterdir())


def test_a_link_in_place_of_a_video_is_replaced_not_written_through(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", "videomme")
    victim = tmp_path / "victim"
    place = tmp_path / "root/videomme/data/Ab_3-xYz01Q.mp4"
    place.parent.mkdir(parents=True)
    place.symlink_to(victim)
    mine = b"m" * len(video(1))
    victim.write_bytes(mine)
    prepare(BENCHMARKS["videomme"], tmp_path / "root", source)
    assert victim.read_bytes() == mine
    assert place.read_bytes() == video(1)
    assert not place.is_symlink()


# Damaged archives ----------------------------------------------------------------------------


def test_a_truncated_part_is_noticed_and_a_whole_one_mends_it(
    tmp_path: Path, run: Callable[..., Done]
) -> None:
    source = make_source(tmp_path / "source", "longvideobench")
    last = sorted(source.glob("videos.tar.part.*"))[-1]
    whole = last.read_bytes()
    last.write_bytes(whole[: len(whole) // 2])
    done = run("longvideobench", "--root", tmp_path / "root", "--from", source, "--quiet")
    assert done.returncode == 1
    assert "videos.tar (its last part is videos.tar.part.ac) is damaged" in done.stderr
    last.write_bytes(whole)
    done = run("longvideobench", "--root", tmp_path / "root", "--from", source, "--quiet")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("keep", [0, 512, 1024])
def test_a_tar_that_ends_between_two_members_is_noticed(keep: int, tmp_path: Path) -> None:
    # tarfile itself takes the end of the file for the end of the archive.
    path = write_tar(tmp_path / "a.tar", {f"{i}.mp4": bytes(100) for i in range(3)})
    content = path.read_bytes()
    end = 2 * 1024
    assert content[end : end + 5] == b"2.mp4"
    path.write_bytes(content[: end + (keep if keep != 1024 else 0)])
    with pytest.raises(DataError, match="damaged or not whole"):
        members(Archive("a.tar", (path,)))


def test_a_header_that_is_overwritten_is_noticed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {f"{i}.mp4": bytes(100) for i in range(3)})
    content = bytearray(path.read_bytes())
    content[1024:1100] = b"x" * 76
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match="damaged or not whole"):
        members(Archive("a.tar", (path,)))


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", "longvideobench")
    (source / "videos.tar.part.ab").unlink()
    with pytest.raises(DataError, match=r"Part ab of videos\.tar is missing"):
        prepare(BENCHMARKS["longvideobench"], tmp_path / "root", source)
    (source / "videos.tar.part.aa").unlink()
    with pytest.raises(DataError, match=r"Part aa of videos\.tar is missing"):
        prepare(BENCHMARKS["longvideobench"], tmp_path / "root", source)


@pytest.mark.parametrize("damage", ["cut", "flip", "none of it"])
def test_a_damaged_zip_leaves_no_half_video(damage: str, tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", "videomme")
    path = source / "videos_chunked_01.zip"
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[200] ^= 0xFF
    damaged = {"cut": content[:-40], "none of it": bytearray(b"<html>")}.get(damage, content)
    path.write_bytes(damaged)
    report = prepare(BENCHMARKS["videomme"], tmp_path / "root", source)
    assert "videos_chunked_01.zip is damaged or not whole" in report.damaged[0]
    assert report.tasks["videomme"].missing == ["data/Ab_3-xYz01Q.mp4"]
    names = [path.name for path in (tmp_path / "root/videomme/data").iterdir()]
    left = [name for name in names if not name.endswith(".flexselect-part")]
    assert left == ["longOne_601.mp4"]


def test_a_zip_with_a_password_is_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", {"a.mp4": b"abc"})
    content = bytearray(path.read_bytes())
    directory = content.index(b"PK\1\2")
    content[6] |= 1
    content[directory + 8] |= 1
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match="cannot be unpacked here"):
        unpack(Archive("a.zip", (path,)), {"a.mp4": "a.mp4"}, tmp_path)


# Interruptions -------------------------------------------------------------------------------

_KILLED = """
import os, signal, sys
from pathlib import Path
from flexselect.evaluation.data import BENCHMARKS, archives, prepare
written = []
copy = archives.shutil.copyfileobj
def copy_some(source, file, length):
    if ".mp4" in file.name and len(written) == 2:
        file.write(source.read(5)); file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(file.name) if ".mp4" in file.name else None
    copy(source, file, length)
archives.shutil.copyfileobj = copy_some
prepare(BENCHMARKS["longvideobench"], Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_a_killed_run_is_continued(tmp_path: Path) -> None:
    row = rows_of("longvideobench")[0]
    rows = [{**row, "id": str(i), "video_path": f"v{i}.mp4"} for i in range(6)]
    source = tmp_path / "source"
    write_parquet(source / "validation-00000-of-00001.parquet", rows)
    files = {f"videos/v{i}.mp4": video(i) for i in range(6)}
    subtitles = {f"subtitles/{row['subtitle_path']}": b"[]"}
    split(write_tar(source / "videos.tar", {**files, **subtitles}), 4)
    root = tmp_path / "root"
    command = [sys.executable, "-c", _KILLED, str(root), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    videos = root / "datasets/longvideobench/videos"
    first = {path.name: path.stat().st_mtime_ns for path in videos.glob("*.mp4")}
    assert sorted(first) == ["v0.mp4", "v1.mp4"]
    assert (videos / "v2.mp4.flexselect-part").stat().st_size == 5

    report = prepare(BENCHMARKS["longvideobench"], root, source)
    assert report.ok
    assert {name: (videos / name).stat().st_mtime_ns for name in first} == first
    whole = tmp_path / "whole"
    prepare(BENCHMARKS["longvideobench"], whole, source)
    ours, theirs = tree(root), tree(whole)
    assert ours.keys() == theirs.keys()
    assert all(ours[p] == theirs[p] for p in ours if not p.endswith(".yaml")), "but for the root"


def test_a_second_run_at_the_same_time_is_refused(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", "lvbench")
    with (tmp_path / ".lvbench.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="Another run is preparing lvbench"):
            prepare(BENCHMARKS["lvbench"], tmp_path, source)
    assert prepare(BENCHMARKS["lvbench"], tmp_path, source).ok


def test_a_disk_that_is_too_small_is_known_before_anything_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    source = make_source(tmp_path / "source", "videomme")
    needed = len(video(1)) + len(video(2)) + len(b"1\n")
    reserve = 256 << 20
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, needed + reserve - 1))
    with pytest.raises(DataError, match="GB free"):
        prepare(BENCHMARKS["videomme"], tmp_path / "root", source)
    assert not list((tmp_path / "root/videomme").rglob("*.mp4"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, needed + reserve))
    assert prepare(BENCHMARKS["videomme"], tmp_path / "root", source).ok
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 0))
    assert prepare(BENCHMARKS["videomme"], tmp_path / "root", source).ok, "nothing is written"


def test_a_root_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", "lvbench")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "lvbench").write_text("a file")
    with pytest.raises(DataError, match=r"root could not be prepared"):
        prepare(BENCHMARKS["lvbench"], tmp_path / "root", source)


# Split files ---------------------------------------------------------------------------------


@given(
    content=st.binary(max_size=60),
    cuts=st.lists(st.integers(0, 60), max_size=4),
    moves=st.lists(st.tuples(st.integers(-70, 70), st.integers(0, 2), st.integers(0, 30))),
)
def test_parts_read_as_the_whole_does(
    content: bytes,
    cuts: list[int],
    moves: list[tuple[int, int, int]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("parts")
    edges = [0, *sorted(min(cut, len(content)) for cut in cuts), len(content)]
    paths = []
    for i, (start, end) in enumerate(itertools.pairwise(edges)):
        paths.append(folder / f"{i:03d}")
        paths[-1].write_bytes(content[start:end])
    whole = io.BytesIO(content)
    with io.BufferedReader(Parts(tuple(paths)), 7) as parts:
        assert parts.read() == whole.read() == content
        for offset, whence, length in moves:
            place = {0: offset, 1: whole.tell() + offset, 2: len(content) + offset}[whence]
            if place < 0:
                continue
            whole.seek(place)
            parts.seek(offset, whence)
            assert parts.tell() == whole.tell()
            assert parts.read(length) == whole.read(length)
    shutil.rmtree(folder)


def test_parts_are_put_in_order(tmp_path: Path) -> None:
    letters = ["aa", *(f"a{chr(c)}" for c in range(ord("b"), ord("z") + 1)), "ba"]
    for suffix in letters:
        (tmp_path / f"videos.tar.part.{suffix}").touch()
    for suffix in ("001", "002"):
        (tmp_path / f"all.zip.{suffix}").touch()
    (tmp_path / "plain.zip").touch()
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "half.zip").touch()
    found = {a.name: [p.name.rsplit(".", 1)[1] for p in a.parts] for a in find_archives(tmp_path)}
    assert found == {
        "all.zip": ["001", "002"],
        "plain.zip": ["zip"],
        "videos.tar": letters,
    }


def test_an_archive_joined_by_hand_is_read_instead_of_its_parts(tmp_path: Path) -> None:
    for suffix in ("aa", "ac"):
        (tmp_path / f"videos.tar.part.{suffix}").touch()
    (tmp_path / "videos.tar").touch()
    [archive] = find_archives(tmp_path)
    assert [path.name for path in archive.parts] == ["videos.tar"]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_tar_is_unpacked_packed_or_not(mode: str, tmp_path: Path) -> None:
    name = "a.tar.gz" if mode == "w:gz" else "a.tar"
    files = {"./x/1.mp4": video(1), "x/2.mp4": video(2), "__MACOSX/x": b"litter"}
    parts = split(write_tar(tmp_path / name, files, mode), 2)
    archive = Archive(name, tuple(parts))
    assert [(m.name, m.size) for m in members(archive)] == [
        ("x/1.mp4", len(video(1))),
        ("x/2.mp4", len(video(2))),
    ]
    unpack(archive, {"x/1.mp4": "y/one.mp4", "x/2.mp4": "2.mp4"}, tmp_path / "out")
    assert tree(tmp_path / "out") == {"2.mp4": video(2), "y/one.mp4": video(1)}
