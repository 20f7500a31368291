"""One folder of golden data: its facts and tensors, and a note of which were used.

A case is a folder with ``meta.json``, ``inputs.safetensors``, ``expected.safetensors``, ``model/``
and the folders of its Lite selectors. Names of folders mean nothing.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


class FixtureError(Exception):
    """A folder cannot be checked: something is missing, damaged, or of an unknown format."""


class OtherData(Exception):
    """A folder of the golden data that holds no case."""


@dataclass(frozen=True)
class Run:
    """One answer of the reference: who ranked, and how relevance was aggregated."""

    mode: str
    aggregation: str

    @property
    def name(self) -> str:
        """Prefix of its tensors in expected.safetensors."""
        return f"{self.mode}.{self.aggregation}"


@dataclass(frozen=True)
class Case:
    """One folder of golden data.

    Attributes
    ----------
    folder : where it lies.
    meta : its meta.json.
    inputs, expected : its tensors.
    taken : names of the tensors that were asked for with `given` and `expect`.
    """

    folder: Path
    meta: dict[str, Any]
    inputs: dict[str, Tensor]
    expected: dict[str, Tensor]
    taken: set[tuple[str, str]] = field(default_factory=set)

    @property
    def runs(self) -> list[Run]:
        """Every run with tensors, in the order of their names."""
        found = [re.fullmatch(r"(\w+)\.(\w+)\.selected", key) for key in sorted(self.expected)]
        return [Run(match[1], match[2]) for match in found if match]

    def facts(self, run: Run) -> dict[str, Any]:
        """Return what meta.json says of a run."""
        return self.meta.get("runs", {}).get(run.name, {})

    def number(self, name: str) -> int:
        """Return a whole number of meta.json."""
        value = self.meta.get(name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise FixtureError(f"meta.json: {name} must be a whole number, got {value!r}")
        return value

    def given(self, key: str) -> Tensor:
        """Return a tensor of inputs.safetensors."""
        return self._take("inputs", key)

    def expect(self, key: str) -> Tensor:
        """Return a tensor of expected.safetensors."""
        return self._take("expected", key)

    def untaken(self) -> list[tuple[str, str]]:
        """Name the tensors that nobody asked for, as (file, key)."""
        stored = [("inputs", key) for key in self.inputs]
        stored += [("expected", key) for key in self.expected]
        return [name for name in stored if name not in self.taken]

    def masks(self, run: Run) -> list[Tensor]:
        """Return what was picked of every set that was scored in a run, set after set."""
        found = [re.fullmatch(rf"{run.name}\.set(\d+)\.mask", key) for key in self.expected]
        numbers = sorted(int(match[1]) for match in found if match)
        if not numbers and self.facts(run).get("returned_all_mask") is False:
            raise FixtureError(
                f"expected.safetensors has no sets of {run.name}, which did not keep all"
            )
        if numbers != list(range(len(numbers))):
            raise FixtureError(f"expected.safetensors has only the sets {numbers} of {run.name}")
        return [self.expect(f"{run.name}.set{number}.mask") for number in numbers]

    def selector_folder(self, mode: str) -> Path | None:
        """Return the folder of the Lite selector that ranks in ``mode``; None for the model."""
        if mode == "self":
            return None
        patterns = self.meta.get("selector_dirs", {"lite": "selector"})
        for pattern, name in patterns.items():
            if fnmatchcase(mode, pattern):
                if not (self.folder / name).is_dir():
                    raise FixtureError(f"{name}/ is missing")
                return self.folder / name
        raise FixtureError(f"meta.json: selector_dirs has no folder for mode {mode!r}")

    def _take(self, file: str, key: str) -> Tensor:
        stored: dict[str, Tensor] = getattr(self, file)
        if key not in stored:
            raise FixtureError(f"{file}.safetensors has no tensor {key}")
        self.taken.add((file, key))
        return stored[key]


def read_case(folder: Path) -> Case:
    """Read a folder of golden data, or raise `FixtureError`."""
    meta = _read_meta(folder)
    case = Case(folder, meta, _read(folder, "inputs"), _read(folder, "expected"))
    if not (folder / "model").is_dir():
        raise FixtureError("model/ is missing")
    if not case.runs:
        raise FixtureError("expected.safetensors has no run, that is no <mode>.<how>.selected")
    missing = set(meta.get("runs", {})) - {run.name for run in case.runs}
    if missing:
        raise FixtureError(f"meta.json lists runs without tensors: {', '.join(sorted(missing))}")
    return case


def _read_meta(folder: Path) -> dict[str, Any]:
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise FixtureError(f"meta.json cannot be read: {error}") from error
    except ValueError as error:
        raise FixtureError(f"meta.json is not JSON: {error}") from error
    if (folder / "spearman.safetensors").is_file():
        raise OtherData(
            "values of the training loss, no case of a model; tests/core/test_spearman.py compares "
            "them"
        )
    if not isinstance(meta, dict) or "arch" not in meta:
        raise FixtureError("meta.json describes no case: it has no arch")
    return meta


def _read(folder: Path, name: str) -> dict[str, Tensor]:
    path = folder / f"{name}.safetensors"
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise FixtureError(f"{path.name} cannot be read: {error}") from error
