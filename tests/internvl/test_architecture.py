"""What only InternVL has: videos told from images by the text between pictures, tokens of its own
for a selector, dynamic rope, and the original checkpoints through the public API."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import flexselect
from flexselect import CheckpointError, Full, PromptError
from flexselect.core.layout import NONE, Clip
from flexselect.inference.engine import kept_rows
from flexselect.inference.video import probe, read_frames
from flexselect.internvl.encode import find_clips, has_video, layout_prompt, read_requests
from flexselect.internvl.processing import with_frame_style
from flexselect.internvl.selector import InternVLSelectorConfig, Translator
from flexselect.internvl.tokenization import load_tokenizer

from ..architectures.factories import FAMILIES, Image, Video, encoded, noise
from ..architectures.tiny import internvl as tiny
from ..architectures.tiny.common import byte_tokenizer, draw_weights
from ..paths import SMALL_MEDIA

[FAMILY] = [family for family in FAMILIES if family.name == "internvl"]
#: Placeholders of a picture of one tile.
SEQUENCE = 4
QUESTION = "What is it?"


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token a word, digit, space or mark, as the real ones nearly do."""
    text = "user Frame Time s What is it then another Look And Image"
    words = ["<unk>", "\n", " ", *":.?-,", *text.split(), *"0123456789"]
    vocabulary = {word: index for index, word in enumerate(words)}
    core = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d|[A-Za-z]+|\s|[^\sA-Za-z\d]"), "isolated")
    core.decoder = decoders.Fuse()
    special = ["<|im_start|>", "<|im_end|>", *tiny.VISION.values()]
    core.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    return PreTrainedTokenizerFast(tokenizer_object=core, extra_special_tokens=tiny.VISION)


@pytest.fixture(params=["words", "bytes", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    if request.param == "words":
        return word_tokenizer()
    if request.param == "bytes":
        return byte_tokenizer(tiny.VISION)
    return load_tokenizer(request.getfixturevalue("sentencepiece_folder")())


def config_of(tokenizer: Any) -> Any:
    context = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    return SimpleNamespace(image_token_id=context, image_seq_length=SEQUENCE)


def picture(tiles: int = 1) -> str:
    return f"<img>{'<IMG_CONTEXT>' * SEQUENCE * tiles}</img>"


def frames(count: int, label: str = "Frame{n}: ", between: str = "\n") -> str:
    """Write a video as the stock processor does, or in another style."""
    labels = [label.format(n=n + 1, t=f"{n / 2:.1f}") for n in range(count)]
    return between.join(text + picture() for text in labels)


TIMES = "Frame{n} Time {t}s: "
# Name: prompt, and what it shows: the number of frames of a video, or "image".
PROMPTS: dict[str, tuple[str, list[Any]]] = {
    "stock": (f"{frames(3)}\n", [3]),
    "stock, two frames": (f"{frames(2)}\n", [2]),
    "stock, 12 frames": (f"{frames(12)}\n", [12]),
    "stock, 123 frames": (f"{frames(123)}\n", [123]),
    "joined": (frames(3, "", ""), [3]),
    "line breaks": (f"{frames(3, '')}\n", [3]),
    "times": (f"{frames(3, TIMES)}\n", [3]),
    "times, 12 frames": (f"{frames(12, TIMES)}\n", [12]),
    "times, 123 frames": (f"{frames(123, TIMES)}\n", [123]),
    "one frame": (f"{frames(1)}\n", ["image"]),
    "text": ("", []),
    "image": (f"{picture(3)}\n", ["image"]),
    "image of one tile": (f"{picture()}\n", ["image"]),
    "images": (f"{picture(3)}\n{picture(5)}\n", ["image", "image"]),
    "images of one tile, and text": (f"{picture()}Look, then{picture()}\n", ["image", "image"]),
    "images side by side": (f"{picture(3)}{picture(5)}", ["image", "image"]),
    "tiles, then stock": (f"{picture(3)}\n{frames(3)}\n", ["image", 3]),
    "tile, then stock": (f"{picture()}\n{frames(3)}\n", ["image", 3]),
    "tile and text, then stock": (f"{picture()}\nLook, {frames(3)}\n", ["image", 3]),
    "stock, then tiles": (f"{frames(3)}\n{picture(3)}\n", [3, "image"]),
    "stock, then tile": (f"{frames(3)}\n{picture()}\n", [3, "image"]),
    "stock, then text and tile": (f"{frames(3)}\nAnd {picture()}\n", [3, "image"]),
    "tiles, then joined": (f"{picture(3)}\n{frames(3, '', '')}", ["image", 3]),
    "tile, then joined": (f"{picture()}\n{frames(3, '', '')}", ["image", 3]),
    "joined, then tile": (f"{frames(3, '', '')}\n{picture()}\n", [3, "image"]),
    "tile, then times": (f"{picture()}\n{frames(12, TIMES)}\n", ["image", 12]),
    "stock twice": (f"{frames(3)}\n{frames(4)}\n", [3, 4]),
    "stock twice, long": (f"{frames(12)}\n{frames(11)}\n", [12, 11]),
    "stock, text, stock": (f"{frames(3)}\nthen another: {frames(2)}\n", [3, 2]),
    "stock, image, stock": (f"{frames(3)}\n{picture(2)}\n{frames(2)}\n", [3, "image", 2]),
    "times twice": (f"{frames(3, TIMES)}\n{frames(12, TIMES)}\n", [3, 12]),
    "one frame after more": (f"{frames(3)}\n{frames(1)}\n", [3, 1]),
    "one frame before more": (f"{frames(1)}\n{frames(3)}\n", [1, 3]),
    "joined, text, joined": (f"{frames(3, '', '')}then{frames(2, '', '')}", [3, 2]),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_find_clips(tokenizer: Any, name: str) -> None:
    text, expected = PROMPTS[name]
    ids = tokenizer(f"<|im_start|>user\n{text}{QUESTION}", return_tensors="pt")["input_ids"][0]
    config = config_of(tokenizer)
    found = find_clips(ids, config)
    assert [len(c.pictures) if c.is_video else "image" for c in found] == expected
    # Every picture once, in order.
    pictures = [p for clip in found for p in clip.pictures]
    assert pictures == sorted(pictures)
    assert sum(b - a for a, b in pictures) == int((ids == config.image_token_id).sum())
    for clip in found:
        if clip.is_video and "Frame" in text:
            label = tokenizer.decode(ids[clip.start : clip.pictures[0][0] - 1])
            assert label.startswith("Frame1")
            assert label.rstrip().endswith(":")
            assert tokenizer.decode(ids[clip.pictures[-1][1] + 1 : clip.end]) in ("", "\n")
    # With the number of frames known instead of guessed, the same.
    videos = [Clip(count, 2, 2) for count in expected if count != "image"]
    if "image" not in expected:
        prompt = layout_prompt(ids, videos, [], config)
        tiles = torch.zeros(sum(clip.frames for clip in videos), 3, 2, 2)
        inputs = {"input_ids": ids[None], **({"pixel_values": tiles} if videos else {})}
        [request] = read_requests(inputs, config)
        assert has_video(inputs, config) == bool(videos)
        assert request.prompt.videos == prompt.videos
        for field, value in vars(prompt.layout).items():
            assert torch.equal(value, getattr(request.prompt.layout, field)), field


def test_known_lengths_part_videos_that_nothing_parts(tokenizer: Any) -> None:
    ids = tokenizer(f"{frames(5, '', '')}{QUESTION}", return_tensors="pt")["input_ids"][0]
    config = config_of(tokenizer)
    prompt = layout_prompt(ids, [Clip(3, 2, 2), Clip(2, 2, 2)], [], config)
    assert torch.bincount(prompt.layout.video[prompt.layout.feature]).tolist() == [12, 8]
    for wrong in ([Clip(3, 2, 2)], [Clip(3, 2, 2), Clip(3, 2, 2)], []):
        with pytest.raises(PromptError, match=r"shows videos of"):
            layout_prompt(ids, wrong, [], config)


def test_a_label_travels_with_its_frame(tokenizer: Any) -> None:
    ids = tokenizer(f"<|im_start|>user\n{frames(12)}\n{QUESTION}", return_tensors="pt")
    prompt = layout_prompt(ids["input_ids"][0], [Clip(12, 2, 2)], [], config_of(tokenizer))
    layout = prompt.layout
    shown = prompt.rows_of_frames(0, torch.tensor([1, 10]))
    text = tokenizer.decode(layout.ids[shown]).replace("<IMG_CONTEXT>", "")
    two = "Frame2: <img></img>\nFrame11: <img></img>"
    assert text == f"{text[: text.index('Frame')]}{two}\n{QUESTION}"

    # One token of frame 3 stays, and a closing tag of frame 11: their labels, and no others.
    visual = prompt.visual_rows()
    own = [visual[layout.frame[visual] == frame] for frame in (3, 11)]
    keep = torch.isin(visual, torch.stack([own[0][2], own[1][-1]])).nonzero()[:, 0]
    rows = kept_rows(prompt, keep)
    text = tokenizer.decode(layout.ids[rows])
    assert [n for n in range(1, 13) if f"Frame{n}:" in text] == [4, 12]
    assert int(layout.visual[rows].sum()) == 2


def test_a_cut_prompt_is_named() -> None:
    tokenizer = word_tokenizer()
    ids = tokenizer(f"{frames(3)}\n{QUESTION}", return_tensors="pt")["input_ids"][0]
    start = int((ids == config_of(tokenizer).image_token_id).nonzero()[0])
    for part in (ids[start:], ids[: start + SEQUENCE]):
        with pytest.raises(PromptError, match="truncated"):
            find_clips(part, config_of(tokenizer))


# -- translation ---------------------------------------------------------------------------------


@pytest.fixture
def two_tokenizers(sentencepiece_folder: Callable[..., Path]) -> tuple[Any, Any]:
    """A sentencepiece tokenizer that starts with BOS, and one of bytes."""
    return load_tokenizer(sentencepiece_folder()), byte_tokenizer(tiny.VISION)


@pytest.mark.parametrize("name", PROMPTS)
def test_translation(two_tokenizers: tuple[Any, Any], name: str) -> None:
    source, target = two_tokenizers
    text, expected = PROMPTS[name]
    text = f"<|im_start|>user\n{text}{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    ids = source(text, return_tensors="pt")["input_ids"][0]
    assert ids[0] == source.bos_token_id
    tiles = torch.zeros(int((ids == config_of(source).image_token_id).sum()) // SEQUENCE, 3, 2, 2)
    inputs = {"input_ids": ids[None], **({"pixel_values": tiles} if len(tiles) else {})}
    [request] = read_requests(inputs, config_of(source))
    before = request.prompt
    after = Translator(source, target)(before)

    # The same text, in other tokens, without BOS.
    assert len(after.layout) != len(before.layout)
    assert target.decode(after.layout.ids) == text
    assert (after.videos, after.images) == (before.videos, before.images)
    # The same visual tokens, one for one.
    for field in ("frame", "video", "feature"):
        for layout_field in ("visual", "feature"):
            old, new = (
                getattr(p.layout, field)[getattr(p.layout, layout_field)] for p in (before, after)
            )
            assert torch.equal(old, new)
    old, new = (
        tokenizer.convert_ids_to_tokens(p.layout.ids[p.layout.visual].tolist())
        for tokenizer, p in ((source, before), (target, after))
    )
    assert old == new
    # Every stretch means the same: what asks, and what belongs to each frame.
    for field in ("query", "frame", "video"):
        for value in getattr(before.layout, field).unique():
            words = [
                tokenizer.decode(p.layout.ids[getattr(p.layout, field) == value])
                for tokenizer, p in ((source, before), (target, after))
            ]
            assert words[0].removeprefix("<s>").split() == words[1].split()
    assert (
        bool(after.layout.query.any())
        == bool(before.layout.query.any())
        == any(item != "image" for item in expected)
    )


def test_translation_of_a_narrowed_question(two_tokenizers: tuple[Any, Any]) -> None:
    """In a conversation only the newest turn asks, and goes on doing so."""
    source, target = two_tokenizers
    head = f"<|im_start|>user\n{frames(3)}\nWho?<|im_end|>\n<|im_start|>assistant\nIt.<|im_end|>\n"
    ids = source(f"{head}<|im_start|>user\nAnd then?", return_tensors="pt")["input_ids"][0]
    prompt = layout_prompt(ids, [Clip(3, 2, 2)], [], config_of(source))
    prompt.layout.query[: len(source(head)["input_ids"])] = False
    after = Translator(source, target)(prompt)
    assert target.decode(after.layout.ids[after.layout.query]) == "<|im_start|>user\nAnd then?"


def test_spaces_before_marks_survive(two_tokenizers: tuple[Any, Any]) -> None:
    source, target = two_tokenizers
    ids = target(f"{frames(2)}\nIs it , n't that ?  Two  spaces .", return_tensors="pt")[
        "input_ids"
    ]
    prompt = layout_prompt(ids[0], [Clip(2, 2, 2)], [], config_of(target))
    there = Translator(target, source)(prompt)
    assert target.decode(Translator(source, target)(there).layout.ids) == target.decode(ids[0])


# -- a selector with tokens of its own -----------------------------------------------------------


@pytest.fixture
def own_tokens(sentencepiece_folder: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """A model's folder with a tokenizer of bytes, a selector's with one of sentencepiece."""
    model, selector = tmp_path / "model", tmp_path / "selector"
    FAMILY.model().save_pretrained(model)
    FAMILY.processor().save_pretrained(model)
    tokenizer = load_tokenizer(sentencepiece_folder())
    config = InternVLSelectorConfig(
        text_config=tiny.text_config(
            len(tokenizer), {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6}
        ),
        vision_hidden_size=128,
        own_tokens=True,
    )
    from flexselect.internvl.selector import InternVLSelector

    draw_weights(InternVLSelector(config), 1).save_pretrained(selector)
    tokenizer.save_pretrained(selector)
    return model, selector


def test_own_tokens_from_folder_to_answer(own_tokens: tuple[Path, Path]) -> None:
    folder, selector_folder = own_tokens
    model = flexselect.load_model(folder, device="cpu")
    inputs = FAMILY.inputs([Image(), "and", Video(7), QUESTION], [Video(4, 1), "Another one?"])
    flexselect.apply(model, budget=30, selector=selector_folder, frames_per_set=3)
    out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert torch.equal(out[:, :-3], inputs["input_ids"])
    found = model.flexselect.selections
    assert [len(s.kept) for s in found] == [30, 30]

    # By hand: the text in the selector's own ids around the same features.
    selector = model.flexselect.method.selector
    row = encoded(model.flexselect, inputs)[1]
    theirs = selector.localise(row.prompt)
    words = load_tokenizer(selector_folder).decode(theirs.layout.ids[theirs.layout.query])
    assert words == "\nAnother one?<|im_end|>\n<|im_start|>assistant\n"
    assert len(theirs.layout) != len(row.prompt.layout)
    shown = theirs.rows_of_frames(0, torch.tensor([0, 2]))
    layout = theirs.layout.take(shown)
    embeds = selector.embed(layout.ids).detach()
    features = row.features.selector
    assert features is not None
    of_frames = features.unflatten(0, (4, 9))[[0, 2]].flatten(0, 1)
    embeds[layout.feature] = of_frames
    eager = copy.deepcopy(selector.language_model)
    eager.set_attn_implementation("eager")
    mask = torch.ones(1, len(layout), dtype=torch.long)
    with torch.no_grad():
        weights = eager(
            inputs_embeds=embeds[None], attention_mask=mask, output_attentions=True
        ).attentions[-1][0]
    expected = weights[:, layout.query][:, :, layout.visual].amax((0, 1))
    mine = (found[1].frame == 0) | (found[1].frame == 2)
    torch.testing.assert_close(found[1].scores[mine], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("missing", ["model", "selector"])
def test_own_tokens_without_a_tokenizer(own_tokens: tuple[Path, Path], missing: str) -> None:
    folder, selector_folder = own_tokens
    for file in (folder if missing == "model" else selector_folder).glob("*token*"):
        file.unlink()
    model = flexselect.load_model(folder, device="cpu")
    flexselect.apply(model, budget=30, selector=selector_folder, frames_per_set=3)
    with pytest.raises(CheckpointError, match="no tokenizer beside"):
        model.generate(**FAMILY.inputs([Video(7), QUESTION]), max_new_tokens=1)


# -- prompts of the joined style, images of one tile ---------------------------------------------


def test_joined_frames_equal_the_unpatched_model() -> None:
    processor = with_frame_style(FAMILY.processor(), "joined")
    assert processor is not FAMILY.processor()
    model = FAMILY.model()
    text = f"<|im_start|>user\n<video>{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    inputs = dict(
        processor(
            text=[text], videos=[FAMILY.video(5, 0)], do_sample_frames=False, return_tensors="pt"
        )
    )
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    with Full()(model):
        assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), expected)
        [row] = encoded(model.flexselect, inputs)
    assert row.prompt.videos[0].frames == 5
    clips = row.prompt.videos
    ids = flexselect.architecture_of(model).expand(processor, text, clips)
    assert torch.equal(ids, inputs["input_ids"][0])


@pytest.mark.parametrize("first", [True, False])
def test_an_image_of_one_tile_beside_a_video(first: bool) -> None:
    """Nothing but text tells it from a frame; it stays whole."""
    processor, model = FAMILY.processor(), FAMILY.model()
    image = "<IMG_CONTEXT>\n"
    text = f"{image if first else ''}<video>\n{'' if first else image}{QUESTION}"
    inputs = dict(
        processor(
            text=[f"<|im_start|>user\n{text}<|im_end|>\n"],
            images=[noise((3, tiny.HEIGHT, tiny.WIDTH), 5)],
            videos=[FAMILY.video(7, 0)],
            do_sample_frames=False,
            return_tensors="pt",
        )
    )
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    with Full()(model):
        assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), expected)
    flexselect.apply(model, budget=24, layer=2, frames_per_set=3)
    model.generate(**inputs, max_new_tokens=1)
    [row] = encoded(model.flexselect, inputs)
    assert [clip.frames for clip in row.prompt.videos] == [7]
    assert len(row.prompt.images) == 1
    layout = row.prompt.layout
    [selection] = model.flexselect.selections
    rows = kept_rows(row.prompt, selection.kept)
    assert int((layout.feature & (layout.frame == NONE))[rows].sum()) == 9


# -- dynamic rope --------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_dynamic_rope_does_not_depend_on_what_was_read_before(positions: str) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = FAMILY.model(rope_parameters=rope, max_position_embeddings=64)
    long, short = (FAMILY.inputs([Video(count), QUESTION]) for count in (12, 4))
    flexselect.apply(model, budget=22, layer=2, frames_per_set=2, positions=positions)
    options = {"max_new_tokens": 6, "do_sample": False}

    def run(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        out = model.generate(**inputs, **options)
        selection = model.flexselect.selections[0]
        with torch.no_grad():
            return out, selection.scores, model(**inputs).logits

    fresh = run(short)
    after = run(long)
    assert int(model.model.language_model.rotary_emb.max_seq_len_cached) > 64
    for expected, got in ((fresh, run(short)), (after, run(long))):
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


# -- original checkpoints ------------------------------------------------------------------------


def test_original_checkpoint_through_the_public_api(
    original: Path, fixtures: Path, tmp_path: Path
) -> None:
    """Weights, processor and both published kinds of selector, as their authors lay them out."""
    model = flexselect.load_model(original, device="cpu")
    processor = flexselect.load_processor(original)
    case = fixtures / "internvl2_5" / "a_single"
    own = tmp_path / "own"
    shutil.copytree(case / "selector", own)
    add_tokenizer(own)
    side = model.config.vision_config.image_size[0]
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": QUESTION}]}],
        tokenize=False,
        add_generation_prompt=True,
    )
    inputs = processor(
        text=[text],
        videos=[noise((6, 3, side, side), 0)],
        do_sample_frames=False,
        return_tensors="pt",
    )
    assert int(inputs["input_ids"][0, 0]) == processor.tokenizer.bos_token_id
    total = 6 * (model.config.image_seq_length + 2)
    for selector in (None, own):
        layer = 2 if selector is None else None
        flexselect.apply(model, budget=total // 2, frames_per_set=3, selector=selector, layer=layer)
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert out.shape[1] == inputs["input_ids"].shape[1] + 3
        [found] = model.flexselect.selections
        assert len(found.kept) == total // 2 < found.num_visual == total
        assert found.settings["model"] == str(original)
        flexselect.remove(model)


def add_tokenizer(folder: Path) -> None:
    """Put a tokenizer of bytes beside a selector with a vocabulary of 320."""
    tokenizer = byte_tokenizer(tiny.VISION)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["vocab_size"] >= len(tokenizer)


def test_selector_with_the_models_own_tokens(
    original: Path, fixtures: Path, tmp_path: Path
) -> None:
    """An InternLM2 selector shares the model's tokens; it needs no tokenizer."""
    model = flexselect.load_model(original, device="cpu")
    folder = tmp_path / "shared"
    shutil.copytree(fixtures / "internvl2_5" / "a_single" / "selector_internlm2", folder)
    weights = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    [name] = [n for n in weights if "tok_embeddings" in n]
    rows = torch.randn(643, weights[name].shape[1], generator=torch.Generator().manual_seed(0))
    save_file({**weights, name: rows}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 643}))
    applied = flexselect.apply(model, budget=9, selector=folder).flexselect
    ids = torch.tensor([5, 6, 7])
    assert torch.equal(applied.method.selector.embed(ids), rows[ids])
    layout = layout_prompt(ids, [], [], model.config)
    assert applied.method.selector.localise(layout) is layout


# -- videos from files ---------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["framed", "joined"])
def test_open_video_reads_what_the_processor_would(style: Any) -> None:
    model, processor = FAMILY.model(), with_frame_style(FAMILY.processor(), style)
    path = SMALL_MEDIA / "h265_video.mp4"
    flexselect.apply(model, budget=33, layer=2, frames_per_set=3)
    video = flexselect.open_video(model, processor, path, frames=7)
    answer = video.ask(QUESTION, max_new_tokens=4)
    assert len(answer.selection.kept) == 33
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
