"""Presets: those that ship, how one is chosen for a model, and files that are wrong."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaModel,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3VLTextConfig,
    Qwen3VLTextModel,
)

from flexselect.core.errors import OptionError
from flexselect.inference import presets
from flexselect.inference.methods import FlexSelect
from flexselect.inference.policy import resolve_sampling
from flexselect.inference.presets import FOLDER, load_presets, preset_of
from flexselect.inference.registry import FAMILIES, architecture_of

FAMILY_NAMES = sorted({family for family, _ in FAMILIES.values()})
#: Every knob of a preset.
METHOD: dict[Any, Any] = {
    "layer": 1,
    "budget": 8,
    "aggregation": "max",
    "query": "all",
    "frames_per_set": 4,
    "positions": "compact",
}
#: Stands for a key that is left out.
GONE = object()


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
        write(tmp_path / f"{name}.yaml", {"match": match})
    monkeypatch.setattr(presets, "FOLDER", tmp_path)
    assert preset_of(model_of("internvl", 4, hidden_size=8)).name == "a"
    assert preset_of(model_of("internvl", 5, hidden_size=8)).name == "b"
    assert preset_of(model_of("internvl", 4, hidden_size=9)).name == "c"
    assert preset_of(model_of("internvl", 4)).name == "c"


def test_no_preset_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "sized.yaml", {"match": {"hidden_size": 8}})
    monkeypatch.setattr(presets, "FOLDER", tmp_path)
    for family, layers in (("internvl", 4), ("llava_video", 4)):
        with pytest.raises(
            OptionError, match=rf"no preset for {family} of .*9.*Add a file"
        ) as error:
            preset_of(model_of(family, layers, hidden_size=9))
        assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("name", "hidden", "layers", "layer"),
    [
        ("qwen2_5_vl", 2048, 36, 25),
        ("qwen2_5_vl-7b", 3584, 28, 20),
        ("qwen2_5_vl", 5120, 64, 46),
        ("qwen2_5_vl-72b", 8192, 80, 60),
        ("qwen3_vl", 2048, 28, 18),
        ("qwen3_vl", 2560, 36, 24),
        ("qwen3_vl-8b", 4096, 36, 24),
        ("qwen3_vl", 5120, 64, 42),
        ("llava_video-7b", 3584, 28, 19),
        ("llava_video", 8192, 80, 55),
        ("internvl", 2048, 24, 11),
        ("internvl2_5-8b", 4096, 32, 15),
        ("internvl", 6144, 48, 23),
    ],
)
def test_presets_of_the_real_sizes_resolve(name: str, hidden: int, layers: int, layer: int) -> None:
    """Sizes of published models; transformers builds their text models, without the weights."""
    [family] = [family for family in FAMILY_NAMES if name.startswith(family)]
    architecture = empty(family, hidden, layers)
    preset = preset_of(architecture)
    assert preset.name == name
    assert FlexSelect().resolve(architecture, preset.method).layer == layer
    assert resolve_sampling(architecture, preset, {}) == preset.video


def empty(family: str, hidden: int, layers: int) -> Any:
    """Build a model whose text model has this size and no weights."""
    heads = hidden // 128
    sizes: dict[str, Any] = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "intermediate_size": 64,
        "vocab_size": 64,
    }
    with init_empty_weights():
        decoder = {
            "qwen2_5_vl": lambda: Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**sizes)),
            "qwen3_vl": lambda: Qwen3VLTextModel(Qwen3VLTextConfig(**sizes)),
            "llava_video": lambda: Qwen2Model(Qwen2Config(**sizes)),
            "internvl": lambda: LlamaModel(LlamaConfig(**sizes)),
        }[family]()
    [name] = [name for name, (owner, _) in FAMILIES.items() if owner == family]
    model = type(name, (nn.Module,), {})()
    model.model = nn.Module()
    model.model.language_model = decoder
    return architecture_of(model)


def write(path: Path, changes: Mapping[Any, Any]) -> Path:
    content: dict[Any, Any] = {
        "family": "internvl",
        "match": {},
        "method": METHOD,
        "video": {"frames": 4},
        "source": "this test",
    }
    content |= changes
    path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not GONE}))
    return path


def method(**changes: Any) -> dict[str, Any]:
    """The knobs of a preset, some changed, those at `GONE` left out."""
    return {"method": {k: v for k, v in {**METHOD, **changes}.items() if v is not GONE}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": {}}, r"unknown keys \['methods'\] in the file"),
        ({3: 4, "methods": {}}, r"unknown keys \['3', 'methods'\] in the file"),
        (method(bugdet=3), r"unknown keys \['bugdet'\] in method"),
        ({"method": {**METHOD, 3: 4, "b": 5}}, r"unknown keys \['3', 'b'\] in method"),
        ({"video": {"frame": 3}}, r"unknown keys \['frame'\] in video"),
        ({"match": {"vocab_size": 3}}, r"unknown keys \['vocab_size'\] in match"),
        ({"family": GONE}, r"missing \['family'\]"),
        ({"source": GONE, "video": GONE}, r"missing \['video', 'source'\]"),
        ({"method": 3}, "method must be a mapping with keys of .*'budget'.* got 3"),
        ({"method": None}, "method must be a mapping with keys of .* got None"),
        ({"match": None}, "match must be a mapping with keys of .* got None"),
        ({"match": {"hidden_size": "8"}}, "match.hidden_size must be a whole number .* got '8'"),
        ({"video": ["fps"]}, r"video must be a mapping with keys of .* got \['fps'\]"),
        ({"video": {}}, "video must have either fps or frames"),
        ({"video": {"max_frames": 8}}, "video must have either fps or frames"),
        ({"video": {"fps": None}}, "video.fps must be a number, got None"),
        ({"video": {"fps": -1}}, "video: fps must be positive and finite, got -1"),
        ({"video": {"fps": "fast"}}, "video: fps must be a number, got 'fast'"),
        ({"video": {"fps": 1, "frames": 4}}, "video: Give either fps or frames"),
        ({"video": {"fps": 1, "min_frames": 9, "max_frames": 8}}, "video: max_frames .* below"),
        ({"family": "bert"}, "family must be one of .*'internvl'.* got 'bert'"),
        ({"family": ["internvl"]}, r"family must be one of .* got \['internvl'\]"),
        ({"source": ""}, "source must be text"),
        (method(layer="three"), "method.layer must be a whole number of at least 0, got 'three'"),
        (method(layer=True), "method.layer must be a whole number of at least 0, got True"),
        (method(layer=-1), "method.layer must be a whole number of at least 0, got -1"),
        (method(budget=0), "method.budget must be a whole number of at least 1, got 0"),
        (method(budget=None), "method.budget must be a whole number of at least 1, got None"),
        (method(layer_depth=0.5), "method must have either layer or layer_depth"),
        (method(layer=GONE), "method must have either layer or layer_depth"),
        (method(layer=GONE, layer_depth=1), "layer_depth must be a share .* to below 1, got 1"),
        (method(layer=GONE, layer_depth="half"), "layer_depth must be a share .* got 'half'"),
        (method(query="first"), r"method.query must be one of \['all', 'last'\], got 'first'"),
        (method(positions=["compact"]), "method.positions must be one of"),
        (method(query=GONE, budget=GONE), r"missing \['budget', 'query'\] in method"),
    ],
)
def test_wrong_files(tmp_path: Path, changes: dict[Any, Any], message: str) -> None:
    path = write(tmp_path / "wrong.yaml", changes)
    with pytest.raises(OptionError, match=message) as error:
        load_presets(tmp_path)
    assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file must be a mapping with keys of .*'family'.* got None"),
        ("just words", "the file must be a mapping"),
        ("a: [", "not readable as YAML: "),
        ("family: !!python/name:os.system", "not readable as YAML: "),
    ],
)
def test_files_that_hold_no_sections(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(OptionError, match=message) as error:
        load_presets(tmp_path)
    assert str(error.value).startswith(f"{path}: ")
