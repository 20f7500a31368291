"""Original checkpoints as the stock model: golden numbers, files, and interrupted conversions."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    Qwen2ForCausalLM,
)

from flexselect.core.checkpoint import Checkpoint
from flexselect.core.decoder import reference_states
from flexselect.core.errors import CheckpointError, OptionError, UnsupportedModelError
from flexselect.core.relevance import relevance
from flexselect.inference.registry import load_model, load_tower
from flexselect.internvl.convert import convert_checkpoint, load_original, load_processor
from flexselect.internvl.original import convert_text_config

from .conftest import CASES

Golden = Callable[[str], dict[str, Tensor]]


@pytest.fixture(scope="module")
def load(fixtures: Path) -> Callable[..., InternVLForConditionalGeneration]:
    def by_case(case: str, **options: Any) -> InternVLForConditionalGeneration:
        folder = fixtures / "internvl2_5" / case / "model"
        return load_original(folder, image_token_id=303, **options)

    return by_case


@torch.no_grad()
def answer(model: InternVLForConditionalGeneration, embeds: Tensor) -> Tensor:
    """Return logits ``(8, vocabulary)`` of eight greedy steps after ``embeds`` (tokens, hidden)."""
    out = model.generate(
        inputs_embeds=embeds[None],
        attention_mask=torch.ones(1, len(embeds), dtype=torch.long),
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.cat(out.logits)


# -- golden data -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_stock_model_is_the_reference(case: str, load: Callable, golden: Golden) -> None:
    """Tower and pixel shuffle, projector, embeddings, logits, tokens: each against the golden data.

    Also with dynamic rope active in every position (e_dynamic_ntk): a model that has seen nothing
    else computes the reference's frequencies, in the prompt and in every decoding step.
    """
    model, data = load(case), golden(case)
    seen: list[Tensor] = []
    hook = model.model.multi_modal_projector.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0])
    )
    projected = model.get_image_features(data["pixel_values"], return_dict=True).pooler_output
    hook.remove()
    scale = data["vision_features"].abs().max()
    assert (seen[0] - data["vision_features"]).abs().max() < 1e-5 * scale
    assert projected.shape[1] == model.config.image_seq_length

    ids = data["input_ids"]
    embeds = model.get_input_embeddings()(ids)
    embeds[ids == model.config.image_token_id] = projected.flatten(0, 1)
    torch.testing.assert_close(embeds[0], data["baseline.inputs_embeds"], rtol=1e-5, atol=1e-5)

    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=data["pixel_values"],
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert out.sequences[0, ids.shape[1] :].tolist() == data["baseline.tokens"].tolist()
    logits = torch.cat(out.logits)
    torch.testing.assert_close(logits, data["baseline.step_logits"], rtol=0, atol=1e-4)


def test_dynamic_rope_depends_on_what_came_before(load: Callable, golden: Golden) -> None:
    """What differs with dynamic rope, and why (fixtures, I5).

    Reference and stock both stretch the frequencies to the longest sequence so far. Stock forgets
    only when a sequence is shorter than ``max_position_embeddings``, the reference never does. So
    the golden answer to the kept tokens needs a model that has not seen the whole video, and a
    released model, which stretches beyond 32,768 positions, is exact below that.
    """
    model, data = load("e_dynamic_ntk"), golden("e_dynamic_ntk")
    whole, kept = data["baseline.inputs_embeds"], data["self.token_selection.inputs_embeds"]
    expected = data["self.token_selection.step_logits"]
    assert model.config.text_config.max_position_embeddings == 48 < len(kept) < len(whole)

    torch.testing.assert_close(answer(model, kept), expected, rtol=0, atol=1e-4)
    answer(model, whole)
    assert (answer(model, kept) - expected).abs().max() > 1
    # A prompt below 48 positions resets stock, and the reference's numbers are back.
    model.model.language_model(inputs_embeds=kept[None, :40])
    torch.testing.assert_close(answer(model, kept), expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_dynamic_rope_inside_the_sets(load: Callable, golden: Golden, fixtures: Path) -> None:
    """The last set is shorter than those before it, and the reference scores it as if it were not.

    Here a set's scores do not depend on the sets before it: those of the longest sets are the
    reference's, whatever was scored before, and those of the shorter one are its own.
    """
    folder = fixtures / "internvl2_5" / "e_dynamic_ntk"
    meta = json.loads((folder / "meta.json").read_text())
    model, data = load("e_dynamic_ntk"), golden("e_dynamic_ntk")
    start, count = meta["prefix_len"], meta["tokens_per_frame"]
    region = meta["total_vision_tokens"]
    embeds = data["self.selector_inputs_embeds"]

    def score(index: int) -> Tensor:
        frames = torch.tensor(meta["set_frame_indices"][index])
        rows = (start + frames[:, None] * count + torch.arange(count)).flatten()
        prefix, query = torch.arange(start), torch.arange(start + region, len(embeds))
        sequence = embeds[torch.cat([prefix, rows, query])][None]
        columns = torch.arange(start, start + len(rows))
        asking = torch.arange(start + len(rows), sequence.shape[1])
        positions = torch.arange(sequence.shape[1])[None]
        states = reference_states(
            model.model.language_model,
            sequence,
            positions,
            meta["token_selector_layer"],
            asking,
        )
        return relevance(*states, asking, columns)[0]

    last = meta["num_sets"] - 1
    alone = score(last)
    for index in range(last):
        expected = data[f"self.token_selection.set{index}.scores"]
        torch.testing.assert_close(score(index), expected, rtol=0, atol=2e-5)
    assert torch.equal(score(last), alone)
    assert (alone - data[f"self.token_selection.set{last}.scores"]).abs().max() > 1e-3


# -- loading -----------------------------------------------------------------------------------


def test_dtype_and_device(load: Callable) -> None:
    stored = load("a_single")
    assert stored.dtype == torch.float32
    assert not stored.training
    half = load("a_single", dtype=torch.bfloat16, device_map="cpu")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.config.dtype == torch.bfloat16
    assert half.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
    assert load("a_single", attn_implementation="eager").config._attn_implementation == "eager"
    split = {"model.vision_tower": "cpu", "model": torch.device("cpu"), "lm_head": "cpu"}
    for device_map in ("auto", {"": "cpu"}, split):
        other = load("a_single", device_map=device_map)
        for (name, a), (_, b) in zip(
            stored.named_parameters(), other.named_parameters(), strict=True
        ):
            assert torch.equal(a, b), name


def test_device_map_that_cannot_be_followed(load: Callable) -> None:
    with pytest.raises(OptionError, match=r"no device for lm_head\.weight"):
        load("a_single", device_map={"model": "cpu"})
    with pytest.raises(OptionError, match="offload_folder"):
        load("a_single", device_map={"model": "cpu", "lm_head": "disk"})


def test_qwen2_language_model(fixtures: Path, golden: Golden, tmp_path: Path) -> None:
    """A tower with a Qwen2 language model, as in InternVL2_5-1B, put together from golden parts."""
    case = fixtures / "internvl2_5" / "a_single"
    weights = load_file(case / "selector" / "model.safetensors")
    head = torch.randn(320, 48, generator=torch.Generator().manual_seed(0))
    weights["language_model.lm_head.weight"] = head
    tower = load_file(case / "model" / "model.safetensors")
    weights |= {name: value for name, value in tower.items() if name.startswith("vision_model.")}
    save_file(weights, tmp_path / "model.safetensors")
    config = json.loads((case / "model" / "config.json").read_text())
    llm = json.loads((case / "selector" / "config.json").read_text())
    config["llm_config"] = llm | {"tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(OptionError, match="image_token_id"):
        load_original(tmp_path)
    model = load_original(tmp_path, image_token_id=313)

    plain = Qwen2ForCausalLM(convert_text_config(config["llm_config"])).eval()
    keys = {k.removeprefix("language_model."): v for k, v in weights.items() if "language" in k}
    plain.load_state_dict(keys)
    data = golden("a_single")
    ids = data["selector_input_ids_qwen2"][None]
    with torch.no_grad():
        embeds = data["lite_qwen2.selector_inputs_embeds"][None]
        expected = plain(inputs_embeds=embeds).logits
        logits = model(input_ids=ids, pixel_values=data["pixel_values"]).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)

    # Tied, the same checkpoint holds two different copies of one weight.
    config["llm_config"]["tie_word_embeddings"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        load_original(tmp_path, image_token_id=313)
    del weights["language_model.lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    tied = load_original(tmp_path, image_token_id=313)
    assert tied.lm_head.weight is tied.get_input_embeddings().weight


def test_stock_checkpoint_loads_as_it_is(load: Callable, tmp_path: Path) -> None:
    stock = tmp_path / "hf"
    load("a_single").save_pretrained(stock)
    with pytest.raises(UnsupportedModelError, match=r"from_pretrained"):
        load_original(stock)
    InternVLForConditionalGeneration.from_pretrained(stock)


# -- files -------------------------------------------------------------------------------------


def test_converted_checkpoint_is_complete(original: Path, tmp_path: Path) -> None:
    ready = convert_checkpoint(original, tmp_path / "ready", dtype=torch.bfloat16)
    model, report = InternVLForConditionalGeneration.from_pretrained(
        ready, output_loading_info=True
    )
    assert not any(report.values()), report
    assert model.dtype == torch.bfloat16
    direct = load_original(original, dtype=torch.bfloat16)
    for (name, a), (_, b) in zip(model.named_parameters(), direct.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    loaded, converted = InternVLConfig.from_pretrained(ready), direct.config
    for part in ("text_config", "vision_config"):
        theirs, ours = getattr(loaded, part).to_dict(), getattr(converted, part).to_dict()
        changed = {k for k in ours if theirs.get(k) != ours[k]} - {"dtype", "_name_or_path"}
        assert not changed
    assert loaded.image_token_id == model.config.image_token_id == 642
    # An answer ends with its turn: <|im_end|> is 7 in this tokenizer.
    assert model.generation_config.eos_token_id == [2, 7]

    processor = AutoProcessor.from_pretrained(ready)
    video = torch.randint(0, 256, (3, 3, 20, 30), dtype=torch.uint8)
    talk = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "red?"}]}]
    text = processor.apply_chat_template(talk, add_generation_prompt=True)
    inputs = processor(text=text, videos=[video], return_tensors="pt")
    assert (inputs["input_ids"] == 642).sum() == 3 * model.config.image_seq_length
    again = load_processor(original)(text=text, videos=[video], return_tensors="pt")
    assert torch.equal(inputs["input_ids"], again["input_ids"])
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()


def test_without_tokenizer_there_is_no_processor(
    fixtures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = fixtures / "internvl2_5" / "a_single" / "model"
    ready = convert_checkpoint(source, tmp_path / "ready", image_token_id=303)
    assert "no tokenizer" in caplog.text
    assert sorted(path.name for path in ready.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    with pytest.raises(OptionError, match="image_token_id"):
        convert_checkpoint(source, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("change", ["lost", "extra", "misshapen"])
def test_checkpoint_that_does_not_fit(original: Path, tmp_path: Path, change: str) -> None:
    weights = load_file(original / "model.safetensors")
    name = "vision_model.encoder.layers.1.attn.qkv.weight"
    if change == "lost":
        del weights[name]
    elif change == "extra":
        weights["vision_model.encoder.layers.2.ls1"] = torch.ones(32)
    else:
        weights[name] = weights[name][:93].clone()
    save_file(weights, original / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers?\.[12]\."):
        load_original(original)
    with pytest.raises(CheckpointError):
        convert_checkpoint(original, tmp_path / "ready")
    assert not (tmp_path / "ready").exists()


_KILLED = """
import os, signal, sys
from flexselect.internvl.convert import convert_checkpoint

def progress(written, total):
    if written > total // 2:
        os.kill(os.getpid(), signal.SIGKILL)

convert_checkpoint(sys.argv[1], sys.argv[2], progress=progress)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_killed_conversion_leaves_nothing_finished(original: Path, tmp_path: Path) -> None:
    ready = tmp_path / "made" / "ready"
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(original), str(ready)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL
    assert not ready.exists()
    (left,) = ready.parent.iterdir()
    assert left.name.startswith(".ready.incomplete-")
    assert not (left / "config.json").exists()
    with pytest.raises(CheckpointError, match="damaged or incomplete"):
        Checkpoint(left)
    assert convert_checkpoint(original, ready) == ready


def test_an_original_checkpoint_loads_without_its_layers_too(original: Path) -> None:
    whole = load_model(original, device="cpu")
    model = load_tower(original, device="cpu")
    weights = dict(whole.named_parameters())
    for name, weight in model.named_parameters():
        assert weight.is_meta == name.startswith("model.language_model.layers.")
        assert weight.is_meta or torch.equal(weight, weights[name])
    assert len(list(model.parameters())) == len(weights)
    assert not any(buffer.is_meta for buffer in model.buffers())
