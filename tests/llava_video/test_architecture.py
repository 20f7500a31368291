"""What only LLaVA-Video has: newlines in four places, pooling in three ways, tiles of images, and
the original checkpoints through the public API."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import flexselect
from flexselect import Full, PromptError
from flexselect.core.layout import NONE
from flexselect.inference.engine import kept_rows
from flexselect.inference.video import probe, read_frames
from flexselect.llava_video.encode import read_requests
from flexselect.llava_video.processing import build_processor
from flexselect.llava_video.selector import LlavaVideoSelector, LlavaVideoSelectorConfig

from ..architectures.factories import FAMILIES, Family, Image, Video, encoded, knobs, noise
from ..architectures.tiny import llava_video as tiny
from ..architectures.tiny.common import byte_tokenizer, draw_weights
from ..paths import SMALL_MEDIA
from .test_convert import original

[GRID] = [family for family in FAMILIES if family.name == "llava_video"]
QUESTION = "What is it?"
CLOSE: Any = {"rtol": 1e-4, "atol": 1e-4}

#: Name: the packing, and the visual tokens of a frame of 5 x 5 patches.
PACKINGS: dict[str, tuple[dict[str, Any], int]] = {
    "grid": ({}, 12),
    "frame": ({"newline_position": "frame"}, 10),
    "one_token": ({"newline_position": "one_token"}, 9),
    "no_token": ({"newline_position": "no_token"}, 9),
    "average": ({"spatial_pool_mode": "average"}, 6),
    "average, one_token": (
        {"spatial_pool_mode": "average", "newline_position": "one_token"},
        4,
    ),
    "max": ({"spatial_pool_mode": "max", "newline_position": "frame"}, 5),
}
ROWS: list[list[Any]] = [
    [Video(7, 1), QUESTION],
    [Image(), Image(1), Video(4, 2), Video(6, 3), "A longer question about both of them, please?"],
    [Image(), Video(5, 4), "then", Image(1), QUESTION],
]


@dataclasses.dataclass(frozen=True)
class Packed(Family):
    """The family with another packing."""

    packing: str = "grid"

    def processor(self) -> Any:
        options, _ = PACKINGS[self.packing]
        return build_processor(byte_tokenizer(tiny.VISION), tiny.config(None, {}, **options))

    def model(self, seed: int = 0, **overrides: Any) -> Any:
        tokenizer = self.processor().tokenizer
        options, _ = PACKINGS[self.packing]
        return tiny.model_of(tiny.config(tokenizer, overrides, **options), tokenizer, seed)


@pytest.fixture(params=PACKINGS)
def family(request: pytest.FixtureRequest) -> Packed:
    return Packed(GRID.name, tiny, pictures=1, timed=False, packing=request.param)


@pytest.fixture
def model(family: Packed) -> Any:
    return family.model()


@pytest.fixture(params=["self", "lite"])
def select(request: pytest.FixtureRequest, family: Packed) -> Callable[..., Any]:
    def apply(model: Any, budget: int, **more: Any) -> Any:
        options = knobs(budget, **more)
        if request.param == "lite":
            del options["layer"]
            options["selector"] = family.selector(model)
        return flexselect.apply(model, **options)

    return apply


def logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def test_layout(family: Packed, model: Any) -> None:
    _, per_frame = PACKINGS[family.packing]
    ends = int("one_token" in family.packing)
    inputs = family.inputs(ROWS[1])
    [request] = flexselect.architecture_of(model).read(inputs)
    layout = request.prompt.layout
    assert request.prompt.num_visual == 10 * per_frame
    assert torch.equal(layout.visual, layout.frame != NONE)
    video_token = model.config.video_token_id
    for video, count in enumerate((4, 6)):
        mine = layout.video == video
        assert int(mine.sum()) == count * per_frame + ends
        counts = torch.bincount(layout.frame[mine & layout.visual])
        assert counts.tolist() == [per_frame] * count
        newline = mine & ~layout.visual
        assert int(newline.sum()) == ends
        assert bool((layout.ids[newline] == video_token).all())
        assert not bool((layout.feature | layout.query)[newline].any())
    assert [clip.rows * clip.columns for clip in request.prompt.images] == [80, 80]


@pytest.mark.parametrize("side", ["left", "right"])
def test_keeping_everything_equals_the_unpatched_model(
    family: Packed, model: Any, select: Callable[..., Any], side: str
) -> None:
    inputs = family.inputs(*ROWS, padding_side=side)
    mask = inputs["attention_mask"].bool()
    assert not bool(mask.all())
    # Left to itself, the stock class counts the padding of the left side too.
    positions = mask.cumsum(-1).sub(1).clamp(min=0)
    with torch.no_grad():
        expected = model(**inputs, position_ids=positions).logits[mask]
    for prepare in (lambda: flexselect.apply(model, Full()), lambda: select(model, 10_000)):
        prepare()
        torch.testing.assert_close(logits(model, inputs)[mask], expected, **CLOSE)
        flexselect.remove(model)


def test_generating_from_everything_equals_the_unpatched_model(family: Packed, model: Any) -> None:
    inputs = family.inputs(*ROWS)
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    with Full()(model):
        assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), expected)


def test_selecting_from_a_batch_equals_one_by_one(
    family: Packed, model: Any, select: Callable[..., Any]
) -> None:
    _, per_frame = PACKINGS[family.packing]
    select(model, 2 * per_frame)
    tokens = model.generate(**family.inputs(*ROWS), max_new_tokens=5, do_sample=False)[:, -5:]
    together = model.flexselect.selections
    for index, row in enumerate(ROWS):
        alone = model.generate(**family.inputs(row), max_new_tokens=5, do_sample=False)[:, -5:]
        [selection] = model.flexselect.selections
        assert 0 < len(selection.kept) < selection.num_visual
        assert torch.equal(together[index].kept, selection.kept)
        assert torch.equal(tokens[index], alone[0])


def test_the_kept_rows_are_the_stock_models(
    family: Packed, model: Any, select: Callable[..., Any]
) -> None:
    """Features, newlines and text that stay are what the unpatched model puts in their place."""
    inputs = family.inputs(ROWS[1])
    seen = []
    decoder = flexselect.architecture_of(model).decoder
    handle = decoder.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    logits(model, inputs)
    handle.remove()
    applied = select(model, 20).flexselect
    logits(model, inputs)
    [selection], [row] = applied.selections, encoded(applied, inputs)
    embeds, _ = applied.engine.gather(row, selection)
    rows = kept_rows(row.prompt, selection.kept)
    torch.testing.assert_close(embeds, seen[0][0, rows], rtol=1e-5, atol=1e-5)
    newlines = (row.prompt.layout.video != NONE) & ~row.prompt.layout.visual
    assert bool(torch.isin(newlines.nonzero()[:, 0], rows).all())


def test_a_selector_sees_its_own_features_and_newline(family: Packed, model: Any) -> None:
    """Its text model on its own embeddings of one set, worked out by the stock parts."""
    selector = family.selector(model)
    flexselect.apply(model, budget=8, frames_per_set=3, selector=selector)
    inputs = family.inputs([Video(6, 1), QUESTION])
    logits(model, inputs)
    [row] = encoded(model.flexselect, inputs)
    core, config = model.model, model.config
    layout = row.prompt.layout.take(row.prompt.rows_of_frames(0, torch.tensor([0, 2, 4])))
    pixels = inputs["pixel_values_videos"][0][[0, 2, 4]]
    with torch.no_grad():
        patches = selector.projector(core.encode_pictures(pixels))
        side = int(patches.shape[1] ** 0.5)
        maps = patches.unflatten(1, (side, side)).permute(0, 3, 1, 2)
        functional = torch.nn.functional
        pooled = {
            "bilinear": lambda: functional.interpolate(maps, size=(3, 3), mode="bilinear"),
            "average": lambda: functional.avg_pool2d(maps, 2),
            "max": lambda: functional.max_pool2d(maps, 2),
        }[config.spatial_pool_mode]()
        newline, frames = selector.image_newline, []
        for frame in pooled.permute(0, 2, 3, 1):
            rows = list(frame)
            if config.newline_position == "grid":
                rows = [torch.cat((line, newline[None])) for line in rows]
            if config.newline_position == "frame":
                rows.append(newline[None])
            frames.append(torch.cat(rows))
        embeds = selector.language_model.embed_tokens(layout.ids.clamp(max=10**6))
        embeds[layout.feature] = torch.cat(frames)
        embeds[(layout.ids == config.video_token_id) & ~layout.feature] = newline
        eager = selector.language_model
        eager.set_attn_implementation("eager")
        mask = torch.ones(1, len(layout), dtype=torch.long)
        out = eager(inputs_embeds=embeds[None], attention_mask=mask, output_attentions=True)
    weights = out.attentions[-1][0][:, layout.query][:, :, layout.visual]
    [selection] = model.flexselect.selections
    mine = selection.frame % 2 == 0
    torch.testing.assert_close(selection.scores[mine], weights.amax((0, 1)), rtol=1e-4, atol=1e-6)


# -- images --------------------------------------------------------------------------------------

SIZES = [
    (20, 20),
    (20, 40),
    (40, 20),
    (33, 57),
    (100, 10),
    (7, 40),
    (90, 91),
    (200, 199),
    (61, 200),
]


@pytest.mark.parametrize("size", SIZES)
def test_image_tokens_are_counted_as_the_processor_writes_them(size: tuple[int, int]) -> None:
    """Tiles are joined, cut and shrunk; images given as those of one prompt have one tile each."""
    tokenizer = byte_tokenizer(tiny.VISION)
    pinpoints = [[20 * a, 20 * b] for a in range(1, 7) for b in range(1, 7)]
    config = tiny.config(tokenizer, {})
    config.image_grid_pinpoints = pinpoints
    config.vision_aspect_ratio = "anyres_max_9"
    processor = build_processor(tokenizer, config)
    image = noise((3, *size), 1)
    video = GRID.video(2, 0)
    model = tiny.model_of(config, tokenizer, 0)
    for text, images in (
        ("<image><video>?", [image]),
        ("<image><image><video>?", [image, image]),
        ("<image><image><video>?", [[image, image]]),
    ):
        inputs = dict(
            processor(
                text=[text],
                images=images,
                videos=[video],
                do_sample_frames=False,
                return_tensors="pt",
            )
        )
        [request] = read_requests(inputs, config)
        assert request.prompt.num_visual == 2 * 12
        assert len(request.prompt.images) == text.count("<image>")
        expected = logits(model, inputs)
        with Full()(model):
            torch.testing.assert_close(logits(model, inputs), expected, **CLOSE)


def test_the_largest_images_are_shrunk() -> None:
    """The sizes above reach the limit of nine tiles, so that counting is more than a product."""
    config = tiny.config(byte_tokenizer(tiny.VISION), {})
    config.image_grid_pinpoints = [[20 * a, 20 * b] for a in range(1, 7) for b in range(1, 7)]
    tiles = torch.zeros(1, 37, 3, 20, 20)
    inputs = {
        "pixel_values": tiles,
        "image_sizes": torch.tensor([[200, 199]]),
        "input_ids": torch.full((1, 300), config.image_token_id),
    }
    with pytest.raises(PromptError):
        read_requests(inputs, config)
    inputs["input_ids"] = torch.full((1, 25 + 15 * 15), config.image_token_id)
    # 30 x 30 tokens would be joined; nine tiles have 15 x 15, and every row ends with a newline.
    with pytest.raises(PromptError, match=f"needs {25 + 15 * 16} tokens"):
        read_requests(inputs, config)


def test_a_prompt_that_speaks_of_placeholders_is_refused() -> None:
    model = GRID.model()
    flexselect.apply(model, **knobs(24))
    inputs = GRID.inputs([Video(5), QUESTION])
    ids = inputs["input_ids"]
    ids[0, -3] = model.config.video_token_id
    with pytest.raises(PromptError):
        model.generate(**inputs, max_new_tokens=1)


# -- original checkpoints ------------------------------------------------------------------------


@pytest.mark.parametrize("newline_position", ["grid", "frame"])
def test_original_checkpoint_through_the_public_api(
    tokenizer: Any, tmp_path: Path, newline_position: str
) -> None:
    """Weights, processor and a published selector, as their authors lay them out."""
    folder = tmp_path / "model"
    original(folder, mm_newline_position=newline_position)
    tokenizer.save_pretrained(folder)
    model = flexselect.load_model(folder, device="cpu")
    processor = flexselect.load_processor(folder)
    selector = published_selector(tmp_path / "selector", model)
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": QUESTION}]}],
        tokenize=False,
        add_generation_prompt=True,
    )
    inputs = processor(
        text=[text],
        videos=[noise((6, 3, 20, 20), 0)],
        do_sample_frames=False,
        return_tensors="pt",
    )
    found = []
    for given in (None, selector, tmp_path / "selector"):
        options = {"layer": 1} if given is None else {"selector": given}
        flexselect.apply(model, budget=20, frames_per_set=3, **options)
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None)
        assert out.shape[1] == inputs["input_ids"].shape[1] + 3
        found.append(model.flexselect.selections[0])
        assert len(found[-1].kept) == 20 < found[-1].num_visual
        assert found[-1].settings["model"] == str(folder)
        flexselect.remove(model)
    assert torch.equal(found[1].scores, found[2].scores)
    assert not torch.allclose(found[0].scores, found[1].scores)


def published_selector(folder: Path, model: Any) -> LlavaVideoSelector:
    """Write a selector as the reference does, and return what it must be read as."""
    text = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": model.config.text_config.vocab_size,
        "rms_norm_eps": 1e-6,
    }
    config = LlavaVideoSelectorConfig(
        text_config={**text, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        vision_hidden_size=model.config.vision_config.hidden_size,
        video_token_id=model.config.video_token_id,
    )
    selector = draw_weights(LlavaVideoSelector(config), 3)
    names = {"projector.linear_1": "mm_projector.0", "projector.linear_2": "mm_projector.2"}
    tensors = {}
    for name, value in selector.state_dict().items():
        stem, _, leaf = name.rpartition(".")
        stem = names.get(stem, stem.removeprefix("language_model."))
        tensors[f"{stem}.{leaf}" if stem else leaf] = value.clone()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    flat = {**text, "rope_theta": 1e6, "architectures": ["Qwen2ModelForSelector"]}
    (folder / "config.json").write_text(json.dumps(flat))
    return selector


# -- videos from files ---------------------------------------------------------------------------


def test_open_video_reads_what_the_processor_would(family: Packed, model: Any) -> None:
    processor = family.processor()
    _, per_frame = PACKINGS[family.packing]
    path = SMALL_MEDIA / "h265_video.mp4"
    flexselect.apply(model, budget=3 * per_frame, layer=2, frames_per_set=3)
    video = flexselect.open_video(model, processor, path, frames=7, frames_per_chunk=3)
    answer = video.ask(QUESTION, max_new_tokens=4)
    assert 0 < len(answer.selection.kept) <= 3 * per_frame
    assert len(answer.ids) == 4

    info = probe(path)
    assert video.record["picture_size"] == [tiny.HEIGHT, tiny.WIDTH]
    wanted = np.unique(np.searchsorted(info.timestamps, video.times.numpy() - 1e-6))
    stream = read_frames(info, wanted, size=(tiny.HEIGHT, tiny.WIDTH))
    pictures = torch.cat([part.frames for part in stream])
    messages = [
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": QUESTION}]}
    ]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = dict(
        processor(
            text=[text],
            videos=[pictures],
            do_resize=False,
            do_sample_frames=False,
            return_tensors="pt",
        )
    )
    laid_out = video.encoded(messages, 0)
    assert torch.equal(laid_out.prompt.layout.ids, inputs["input_ids"][0])
    [row] = encoded(model.flexselect, inputs)
    torch.testing.assert_close(laid_out.features.model, row.features.model, rtol=1e-5, atol=1e-5)
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(out[0, -4:], answer.ids)
