"""The suite fails for what transformers deprecates, whether it warns or only logs.

The cases are tests of one inner session, with this repository's configuration and conftest.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from flexselect.tests.paths import ROOT

INNER = '''
import logging
import types
import warnings

logger = logging.getLogger("transformers.generation")
logger.warning("Deprecated at import")


def warn(module, message, category):
    """Warn as code of that module does."""
    source = compile("warnings.warn(message, category)", "x.py", "exec")
    names = {"warnings": warnings, "message": message, "category": category}
    exec(source, {**names, "__name__": module})


def test_import_logged(): pass
def test_quiet(): pass
def test_logged(): logger.warning("`torch_dtype` is deprecated! Use `dtype`")
def test_logged_other(): logger.warning("using float32")
def test_future(): warn("transformers.models.auto", "use another", FutureWarning)
def test_deprecation(): warn("transformers.models.auto", "use another", DeprecationWarning)
def test_ours(): warn("flexselect.core.sets", "use another", FutureWarning)
def test_named(): warn("other", "`x` will be removed in Transformers v6", FutureWarning)
def test_stranger(): warn("other", "use another", DeprecationWarning)
'''


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What pytest prints for INNER, as if it lay in tests/ of this repository."""
    folder = tmp_path_factory.mktemp("inner")
    (folder / "tests").mkdir()
    for name in ("pyproject.toml", "tests/conftest.py"):
        (folder / name).write_text((ROOT / name).read_text())
    (folder / "tests" / "test_inner.py").write_text(INNER)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", "tests"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize(
    ("test", "reason"),
    [
        ("import_logged", "transformers.generation: Deprecated at import"),
        ("logged", "transformers.generation: `torch_dtype` is deprecated! Use `dtype`"),
        ("future", "FutureWarning: use another"),
        ("deprecation", "DeprecationWarning: use another"),
        ("ours", "FutureWarning: use another"),
        ("named", "FutureWarning: `x` will be removed in Transformers v6"),
    ],
)
def test_deprecation_fails(session: str, test: str, reason: str) -> None:
    assert re.search(rf"^(FAILED|ERROR) \S+::test_{test}\b", session, re.MULTILINE)
    assert reason in session


@pytest.mark.parametrize("test", ["quiet", "logged_other", "stranger"])
def test_anything_else_passes(session: str, test: str) -> None:
    assert re.search(rf"^PASSED \S+::test_{test}$", session, re.MULTILINE)
    assert not re.search(rf"^(FAILED|ERROR) \S+::test_{test}\b", session, re.MULTILINE)


def test_the_hub_is_offline() -> None:
    code = "import huggingface_hub.constants as c; raise SystemExit(not c.HF_HUB_OFFLINE)"
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    subprocess.run([sys.executable, "-c", code], check=True)
