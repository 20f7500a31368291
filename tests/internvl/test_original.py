"""Configuration and keys: the released key lists, and the golden numbers behind every name."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlamaModel,
    Qwen2Model,
)
from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector

from flexselect.core.checkpoint import plan_conversion, shapes
from flexselect.core.decoder import reference_states
from flexselect.core.errors import CheckpointError, OptionError, UnsupportedModelError
from flexselect.core.relevance import Aggregation, relevance
from flexselect.internvl.original import (
    convert_config,
    convert_tensor,
    convert_text_config,
    selector_tensor,
)

Golden = Callable[[str], dict[str, Tensor]]

#: What the released InternVL2_5-8B says of itself, as far as it decides a shape or a number.
CONFIG_8B: dict[str, Any] = {
    "model_type": "internvl_chat",
    "ps_version": "v2",
    "downsample_ratio": 0.5,
    "force_image_size": 448,
    "select_layer": -1,
    "template": "internvl2_5",
    "llm_config": {
        "model_type": "internlm2",
        "vocab_size": 92553,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "bias": False,
        "tie_word_embeddings": False,
    },
    "vision_config": {
        "model_type": "intern_vit_6b",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 448,
        "patch_size": 14,
        "qkv_bias": True,
        "qk_normalization": False,
        "norm_type": "layer_norm",
        "layer_norm_eps": 1e-6,
    },
}


def key_list(fixtures: Path, name: str) -> dict[str, Tensor]:
    entries = json.loads((fixtures / "keymaps" / f"{name}.json").read_text())
    return {key: torch.empty(shape, device="meta") for key, shape in entries.items()}


def selector_modules(text: Any, vision_width: int) -> nn.Module:
    """The selector's layout out of stock parts: ``language_model`` and ``projector``."""
    config = convert_config(CONFIG_8B)
    config.text_config = text
    config.vision_config.hidden_size = vision_width
    module = nn.Module()
    module.language_model = AutoModel.from_config(text)
    module.projector = InternVLMultiModalProjector(config)
    return module.eval()


# -- released key lists ------------------------------------------------------------------------


def test_every_key_of_the_released_8b_has_its_place(fixtures: Path) -> None:
    config = convert_config(CONFIG_8B)
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(config)
    stored = key_list(fixtures, "internvl2_5_8b")
    convert = partial(convert_tensor, text_config=config.text_config)
    plan = plan_conversion(stored, shapes(model), convert)
    assert set(plan.blank) == set(shapes(model))
    assert set(plan.routes) == set(stored)
    assert config.image_token_id == 92546
    assert config.image_seq_length == 256


@pytest.mark.parametrize(
    "lost",
    [
        "vision_model.encoder.layers.23.attn.qkv.bias",
        "language_model.model.layers.31.attention.wqkv.weight",
        "mlp1.0.weight",
        "language_model.output.weight",
    ],
)
def test_a_lost_key_of_the_8b_is_missed(fixtures: Path, lost: str) -> None:
    config = convert_config(CONFIG_8B)
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(config)
    stored = key_list(fixtures, "internvl2_5_8b")
    del stored[lost]
    with pytest.raises(CheckpointError, match="not in the checkpoint"):
        plan_conversion(
            stored, shapes(model), partial(convert_tensor, text_config=config.text_config)
        )


@pytest.mark.parametrize(
    ("name", "config"),
    [
        (
            f"selector_internvl_qwen2_0.5b_vocab{vocabulary}",
            {
                "model_type": "qwen2",
                "vocab_size": vocabulary,
                "hidden_size": 896,
                "intermediate_size": 4864,
                "num_hidden_layers": 24,
                "num_attention_heads": 14,
                "num_key_value_heads": 2,
                "rope_theta": 1e6,
                "tie_word_embeddings": True,
            },
        )
        for vocabulary in (151936, 151674)
    ]
    + [
        (
            "selector_internvl_internlm2_1.8b_hypothetical",
            {
                "model_type": "internlm2",
                "vocab_size": 92553,
                "hidden_size": 2048,
                "intermediate_size": 8192,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
            },
        )
    ],
)
def test_every_key_of_a_selector_has_its_place(
    fixtures: Path, name: str, config: dict[str, Any]
) -> None:
    text = convert_text_config(config)
    with torch.device("meta"):
        module = selector_modules(text, 1024)
    stored = key_list(fixtures, name)
    plan = plan_conversion(stored, shapes(module), partial(selector_tensor, text_config=text))
    assert set(plan.blank) == set(shapes(module))
    assert set(plan.routes) == set(stored)


def test_nested_selector_configuration_is_read_too() -> None:
    flat = CONFIG_8B["llm_config"]
    assert convert_text_config(CONFIG_8B).to_dict() == convert_text_config(flat).to_dict()


def test_unknown_keys_stay_unknown() -> None:
    text = convert_config(CONFIG_8B).text_config
    blank = torch.empty(4, 4)
    for name in (
        "vision_model.head.weight",
        "vision_model.encoder.layers.0.attn.bias",
        "mlp1.2.weight",
        "language_model.base_model.model.lora.weight",
        "optimizer.step",
    ):
        assert convert_tensor(name, blank, text)[0][0] == name
    assert selector_tensor("language_model.lm_head.weight", blank, text)[0][0] == (
        "language_model.lm_head.weight"
    )


def test_wrong_number_of_fused_rows_is_named() -> None:
    text = convert_config(CONFIG_8B).text_config
    name = "language_model.model.layers.0.attention.wqkv.weight"
    with pytest.raises(CheckpointError, match=r"wqkv.*has 6143 rows.*make 6144"):
        convert_tensor(name, torch.empty(6143, 8), text)


# -- layouts, checked against plain arithmetic -------------------------------------------------


def test_wqkv_rows_go_to_their_heads() -> None:
    text = LlamaConfig(hidden_size=12, num_attention_heads=6, num_key_value_heads=2)
    # One row a (kv head, slot, channel), told by its number: slots are 3 queries, key, value.
    rows = [100 * kv + 10 * slot + c for kv in range(2) for slot in range(5) for c in range(2)]
    name = "language_model.model.layers.7.attention.wqkv.{}"
    for leaf, fused in (("weight", torch.tensor(rows)[:, None]), ("bias", torch.tensor(rows))):
        got = dict(convert_tensor(name.format(leaf), fused, text))
        base = "model.language_model.layers.7.self_attn"
        assert {key: value.flatten().tolist() for key, value in got.items()} == {
            f"{base}.q_proj.{leaf}": [0, 1, 10, 11, 20, 21, 100, 101, 110, 111, 120, 121],
            f"{base}.k_proj.{leaf}": [30, 31, 130, 131],
            f"{base}.v_proj.{leaf}": [40, 41, 140, 141],
        }


def test_6b_tower_keeps_its_norms() -> None:
    vision = CONFIG_8B["vision_config"] | {
        "qk_normalization": True,
        "qkv_bias": False,
        "norm_type": "rms_norm",
    }
    config = convert_config(CONFIG_8B | {"vision_config": vision})
    config.vision_config.num_hidden_layers = config.text_config.num_hidden_layers = 1
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(config)
    layer = "vision_model.encoder.layers.0"
    stored: dict[str, tuple[int, ...]]
    stored = {f"{layer}.{norm}.weight": (1024,) for norm in ("attn.q_norm", "attn.k_norm")}
    stored |= {f"{layer}.norm1.weight": (1024,), f"{layer}.attn.qkv.weight": (3072, 1024)}
    expected = shapes(model)
    for name, shape in stored.items():
        for key, value in convert_tensor(name, torch.empty(shape), config.text_config):
            assert expected[key] == tuple(value.shape)
    assert not any(f"{part}.bias" in name for name in expected for part in ("q_proj", "_before"))
    with pytest.raises(UnsupportedModelError, match="layer_norm_eps"):
        convert_config(CONFIG_8B | {"vision_config": vision | {"layer_norm_eps": 1e-5}})


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_other_language_models_keep_their_keys(kind: str) -> None:
    small = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 16, "vocab_size": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    llm = {"model_type": kind, "rope_theta": 5e5, "tie_word_embeddings": kind == "qwen3"}
    config = convert_config(CONFIG_8B | {"llm_config": llm | small | heads}, image_token_id=7)
    assert config.text_config.model_type == kind
    assert config.text_config.rope_parameters["rope_theta"] == 5e5
    assert config.tie_word_embeddings == (kind == "qwen3")
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(config)
    for name, shape in shapes(model).items():
        if "language_model" in name or name == "lm_head.weight":
            old = name.replace("model.language_model.", "language_model.model.")
            old = old.replace("lm_head.", "language_model.lm_head.")
            assert convert_tensor(old, torch.empty(shape), config.text_config)[0][0] == name


# -- configuration -----------------------------------------------------------------------------


def test_rope_is_translated() -> None:
    llm = CONFIG_8B["llm_config"]
    assert convert_text_config(llm).rope_parameters == {
        "rope_type": "dynamic",
        "factor": 2.0,
        "rope_theta": 1e6,
    }
    plain = convert_text_config(llm | {"rope_scaling": None})
    assert plain.rope_parameters == {"rope_type": "default", "rope_theta": 1e6}
    positions = torch.arange(32768)[None]
    tables = []
    for config in (convert_text_config(llm), plain):
        config.num_hidden_layers = 0
        with torch.device("meta"):
            model = LlamaModel(config)
        rope = type(model.rotary_emb)(config)
        tables.append(rope(torch.zeros(1), positions))
    for dynamic, default in zip(*tables, strict=True):
        assert torch.equal(dynamic, default)


def test_configuration_is_checked() -> None:
    with pytest.raises(UnsupportedModelError, match="from_pretrained"):
        convert_config({"model_type": "internvl"})
    with pytest.raises(UnsupportedModelError, match="ps_version"):
        convert_config(CONFIG_8B | {"ps_version": "v1"})
    with pytest.raises(UnsupportedModelError, match="'phi3'"):
        convert_config(CONFIG_8B | {"llm_config": {"model_type": "phi3"}})
    qwen = {"model_type": "qwen2", "vocab_size": 151674}
    with pytest.raises(OptionError, match="image_token_id"):
        convert_config(CONFIG_8B | {"llm_config": qwen})
    with pytest.raises(OptionError, match="below the vocabulary size 92553"):
        convert_config(CONFIG_8B, image_token_id=92553)


# -- selectors against the golden data ---------------------------------------------------------


@pytest.mark.parametrize("case", ["a_single", "b_multi_seed0"])
@pytest.mark.parametrize("kind", ["qwen2", "internlm2"])
@pytest.mark.parametrize("aggregation", ["max", "mean"])
def test_selector_scores_are_the_references(
    fixtures: Path, golden: Golden, case: str, kind: str, aggregation: Aggregation
) -> None:
    """Converted selectors reproduce the published embeddings and the relevance of the first set."""
    folder = fixtures / "internvl2_5" / case
    folder = folder / {"qwen2": "selector", "internlm2": "selector_internlm2"}[kind]
    data = golden(case)
    text = convert_text_config(json.loads((folder / "config.json").read_text()))
    module = selector_modules(text, 32)
    assert isinstance(module.language_model, {"qwen2": Qwen2Model, "internlm2": LlamaModel}[kind])
    weights: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        weights.update(selector_tensor(name, tensor, text))
    module.load_state_dict(weights)
    ids = data["selector_input_ids_qwen2"] if kind == "qwen2" else data["input_ids"][0]
    with torch.no_grad():
        embeds = module.language_model.embed_tokens(ids)
        projected = module.get_submodule("projector")(data["vision_features"]).flatten(0, 1)
        embeds[ids == {"qwen2": 313, "internlm2": 303}[kind]] = projected
        expected = data[f"lite_{kind}.selector_inputs_embeds"]
        torch.testing.assert_close(embeds, expected, rtol=1e-5, atol=1e-5)

        run = f"lite_{kind}.token_selection" + "_qwen" * (kind == "qwen2")
        run += "_mean" * (aggregation == "mean")
        meta = json.loads((folder.parent / "meta.json").read_text())
        # Where the reference cuts is one token off in one case (fixtures, I3).
        start = meta["runs"][run]["vision_region_start_used"]
        stop = start + meta["total_vision_tokens"]
        per_frame = meta["tokens_per_frame"]
        frames = data[f"{run}.set0.frame_indices"]
        # The reference looks for the frames where the main model has them (fixtures, I3).
        shift = int((data["input_ids"][0] == 301).nonzero()[0]) - start
        shift = (
            0
            if kind == "internlm2"
            else json.loads((fixtures / "internvl2_5" / case / "meta.json").read_text())["runs"][
                run
            ]["vision_region_start_used"]
            - start
        )
        start, stop = start + shift, stop + shift
        rows = (start + frames[:, None] * per_frame + torch.arange(per_frame)).flatten()
        sequence = torch.cat([torch.arange(start), rows, torch.arange(stop, len(ids))])
        asking = torch.arange(start + len(rows), len(sequence))
        query, key = reference_states(
            module.language_model,
            embeds[sequence][None],
            torch.arange(len(sequence))[None],
            text.num_hidden_layers - 1,
            asking,
        )
        columns = torch.arange(start, start + len(rows))
        scores = relevance(query, key, asking, columns, aggregation=aggregation)[0]
    torch.testing.assert_close(scores, data[f"{run}.set0.scores"], rtol=0, atol=2e-5)
