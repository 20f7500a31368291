"""What each family's golden data looks like, and how a case of it becomes the model's inputs.

A case is a folder with ``meta.json``, ``inputs.safetensors``, ``expected.safetensors``, ``model/``
and the folders of its Lite selectors. Everything is taken from these files; names of folders mean
nothing.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flexselect.core.architecture import Request
from flexselect.inference.features import Encoded


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
    taken: set[str] = field(default_factory=set)

    @property
    def family(self) -> Family:
        """How cases of its family are read."""
        return FAMILIES[self.meta["arch"]]

    @property
    def runs(self) -> list[Run]:
        """Every run with tensors, in the order of their names."""
        found = [re.fullmatch(r"(\w+)\.(\w+)\.selected", key) for key in sorted(self.expected)]
        return [Run(*match.groups()) for match in found if match]

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

    def untaken(self) -> list[str]:
        """Name the tensors that nobody asked for."""
        stored = [f"inputs:{key}" for key in self.inputs]
        stored += [f"expected:{key}" for key in self.expected]
        return [name for name in stored if name not in self.taken]

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
        self.taken.add(f"{file}:{key}")
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


class Family:
    """How a family's cases become inputs of its model, and where the reference errs."""

    #: Why the model cannot be asked without a method for the reference's baseline, if so.
    no_stock_baseline: str | None = None

    def model_inputs(self, case: Case, model: Any) -> dict[str, Tensor]:
        """Return what the family's processor would have made."""
        raise NotImplementedError

    def vision_features(self, model: Any, request: Request, encoded: Encoded) -> dict[str, Tensor]:
        """Return our counterparts of the vision tensors in inputs.safetensors."""
        raise NotImplementedError

    def known_errors(self, case: Case) -> list[str]:
        """Say where the reference is wrong in this case and we deliberately differ."""
        return []


class LlavaVideoFixtures(Family):
    """Ids come with one placeholder for the whole video; pixels are those of one video."""

    def model_inputs(self, case: Case, model: Any) -> dict[str, Tensor]:
        """Expand the placeholder, and put the pixels in a batch."""
        from flexselect.llava_video.modeling import video_tokens

        config, (ids,) = model.config, case.given("input_ids")
        (at,) = (ids == case.number("image_token_index")).nonzero()
        vocabulary = config.text_config.vocab_size
        if config.video_token_id >= vocabulary:
            # The tiny vocabulary ends before the placeholder; an id that no text uses stands in.
            unused = set(range(vocabulary)) - set(ids.tolist())
            config.video_token_id = max(unused)
        pixels = case.given("pixel_values")
        count = video_tokens(len(pixels), config.frame_grid, config.newline_position)
        video = torch.full((count,), config.video_token_id)
        expanded = torch.cat((ids[: int(at)], video, ids[int(at) + 1 :]))[None]
        return {
            "input_ids": expanded,
            "attention_mask": torch.ones_like(expanded),
            "pixel_values_videos": pixels[None],
        }

    def vision_features(self, model: Any, request: Request, encoded: Encoded) -> dict[str, Tensor]:
        """Return the patches as the tower puts them out, before any projector."""
        return {"vision_features": model.model.encode_pictures(request.pixels[0].values)}


class QwenFixtures(Family):
    """Ids come expanded; patches and grid are what the stock processor makes."""

    no_stock_baseline = (
        "transformers numbers the text after a video in another way since 5.3; the method Full "
        "passes the positions the model was trained with"
    )

    def model_inputs(self, case: Case, model: Any) -> dict[str, Tensor]:
        """Return the tensors as stored."""
        names = ("input_ids", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts")
        inputs = {name: case.given(name) for name in names}
        return {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}

    def vision_features(self, model: Any, request: Request, encoded: Encoded) -> dict[str, Tensor]:
        """Return what the merger, and the selector's merger, put out."""
        found = {"vision_features": encoded.features.model}
        if encoded.features.selector is not None:
            found["vision_features_selector"] = encoded.features.selector
        return found

    def known_errors(self, case: Case) -> list[str]:
        """Name the grid that the reference overwrote in the caller's tensor."""
        left = [case.facts(run).get("video_grid_thw_generate_kwarg_after") for run in case.runs]
        given = case.given("video_grid_thw").tolist()
        changed = sorted({str(grid) for grid in left if grid is not None and grid != given})
        if not changed:
            return []
        return [
            f"the reference overwrote the caller's video_grid_thw {given} with "
            f"{', '.join(changed)}; here it stays (compared as caller_inputs)"
        ]


#: ``arch`` of a meta.json: how its cases are read.
FAMILIES: dict[str, Family] = {
    "llava_video": LlavaVideoFixtures(),
    "qwen2_5_vl": QwenFixtures(),
}


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
    if meta["arch"] not in FAMILIES:
        raise FixtureError(
            f"meta.json: arch is {meta['arch']!r}; known are {', '.join(map(repr, FAMILIES))}"
        )
    return meta


def _read(folder: Path, name: str) -> dict[str, Tensor]:
    path = folder / f"{name}.safetensors"
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise FixtureError(f"{path.name} cannot be read: {error}") from error
