"""The documentation builds without a warning, and asks nothing of the network when it is read."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flexselect.inference.registry import FAMILIES
from flexselect.tests.paths import ROOT

pytest.importorskip("mkdocs", reason="the docs extra is not installed")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return target


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15
    loads = re.compile(r'<(?:script|img|iframe|source|link)\b[^>]*(?:src|href)="?(?:https?:)?//')
    foreign = {str(page): loads.findall(page.read_text()) for page in pages}
    assert not {page: found for page, found in foreign.items() if found}
    styles = "".join(path.read_text() for path in site.rglob("*.css"))
    assert not re.findall(r"url\(\s*[\"']?https?:", styles)


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    pages = {str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md")}
    assert pages == set(_files(yaml.safe_load(text)["nav"]))


def _files(entry: object) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    parts = entry.values() if isinstance(entry, dict) else entry
    assert isinstance(parts, (list, type({}.values())))
    return [file for part in parts for file in _files(part)]


def test_every_family_has_its_page(site: Path) -> None:
    for family, _ in FAMILIES.values():
        text = (site / "families" / f"{family}.html").read_text()
        # What UPSTREAM.md says stands on the page, its own heading left out.
        [heading] = re.findall(r"^# (.*)$", (ROOT / family / "UPSTREAM.md").read_text(), re.M)
        assert "transformers 5.17 – 5.23" in text
        assert heading not in text
        assert f"families/{family}.html" in (site / "index.html").read_text()


def test_the_api_shows_sentences_as_descriptions(site: Path) -> None:
    """Not as types: the docstrings of this project put what numpydoc would take for one."""
    page = (site / "api" / "index.html").read_text()
    text = re.sub(r"<[^>]+>", "", page)
    assert "a loaded transformers model of a supported family." in text
    assert not re.search(r"<code>[^<]*a loaded transformers model", page)
    names = re.findall(r'id="(flexselect\.[\w.]+)"', page)
    assert "flexselect.apply" in names


def test_all_that_is_public_is_on_a_page(site: Path) -> None:
    import flexselect

    pages = "".join(path.read_text() for path in (site / "api").glob("*.html"))
    shown = {name.rsplit(".", 1)[1] for name in re.findall(r'id="(flexselect\.[\w.]+)"', pages)}
    assert set(flexselect.__all__) <= shown


def test_formulas_are_laid_out_by_the_browser(site: Path) -> None:
    text = (site / "method.html").read_text()
    assert text.count('<math display="block">') == 4
    assert text.count("<math") == text.count("</math>") == 4
