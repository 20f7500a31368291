"""Presets: those that ship, how one is chosen for a model, and files that are wrong."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from flexselect.core.errors import OptionError
from flexselect.inference import presets
from flexselect.inference.presets import FOLDER, load_presets, preset_of
from flexselect.inference.registry import FAMILIES

FAMILY_NAMES = sorted({family for family, _ in FAMILIES.values()})


def model_of(family: str, layers: int, **config: Any) -> Any:
    """Stand in for an architecture, as far as presets look at one."""
    decoder = SimpleNamespace(config=SimpleNamespace(num_hidden_layers=layers, **config))
    return SimpleNamespace(family=family, decoder=decoder, num_layers=layers)


@pytest.mark.parametrize(
    ("family", "sizes", "layer", "budget", "positions"),
    [
        ("qwen2_5_vl", {"layers": 28, "hidden_size": 3584}, 20, 7040, "original"),
        ("qwen2_5_vl", {"layers": 80, "hidden_size": 8192}, 60, 7040, "original"),
        ("llava_video", {"layers": 28, "hidden_size": 3584}, 19, 6720, "compact"),
        ("internvl", {"layers": 32, "hidden_size": 4096}, 15, 8256, "compact"),
    ],
)
def test_published_settings(
    family: str, sizes: dict[str, int], layer: int, budget: int, positions: str
) -> None:
    if family not in FAMILY_NAMES:
        pytest.skip(f"{family} is not in the registry")
    preset = preset_of(model_of(family, **sizes))
    assert preset.match
    assert preset.method["layer"] == layer
    assert preset.method["budget"] == budget
    assert preset.method["aggregation"] == "max"
    assert preset.method["frames_per_set"] == 64
    assert preset.method["positions"] == positions


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("layers", [1, 2, 4, 28, 64])
def test_a_size_nobody_studied_gets_a_depth(family: str, layers: int) -> None:
    preset = preset_of(model_of(family, layers, hidden_size=17))
    assert preset.name == family
    assert not preset.match
    assert "layer_depth" not in preset.method
    assert 0 <= preset.method["layer"] < layers
    if layers > 20:
        assert 0.4 < preset.method["layer"] / layers < 0.8


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_is_complete(path: Path) -> None:
    [preset] = [preset for preset in load_presets(FOLDER) if preset.name == path.stem]
    assert preset.family in FAMILY_NAMES
    knobs = {"budget", "aggregation", "query", "frames_per_set", "positions"}
    assert knobs <= set(preset.method)
    assert ("layer" in preset.method) != ("layer_depth" in preset.method)
    assert preset.source
    assert ("fps" in preset.video) != ("frames" in preset.video)


def test_the_most_specific_preset_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, match in [
        ("a", {"hidden_size": 8, "num_hidden_layers": 4}),
        ("b", {"hidden_size": 8}),
        ("c", {}),
    ]:
        write(tmp_path / f"{name}.yaml", match=match)
    monkeypatch.setattr(presets, "FOLDER", tmp_path)
    assert preset_of(model_of("f", 4, hidden_size=8)).name == "a"
    assert preset_of(model_of("f", 5, hidden_size=8)).name == "b"
    assert preset_of(model_of("f", 4, hidden_size=9)).name == "c"
    assert preset_of(model_of("f", 4)).name == "c"


def write(path: Path, **changes: Any) -> Path:
    content = {
        "family": "f",
        "match": {},
        "method": {"layer": 1, "budget": 8},
        "video": {"frames": 4},
        "source": "this test",
    }
    content |= changes
    path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": {}}, "unknown section 'methods'"),
        ({"method": {"bugdet": 3}}, r"unknown keys \['bugdet'\] in method"),
        ({"video": {"frame": 3}}, r"unknown keys \['frame'\] in video"),
        ({"match": {"vocab_size": 3}}, r"unknown keys \['vocab_size'\] in match"),
        ({"family": None}, r"missing \['family'\]"),
        ({"source": None, "video": None}, r"missing \['source', 'video'\]"),
    ],
)
def test_wrong_files(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "wrong.yaml", **changes)
    with pytest.raises(OptionError, match=message) as error:
        load_presets(tmp_path)
    assert str(path) in str(error.value)


def test_a_file_without_sections(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(OptionError, match=r"empty\.yaml: expected the sections"):
        load_presets(tmp_path)
