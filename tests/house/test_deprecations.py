"""The suite fails for what transformers deprecates, whether it warns or only logs.

Each case is a test session of its own, with this repository's configuration and conftest.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flexselect.tests.paths import ROOT


def run(folder: Path, test: str) -> subprocess.CompletedProcess[str]:
    """Run one test module as if it lay in tests/ of this repository."""
    tests = folder / "tests"
    tests.mkdir()
    (folder / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    (tests / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tests / "test_inner.py").write_text(test)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


LOGGED = """
import logging
def test_it():
    logging.getLogger("transformers.modeling_utils").warning("`{name}` is {what}")
"""

WARNED = """
import types, warnings
def test_it():
    module = types.ModuleType("{module}")
    code = "import warnings; warnings.warn('{message}', {category})"
    exec(compile(code, "x.py", "exec"), module.__dict__)
"""


def test_logged_deprecation_fails(tmp_path: Path) -> None:
    result = run(tmp_path, LOGGED.format(name="torch_dtype", what="deprecated! Use `dtype`"))
    assert result.returncode == 1
    assert "transformers.modeling_utils: `torch_dtype` is deprecated" in result.stdout


def test_deprecation_logged_on_import_fails(tmp_path: Path) -> None:
    test = """
import logging
logging.getLogger("transformers.generation").warning("Deprecated at import")
def test_it(): pass
"""
    result = run(tmp_path, test)
    assert result.returncode == 1
    assert "transformers.generation: Deprecated at import" in result.stdout


def test_other_log_messages_pass(tmp_path: Path) -> None:
    result = run(tmp_path, LOGGED.format(name="dtype", what="float32"))
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("module", "message", "category"),
    [
        ("transformers.models.auto", "use something else", "FutureWarning"),
        ("transformers.models.auto", "use something else", "DeprecationWarning"),
        ("flexselect.core.sets", "use something else", "FutureWarning"),
        ("other", "`x` will be removed in Transformers v6", "FutureWarning"),
    ],
)
def test_warned_deprecation_fails(tmp_path: Path, module: str, message: str, category: str) -> None:
    result = run(tmp_path, WARNED.format(module=module, message=message, category=category))
    assert result.returncode == 1
    assert f"{category}: {message}" in result.stdout


def test_warnings_of_strangers_pass(tmp_path: Path) -> None:
    test = WARNED.format(module="other", message="old", category="DeprecationWarning")
    result = run(tmp_path, test)
    assert result.returncode == 0, result.stdout


def test_the_hub_is_offline() -> None:
    code = "import huggingface_hub.constants as c; raise SystemExit(not c.HF_HUB_OFFLINE)"
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    subprocess.run([sys.executable, "-c", code], check=True)
