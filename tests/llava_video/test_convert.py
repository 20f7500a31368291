"""Original checkpoints convert whole: on the fly, to a folder, and for the Lite selector."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    GenerationConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    Qwen2Tokenizer,
)

from flexselect.core.checkpoint import Checkpoint, plan_conversion, shapes
from flexselect.core.errors import CheckpointError, OptionError
from flexselect.llava_video.convert import (
    convert_checkpoint,
    empty_model,
    load_original,
    load_processor,
)
from flexselect.llava_video.loading import load_selector
from flexselect.llava_video.modeling import frame_features
from flexselect.llava_video.original import (
    convert_config,
    convert_tensor,
    ignored_keys,
    is_original,
    selector_tensor,
    tied_keys,
)
from flexselect.llava_video.selector import LlavaVideoSelector, LlavaVideoSelectorConfig
from tests.paths import FIXTURES, needs_fixtures

from .conftest import Golden, prompt, tiny_model

ORIGINAL_KEYS = {
    "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
    "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
    "model.language_model.": "model.",
}


def original(folder: Path, tie: bool = False, **changes: Any) -> dict[str, Tensor]:
    """Write the tiny model in LLaVA-NeXT's format and return its stored tensors."""
    model = tiny_model(tie_word_embeddings=tie)
    text, vision = model.config.text_config, model.config.vision_config
    config = {
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": "llava_qwen",
        **{
            name: getattr(text, name)
            for name in (
                "hidden_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "intermediate_size",
                "vocab_size",
                "rms_norm_eps",
            )
        },
        "rope_theta": 1e6,
        "tie_word_embeddings": tie,
        "image_aspect_ratio": "anyres_max_9",
        "image_grid_pinpoints": [[20, 20], [20, 40]],
        "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "spatial_unpad",
        "mm_spatial_pool_mode": "bilinear",
        "mm_spatial_pool_stride": 2,
        "mm_newline_position": "grid",
        "mm_vision_tower": "google/siglip-so400m-patch14-384",
    } | changes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))
    tower = {
        name: getattr(vision, name)
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "image_size",
            "patch_size",
        )
    }
    (folder / "vision_config.json").write_text(
        json.dumps(tower | {"num_hidden_layers": vision.num_hidden_layers + 1})
    )
    tensors = {}
    for name, value in model.state_dict().items():
        if tie and name == "lm_head.weight":
            continue
        for new, old in ORIGINAL_KEYS.items():
            if name.startswith(new):
                name = old + name[len(new) :]
                break
        tensors[name] = value.clone()
    save_file(tensors, folder / "model.safetensors")
    return tensors


def inputs_of(model: Any) -> dict[str, Tensor]:
    """Show a video of two frames; the placeholder of the stored config is out of vocabulary."""
    model.config.video_token_index = 399
    generator = torch.Generator().manual_seed(1)
    return {
        "input_ids": prompt(model, 2),
        "pixel_values_videos": torch.randn(1, 2, 3, 20, 20, generator=generator),
    }


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs_of(model)).logits


def blank(sizes: Mapping[str, list[int]]) -> dict[str, Tensor]:
    return {name: torch.empty(size, device="meta") for name, size in sizes.items()}


@needs_fixtures
class TestRealKeys:
    def test_every_key_of_the_7b_model_has_a_place(self, tmp_path: Path) -> None:
        """The tower is known by its name; nothing is left over on either side."""
        keys = json.loads((FIXTURES / "keymaps" / "llava_video_7b_qwen2.json").read_text())
        original(
            tmp_path,
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            vocab_size=152064,
        )
        (tmp_path / "vision_config.json").unlink()
        config = convert_config(tmp_path)
        model = empty_model(config)
        arguments: dict[str, Any] = {"ignored": ignored_keys(config), "tied": tied_keys(config)}
        plan = plan_conversion(blank(keys), shapes(model), convert_tensor, **arguments)
        assert plan.routes.keys() == keys.keys()
        assert plan.blank.keys() == dict(model.named_parameters()).keys()
        assert config.frame_grid == (14, 15)
        for name in ("model.image_newline", "model.layers.27.mlp.up_proj.weight"):
            fewer = {key: size for key, size in keys.items() if key != name}
            with pytest.raises(CheckpointError, match="1 parameters of the model are not"):
                plan_conversion(blank(fewer), shapes(model), convert_tensor, **arguments)

    def test_every_key_of_the_published_selector_has_a_place(self) -> None:
        keys = json.loads((FIXTURES / "keymaps" / "selector_llava_qwen2_0.5b.json").read_text())
        text = Qwen2Config(
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            vocab_size=151936,
        )
        with torch.device("meta"):
            selector = LlavaVideoSelector(LlavaVideoSelectorConfig(text_config=text))
        plan = plan_conversion(blank(keys), shapes(selector), selector_tensor)
        assert plan.routes.keys() == keys.keys()
        assert plan.blank.keys() == dict(selector.named_parameters()).keys()


class TestGolden:
    def test_lite_selector_embeddings(self, golden: Golden) -> None:
        """The selector's own projector, newline and table, from the tower features of the model."""
        model = load_original(golden.folder / "model")
        selector = load_selector(str(golden.folder / "selector"), model)
        with torch.no_grad():
            frames = frame_features(
                golden.inputs["vision_features"],
                selector.projector,
                selector.image_newline,
                model.config,
            )
            before, after = golden.around(selector.language_model.embed_tokens)
        torch.testing.assert_close(
            torch.cat((before, frames.flatten(0, 1), after)),
            golden.expected["lite.selector_inputs_embeds"],
            rtol=1e-4,
            atol=1e-4,
        )

    def test_a_converted_checkpoint_is_the_model(self, golden: Golden, tmp_path: Path) -> None:
        target = convert_checkpoint(golden.folder / "model", tmp_path / "model")
        converted, report = AutoModelForImageTextToText.from_pretrained(
            target, output_loading_info=True
        )
        assert not any(report.values())
        loaded = load_original(golden.folder / "model")
        state = loaded.state_dict()
        assert converted.state_dict().keys() == state.keys()
        assert all(torch.equal(v, state[k]) for k, v in converted.state_dict().items())
        with torch.no_grad():
            patches = converted.model.encode_pictures(golden.inputs["pixel_values"])
        torch.testing.assert_close(patches, golden.inputs["vision_features"], rtol=1e-4, atol=1e-4)
        assert converted.generation_config.eos_token_id == 2
        assert loaded.generation_config.eos_token_id == 2


class TestLoading:
    def test_on_the_fly_equals_the_written_model(
        self, tmp_path: Path, tokenizer: Qwen2Tokenizer
    ) -> None:
        """In another process, that has only imported the family, and with its processor."""
        source, target = tmp_path / "source", tmp_path / "target"
        original(source)
        tokenizer.save_pretrained(source)
        convert_checkpoint(source, target, dtype=torch.bfloat16)
        loaded = load_original(source, dtype=torch.bfloat16)
        assert loaded.dtype == torch.bfloat16
        assert not loaded.training
        script = (
            "import sys, torch\n"
            "import flexselect.llava_video.processing\n"
            "from safetensors.torch import save_file\n"
            "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
            "model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])\n"
            "processor = AutoProcessor.from_pretrained(sys.argv[1])\n"
            "video = torch.arange(2 * 3 * 8 * 8).view(2, 3, 8, 8).to(torch.uint8)\n"
            "inputs = processor(text='<video>\\nWhat?', videos=[video], return_tensors='pt')\n"
            "logits = model(**inputs.to(torch.bfloat16)).logits\n"
            "save_file({'logits': logits.detach()}, sys.argv[2])\n"
        )
        subprocess.run(
            [sys.executable, "-c", script, str(target), str(tmp_path / "out.safetensors")],
            check=True,
            timeout=120,
        )
        processor = load_processor(source)
        video = torch.arange(2 * 3 * 8 * 8).view(2, 3, 8, 8).to(torch.uint8)
        inputs = processor(text="<video>\nWhat?", videos=[video], return_tensors="pt")
        with torch.no_grad():
            expected = loaded(**inputs.to(torch.bfloat16)).logits
        assert torch.equal(load_file(tmp_path / "out.safetensors")["logits"], expected)

    def test_placeholders_are_the_tokenizers(
        self, tmp_path: Path, tokenizer: Qwen2Tokenizer
    ) -> None:
        original(tmp_path)
        config = convert_config(tmp_path)
        assert (config.image_token_index, config.video_token_index) == (151646, 151647)
        size = len(tokenizer)
        tokenizer.save_pretrained(tmp_path)
        config = convert_config(tmp_path)
        assert (config.image_token_index, config.video_token_index) == (size, size + 1)
        processor = load_processor(tmp_path, config)
        assert processor.tokenizer.padding_side == "left"
        assert (processor.image_token_id, processor.video_token_id) == (size, size + 1)
        original(tmp_path, vocab_size=size)
        with pytest.raises(CheckpointError, match="leaves no room for the placeholders"):
            convert_config(tmp_path)

    def test_without_a_tokenizer_there_is_no_processor(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        original(tmp_path / "source")
        target = convert_checkpoint(tmp_path / "source", tmp_path / "target")
        assert "no processor is written" in caplog.text
        assert sorted(path.name for path in target.iterdir()) == [
            "config.json",
            "generation_config.json",
            "model.safetensors",
        ]
        assert GenerationConfig.from_pretrained(target).eos_token_id == [2, 3]
        with pytest.raises(CheckpointError, match="has no tokenizer"):
            load_processor(tmp_path / "source")

    def test_llava_onevision_loads_with_its_one_newline(self, tmp_path: Path) -> None:
        """Its config is silent about newlines, and its logits are those of the stock class."""
        tensors = original(tmp_path, mm_newline_position=None, model_type="llava")
        model = load_original(tmp_path)
        assert model.config.newline_position == "one_token"
        fields = model.config.to_dict() | {"model_type": "llava_onevision"}
        fields["video_token_index"] = 399
        stock = LlavaOnevisionForConditionalGeneration(
            LlavaOnevisionConfig.from_dict(fields)
        ).eval()
        stock.load_state_dict(dict(convert_tensor(k, v)[0] for k, v in tensors.items()))
        with torch.no_grad():
            expected = stock(**inputs_of(model)).logits
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)

    def test_the_packing_can_be_chosen(self, tmp_path: Path) -> None:
        original(tmp_path, mm_spatial_pool_mode="average")
        config = load_original(tmp_path).config
        assert (config.spatial_pool_mode, config.frame_grid) == ("average", (2, 3))
        config = load_original(
            tmp_path, spatial_pool_mode="bilinear", newline_position="no_token"
        ).config
        assert config.frame_grid == (3, 3)
        with pytest.raises(OptionError, match="spatial_pool_mode"):
            load_original(tmp_path, spatial_pool_mode="cubic")

    def test_tied_embeddings(self, tmp_path: Path) -> None:
        original(tmp_path / "source", tie=True)
        model = load_original(tmp_path / "source")
        assert model.lm_head.weight is model.get_input_embeddings().weight
        target = convert_checkpoint(tmp_path / "source", tmp_path / "target")
        assert "lm_head.weight" not in Checkpoint(target).blank
        converted = AutoModelForImageTextToText.from_pretrained(target)
        assert torch.equal(logits(converted), logits(model))

    def test_computed_tables_may_be_stored(self, tmp_path: Path) -> None:
        tensors = original(tmp_path)
        table = "model.layers.{}.self_attn.rotary_emb.inv_freq"
        tensors |= {table.format(layer): torch.ones(4) for layer in range(2)}
        save_file(tensors, tmp_path / "model.safetensors")
        load_original(tmp_path)
        save_file(tensors | {table.format(2): torch.ones(4)}, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"layers\.2\.self_attn\.rotary_emb\.inv_freq"):
            load_original(tmp_path)

    def test_device_map_places_every_part(self, tmp_path: Path) -> None:
        original(tmp_path)
        expected = logits(load_original(tmp_path))
        for device_map in ("cpu", "auto", {"model": "cpu", "lm_head": "cpu"}):
            assert torch.equal(logits(load_original(tmp_path, device_map=device_map)), expected)
        with pytest.raises(OptionError, match="no device for lm_head"):
            load_original(tmp_path, device_map={"model": "cpu"})

    def test_attention_is_the_callers_choice(self, tmp_path: Path) -> None:
        original(tmp_path)
        eager = load_original(tmp_path, attn_implementation="eager")
        assert eager.config.text_config._attn_implementation == "eager"
        torch.testing.assert_close(
            logits(eager), logits(load_original(tmp_path)), rtol=1e-4, atol=1e-4
        )


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"model_type": "llama", "architectures": ["X"]}, "expected 'llava_qwen'"),
            ({"mm_projector_type": "linear"}, "mm_projector_type must be 'mlp2x_gelu'"),
            ({"mm_resampler_type": "spatial_pool"}, "mm_resampler_type must be None"),
            ({"add_faster_video": True}, "add_faster_video must be False"),
            ({"mm_patch_merge_type": "flat"}, "mm_patch_merge_type"),
            ({"rope_theta": None}, "lacks rope_theta"),
            ({"hidden_size": None}, "lacks hidden_size"),
            ({"mm_vision_tower": "openai/clip-vit-large-patch14-336"}, "tower .* is unknown"),
        ],
    )
    def test_an_unsupported_setting_is_named(
        self, tmp_path: Path, change: dict[str, Any], message: str
    ) -> None:
        original(tmp_path, **change)
        (tmp_path / "vision_config.json").unlink()
        with pytest.raises(CheckpointError, match=message) as caught:
            convert_config(tmp_path)
        assert str(tmp_path / "config.json") in str(caught.value)

    def test_a_missing_weight_is_not_left_random(self, tmp_path: Path) -> None:
        tensors = original(tmp_path)
        del tensors["model.image_newline"]
        save_file(tensors, tmp_path / "model.safetensors")
        for act in (load_original, lambda path: convert_checkpoint(path, tmp_path / "target")):
            with pytest.raises(CheckpointError, match=r"not in the checkpoint: model\.image_newl"):
                act(tmp_path)
        assert not (tmp_path / "target").exists()

    def test_rope_scaling_is_ignored_aloud(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        original(tmp_path, rope_scaling={"type": "linear", "factor": 2.0})
        config = convert_config(tmp_path)
        assert config.text_config.rope_parameters["rope_type"] == "default"
        assert "rope_scaling is ignored" in caplog.text

    def test_original_checkpoints_are_told_apart(self, tmp_path: Path) -> None:
        original(tmp_path / "source")
        assert is_original(tmp_path / "source")
        assert not is_original(convert_checkpoint(tmp_path / "source", tmp_path / "target"))
        assert not is_original(tmp_path)
        with pytest.raises(CheckpointError, match="from_pretrained"):
            load_original(tmp_path / "target")
