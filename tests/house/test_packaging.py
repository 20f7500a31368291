"""What is built from this repository, and that nothing of it was forgotten."""

from __future__ import annotations

import ast
import fnmatch
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import flexselect
from flexselect.tests.paths import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
NOT_PACKAGES = {"tests", "scripts", "build", "dist"}


def folders_with_code() -> set[str]:
    """Return the dotted name of every folder of the library that holds a module."""
    found = {"flexselect"}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).parts[:-1]
        if parts and parts[0] not in NOT_PACKAGES and not any(p.startswith(".") for p in parts):
            found.add(".".join(("flexselect", *parts)))
    return found


def test_every_folder_of_the_house_is_a_package() -> None:
    assert sorted(SETUPTOOLS["packages"]) == sorted(folders_with_code())
    for name in SETUPTOOLS["packages"]:
        folder = ROOT.joinpath(*name.split(".")[1:])
        assert (folder / "__init__.py").is_file(), f"{name} has no __init__.py"


def test_version_is_written_once() -> None:
    assert "version" in PROJECT["project"]["dynamic"]
    assert importlib.metadata.version("flexselect") == flexselect.__version__


def test_the_installed_package_is_this_tree() -> None:
    assert Path(flexselect.__file__).parent == ROOT


def test_console_script_runs() -> None:
    command = shutil.which("flexselect", path=str(Path(sys.executable).parent))
    assert command, "the console script is not installed"
    result = subprocess.run([command, "--help"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Usage" in result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names in a wheel built from a copy of the tree, as a user's pip would build it."""
    tree = tmp_path_factory.mktemp("tree") / "checkout"
    skip = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "outputs")
    shutil.copytree(ROOT, tree, ignore=skip)
    (tree / ".venv" / "lib").mkdir(parents=True)
    (tree / ".venv" / "lib" / "stray.py").touch()
    build = "from setuptools import build_meta; print(build_meta.build_wheel('built'))"
    result = subprocess.run(
        [sys.executable, "-c", build], cwd=tree, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    (archive,) = (tree / "built").glob("*.whl")
    with zipfile.ZipFile(archive) as file:
        return set(file.namelist())


def test_wheel_holds_the_library_and_nothing_else(wheel: set[str]) -> None:
    expected = set()
    for name in SETUPTOOLS["packages"]:
        folder = ROOT.joinpath(*name.split(".")[1:])
        expected |= {f"{name.replace('.', '/')}/{path.name}" for path in folder.glob("*.py")}
        for pattern in SETUPTOOLS["package-data"].get(name, []):
            found = [path for path in folder.glob(pattern) if path.is_file()]
            expected |= {f"{name.replace('.', '/')}/{p.relative_to(folder)}" for p in found}
    content = {name for name in wheel if ".dist-info/" not in name}
    assert content == expected
    assert "flexselect/py.typed" in content


def test_wheel_carries_the_licence(wheel: set[str]) -> None:
    assert fnmatch.filter(wheel, "flexselect-*.dist-info/licenses/LICENSE")


def third_party_imports() -> dict[str, set[str]]:
    """Return top-level module → files of the library and its scripts that import it."""
    found: dict[str, set[str]] = {}
    for path in sorted(ROOT.rglob("*.py")):
        relative = path.relative_to(ROOT)
        if relative.parts[0] == "tests" or any(p.startswith(".") for p in relative.parts):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for name in names:
                top = name.split(".")[0]
                if top not in sys.stdlib_module_names and top != "flexselect":
                    found.setdefault(top, set()).add(str(relative))
    return found


def test_everything_imported_is_a_declared_dependency() -> None:
    declared = {
        canonicalize_name(Requirement(line).name)
        for lines in (
            PROJECT["project"]["dependencies"],
            *PROJECT["project"]["optional-dependencies"].values(),
        )
        for line in lines
    }
    distributions = {
        "PIL": "pillow",
        "griffe": "griffelib",
        "yaml": "pyyaml",
        "lmms_eval": "lmms-eval",
        "sklearn": "scikit-learn",
    }
    undeclared = {
        module: files
        for module, files in third_party_imports().items()
        if canonicalize_name(distributions.get(module, module)) not in declared
    }
    assert not undeclared


# Pins ------------------------------------------------------------------------------------------


def pins(python: str) -> dict[str, Version]:
    """Return the pinned version of every distribution for a Python version like ``"3.10"``."""
    found: dict[str, Version] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        requirement = Requirement(line)
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", f"not an exact pin: {line}"
        assert requirement.url is None, f"a place, not a version: {line}"
        if requirement.marker is None or requirement.marker.evaluate({"python_version": python}):
            name = canonicalize_name(requirement.name)
            assert name not in found, f"{name} is pinned twice for Python {python}"
            found[name] = Version(specifier.version)
    return found


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12"])
def test_pins_satisfy_what_the_project_asks_for(python: str) -> None:
    pinned = pins(python)
    lines = [
        *PROJECT["project"]["dependencies"],
        *PROJECT["project"]["optional-dependencies"]["dev"],
        *PROJECT["project"]["optional-dependencies"]["qwen"],
    ]
    for requirement in map(Requirement, lines):
        name = canonicalize_name(requirement.name)
        if name == "flexselect":
            continue
        if requirement.marker and not requirement.marker.evaluate({"python_version": python}):
            continue
        assert requirement.specifier.contains(pinned[name]), f"{requirement}: {pinned[name]}"


def test_all_that_is_installed_for_development_is_pinned() -> None:
    pinned = pins(".".join(map(str, sys.version_info[:2])))
    unpinned = {
        name: importlib.metadata.version(name)
        for name in closure("flexselect", {"dev"}) - {"flexselect"}
        if Version(importlib.metadata.version(name)) != pinned.get(name)
    }
    assert not unpinned, "differs from constraints.txt; run `make install`"


def closure(name: str, extras: set[str]) -> set[str]:
    """Return the names of the installed distributions that ``name[extras]`` brings."""
    seen: set[tuple[str, frozenset[str]]] = set()
    todo = [(name, frozenset(extras))]
    while todo:
        item = todo.pop()
        if item in seen:
            continue
        seen.add(item)
        for line in importlib.metadata.requires(item[0]) or []:
            requirement = Requirement(line)
            environments = [{"extra": extra} for extra in item[1] or {""}]
            if requirement.marker and not any(map(requirement.marker.evaluate, environments)):
                continue
            todo.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return {item[0] for item in seen}


def test_supported_pythons_agree() -> None:
    supported = SpecifierSet(PROJECT["project"]["requires-python"])
    versions = [f"3.{minor}" for minor in range(20) if supported.contains(f"3.{minor}")]
    classifiers = PROJECT["project"]["classifiers"]
    assert versions == [c.rsplit(" ", 1)[1] for c in classifiers if re.search(r":: 3\.\d", c)]
    assert PROJECT["tool"]["ruff"]["target-version"] == "py" + versions[0].replace(".", "")


@pytest.mark.skipif(not shutil.which("git") or not (ROOT / ".git").exists(), reason="no git")
def test_no_generated_file_is_tracked() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    command = ["git", "ls-files", "--cached", "--ignored", "--exclude-standard"]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert not result.stdout.split()
