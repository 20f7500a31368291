"""Downloading a benchmark, from a small hub of this machine that speaks the hub's protocol."""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import shutil
import threading
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

from flexselect.core.errors import DataError
from flexselect.evaluation.data import BENCHMARKS, prepare
from flexselect.evaluation.data.fetch import download
from flexselect.tests.evaluation.shapes import make_source, tree

SHA = "0123456789abcdef0123456789abcdef01234567"


def digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers what the hub's client asks about one data set whose files lie in ``folder``."""

    protocol_version = "HTTP/1.1"

    def __init__(self, *arguments: object, hub: Shelf) -> None:
        self.hub = hub
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_HEAD(self) -> None:
        self.reply(body=False)

    def do_GET(self) -> None:
        self.reply(body=True)

    def reply(self, body: bool) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.asked.append((self.command, path, self.headers.get("Range")))
        if hub.refusal is not None:
            self.send(403, b"", {"X-Error-Code": hub.refusal, "X-Error-Message": "no"}, body)
        elif path.startswith(f"/api/datasets/{hub.repository}/tree/"):
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": digest(content)}
                for name, content in sorted(hub.files.items())
            ]
            self.send(200, json.dumps(entries).encode(), {"Content-Type": "application/json"}, body)
        elif path.startswith(f"/api/datasets/{hub.repository}"):
            files = sorted(hub.files)
            siblings = [{"rfilename": name, "size": len(hub.files[name])} for name in files]
            info = {"id": hub.repository, "sha": SHA, "siblings": siblings}
            self.send(200, json.dumps(info).encode(), {"Content-Type": "application/json"}, body)
        elif (name := path.removeprefix(f"/datasets/{hub.repository}/resolve/{SHA}/")) not in (
            hub.files
        ):
            self.send(404, b"", {}, body)
        else:
            content = hub.files[name]
            start = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
            headers = {
                "ETag": f'"{digest(content)}"',
                "X-Repo-Commit": SHA,
                "Accept-Ranges": "bytes",
            }
            if start:
                total = len(content)
                headers["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
            cut = hub.cut.pop(name, None) if body and not start else None
            if cut is not None:
                # Files are fetched side by side; this one breaks off as the last of them.
                assert all(hub.sent[other].wait(60) for other in hub.sent if other != name)
            self.send(206 if start else 200, content[start:], headers, body, cut)
            if body and cut is None:
                hub.sent[name].set()

    def send(
        self,
        status: int,
        content: bytes,
        headers: dict[str, str],
        body: bool,
        cut: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content[:cut])
        if cut is not None:
            self.hub.refusal = "Unavailable"
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


class Shelf:
    """What the hub holds, and what it was asked."""

    def __init__(self, repository: str, files: dict[str, bytes]) -> None:
        self.repository = repository
        self.files = files
        self.asked: list[tuple[str, str, str | None]] = []
        #: Error code of every answer, if any.
        self.refusal: str | None = None
        #: Bytes after which a file's connection breaks, and the hub with it.
        self.cut: dict[str, int] = {}
        #: Which of the files that are of use have been sent whole.
        self.sent = {name: threading.Event() for name in files if name != "README.md"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shelf]:
    benchmark = BENCHMARKS["lvbench"]
    source = make_source(tmp_path / "hub", benchmark.name)
    shelf = Shelf(benchmark.repository, tree(source))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Hub, hub=shelf))
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    place = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", place)
    template = place + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield shelf
    server.shutdown()
    server.server_close()


def fetched(hub: Shelf) -> list[str]:
    """Return the files whose content was asked for."""
    return [
        path.split(f"{SHA}/")[1]
        for verb, path, _ in hub.asked
        if verb == "GET" and SHA in path and "/resolve/" in path
    ]


def test_a_benchmark_is_downloaded_once_and_then_ready(hub: Shelf, tmp_path: Path) -> None:
    benchmark = BENCHMARKS["lvbench"]
    folder = download(benchmark, tmp_path / "root")
    assert folder == tmp_path / "root" / "downloads" / "lvbench"
    assert sorted(fetched(hub)) == sorted(set(hub.files) - {"README.md"})
    assert prepare(benchmark, tmp_path / "root", folder).ok
    assert not any("downloads" in path for path in tree(tmp_path / "root" / benchmark.folder))
    hub.asked.clear()
    download(benchmark, tmp_path / "root")
    assert fetched(hub) == []


def test_an_interrupted_download_is_continued(hub: Shelf, tmp_path: Path) -> None:
    benchmark = BENCHMARKS["lvbench"]
    name = "video_chunks/videos_chunk_002.zip"
    hub.cut[name] = 1000
    with pytest.raises(DataError, match="Run again to continue"):
        download(benchmark, tmp_path / "root")
    hub.refusal = None
    hub.asked.clear()
    folder = download(benchmark, tmp_path / "root")
    assert (folder / name).read_bytes() == hub.files[name]
    assert fetched(hub) == [name], "what was whole is not fetched again"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("GatedRepo", "is gated: accept its conditions at https://huggingface.co/datasets/lmms-ev"),
        ("RepoNotFound", "The hub shows you no data set lmms-eval/LVBench"),
        ("Unavailable", "could not be reached or stopped answering"),
    ],
)
def test_refusals_say_what_to_do(code: str, said: str, hub: Shelf, tmp_path: Path) -> None:
    hub.refusal = code
    with pytest.raises(DataError, match=said):
        download(BENCHMARKS["lvbench"], tmp_path / "root")


def test_offline_names_the_other_way(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"offline mode is enabled.*--from"):
        download(BENCHMARKS["lvbench"], tmp_path)


def test_a_disk_that_cannot_hold_download_and_videos_is_known_first(
    hub: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    total = sum(len(content) for content in hub.files.values())
    reserve = 256 << 20
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 2 * total + reserve - 1))
    with pytest.raises(DataError, match="GB free"):
        download(BENCHMARKS["lvbench"], tmp_path / "root")
    assert fetched(hub) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 2 * total + reserve))
    download(BENCHMARKS["lvbench"], tmp_path / "root")
