"""The benchmarks as the hub holds them, small: our own rows of their true columns, real videos."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from flexselect.core.errors import CheckpointError
from flexselect.evaluation.data import BENCHMARKS, prepare
from flexselect.testbed.locate import checkpoint_folder
from flexselect.tests.paths import SMALL_MEDIA

ROWS = Path(__file__).parent / "data"
VIDEO = (SMALL_MEDIA / "h265_video.mp4").read_bytes()

#: Task of every benchmark that is run, and its rows.
TASKS = {
    "videomme": "videomme",
    "mlvu": "mlvu_dev",
    "longvideobench": "longvideobench_val_v",
    "lvbench": "lvbench",
    "egoschema": "egoschema_subset",
    "mvbench": "mvbench_action_sequence",
}

#: Methods that are run on each.
METHODS = ("full", "flexselect")

#: Of LongVideoBench, in both of their forms.
SUBTITLES = [
    json.dumps(
        [
            {"start": "00:00:00.500", "end": "00:00:02.600", "line": "we are off"},
            {"start": "00:00:03.100", "end": "00:00:03.300", "line": "too short to see"},
            {"start": "00:00:05.900", "end": "00:00:06.100", "line": "look, a river"},
        ]
    ).encode(),
    json.dumps(
        [
            {"timestamp": [13.0, 45.5], "text": "let it rest"},
            {"timestamp": [400.2, None], "text": "and now we wait"},
        ]
    ).encode(),
]


def has_checkpoint(family: str) -> bool:
    """Tell whether a family's tiny model is trained."""
    try:
        checkpoint_folder(family)
    except CheckpointError:
        return False
    return True


def rows_of(benchmark: str) -> list[dict[str, Any]]:
    name = "longvideobench" if benchmark == "longvideobench" else TASKS[benchmark]
    return json.loads((ROWS / f"{name}.json").read_text())


def video(number: int) -> bytes:
    """A video that can be told from others by its size."""
    return VIDEO + b"\0" * number


def make_source(folder: Path, benchmark: str) -> Path:
    """Write the files of a benchmark as they are on the hub."""
    rows = rows_of(benchmark)
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("of no use")
    globals()[f"_{benchmark}"](folder, rows)
    return folder


def _videomme(folder: Path, rows: list[dict[str, Any]]) -> None:
    write_parquet(folder / "videomme/test-00000-of-00001.parquet", rows)
    write_zip(folder / "videos_chunked_01.zip", {"data/": b"", "data/Ab_3-xYz01Q.mp4": video(1)})
    write_zip(folder / "videos_chunked_02.zip", {"data/longOne_601.mp4": video(2)})
    write_zip(folder / "subtitle.zip", {"subtitle/longOne_601.srt": b"1\n"})


def _mlvu(folder: Path, rows: list[dict[str, Any]]) -> None:
    write_parquet(folder / "mlvu/test-00000-of-00001.parquet", rows)
    write_zip(folder / "video_part_1.zip", {"needle_7.mp4": video(1)})
    write_zip(folder / "video_part_2.zip", {"video_part_2/plot_2.mp4": video(2)})


def _longvideobench(folder: Path, rows: list[dict[str, Any]]) -> None:
    write_parquet(folder / "validation-00000-of-00001.parquet", rows)
    write_parquet(folder / "test-00000-of-00001.parquet", rows[:1])
    (folder / "lvb_val.json").write_text(json.dumps(rows))
    videos = {f"videos/{row['video_path']}": video(i) for i, row in enumerate(rows)}
    split(write_tar(folder / "videos.tar", videos), 3)
    subtitles = {f"subtitles/{row['subtitle_path']}": SUBTITLES[i] for i, row in enumerate(rows)}
    write_tar(folder / "subtitles.tar", subtitles)


def _lvbench(folder: Path, rows: list[dict[str, Any]]) -> None:
    write_parquet(folder / "data/train-00000-of-00001.parquet", rows)
    chunks = folder / "video_chunks"
    write_zip(chunks / "videos_chunk_001.zip", {"all_videos/river_Tv01.mp4": video(1)})
    write_zip(chunks / "videos_chunk_002.zip", {"all_videos/match_Sp4.mp4": video(2)})


def _egoschema(folder: Path, rows: list[dict[str, Any]]) -> None:
    write_parquet(folder / "Subset/test-00000-of-00001.parquet", rows)
    write_parquet(folder / "GENERATION/test-00000-of-00001.parquet", rows)
    write_parquet(folder / "MC/test-00000-of-00001.parquet", rows[:1])
    for i, row in enumerate(rows):
        name = f"videos_chunked_{i + 1:02d}.zip"
        write_zip(folder / name, {f"videos/{row['video_idx']}.mp4": video(i)})


def _mvbench(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "json").mkdir()
    (folder / "json/action_sequence.json").write_text(json.dumps(rows))
    loose = folder / "star/Charades_segment" / rows[0]["video"]
    loose.parent.mkdir(parents=True)
    loose.write_bytes(video(1))
    write_zip(
        folder / "video/data0613.zip",
        {f"data0613/star/Charades_segment/{rows[1]['video']}": video(2)},
    )


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def write_zip(path: Path, files: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_tar(path: Path, files: Mapping[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def split(path: Path, parts: int) -> list[Path]:
    """Cut a file as ``split`` does, and remove it."""
    content = path.read_bytes()
    length = -(-len(content) // parts)
    written = []
    for i in range(parts):
        part = path.with_name(f"{path.name}.part.a{chr(ord('a') + i)}")
        part.write_bytes(content[i * length : (i + 1) * length])
        written.append(part)
    path.unlink()
    return written


def tree(folder: Path) -> dict[str, bytes]:
    """Everything below a folder but locks: path to content."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(".lock")
    }


def prepare_all(folder: Path) -> Path:
    """Prepare every benchmark below one root; return it."""
    root = folder / "root"
    for name in TASKS:
        report = prepare(BENCHMARKS[name], root, make_source(folder / "sources" / name, name))
        assert not report.tasks[TASKS[name]].missing
    return root
