"""A model without the layers of its text model: everything else is there, and strictly so."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexselect.core.errors import CheckpointError
from flexselect.core.loading import LAYERS
from flexselect.inference.presets import preset_of
from flexselect.inference.registry import architecture_of, load_model, load_processor, load_tower
from flexselect.testbed.locate import FAMILIES, checkpoint_folder


def folder_of(family: str) -> Path:
    try:
        return checkpoint_folder(family)
    except CheckpointError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_but_the_layers_is_the_model_s(
    family: str, dtype: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(family)
    whole = load_model(folder, dtype, device="cpu")
    capfd.readouterr()
    model = load_tower(folder, dtype, device="cpu")
    assert "UNEXPECTED" not in "".join(capfd.readouterr())
    weights = dict(whole.named_parameters())
    for name, weight in model.named_parameters():
        assert weight.is_meta == name.startswith(f"{LAYERS}.")
        assert (weight.dtype, weight.shape) == (weights[name].dtype, weights[name].shape)
        assert weight.is_meta or torch.equal(weight, weights[name])
    assert len(list(model.parameters())) == len(weights)
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert model.config.to_dict() == whole.config.to_dict()
    assert (model.device, model.dtype) == (whole.device, whole.dtype)

    ours, theirs = architecture_of(model), architecture_of(whole)
    assert ours.num_layers == theirs.num_layers
    assert preset_of(ours) == preset_of(theirs)
    pictures = torch.randint(0, 256, (4, 3, 56, 56), dtype=torch.uint8)
    pixels = theirs.pixels(load_processor(folder), pictures, 1.0)
    with torch.no_grad():
        assert torch.equal(ours.encode(pixels, None)[0], theirs.encode(pixels, None)[0])
    ids = torch.arange(20)
    assert torch.equal(ours.embed(ids), theirs.embed(ids))


def test_a_missing_weight_is_an_error_wherever_it_is_missing(tmp_path: Path) -> None:
    folder = folder_of("internvl")
    tensors = load_file(folder / "model.safetensors")
    layers = [name for name in tensors if "language_model" in name and ".layers." in name]
    tower = [name for name in tensors if "vision" in name]
    for gone in (layers[7], tower[3]):
        broken = tmp_path / gone
        shutil.copytree(folder, broken)
        kept = {name: tensor for name, tensor in tensors.items() if name != gone}
        save_file(kept, broken / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=r"does not fit.*missing_keys"):
            load_tower(broken, device="cpu")
