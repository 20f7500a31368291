"""Training sees what inference sees: the same tokens, pixels, positions and logits."""

import numpy as np
import pytest
import torch

from flexselect.core.errors import OptionError
from flexselect.testbed.batches import IGNORE, Scribe, embed
from flexselect.testbed.check import family_inputs
from flexselect.testbed.clips import Clip, Pool
from flexselect.testbed.locate import FAMILIES
from flexselect.testbed.models import CELLS, family_of
from flexselect.testbed.questions import TASKS, compose
from flexselect.testbed.scenes import EMPTY, GRID, draw_frames
from flexselect.testbed.videos import HOLD, decode_video, draw_plot, encode_video

SMALL = {"num_hidden_layers": 2, "intermediate_size": 96}
SCENES = 4


@pytest.fixture(scope="module", params=FAMILIES)
def case(request):
    """A family, a random model of it, and a decoded video with its plot."""
    family = family_of(request.param)
    torch.manual_seed(0)
    model = family.build(**SMALL)
    plot = compose(11, SCENES, TASKS[:3])
    pictures = decode_video(encode_video(draw_plot(plot)))
    return family, model.eval(), plot, pictures


def pool_and_clip(family, model, plot, pictures):
    with torch.no_grad():
        features = family.encode(model, pictures).unflatten(0, (SCENES, -1))
    pool = Pool(features, plot.cells.reshape(SCENES, CELLS, 3))
    looks = pool.looks
    frames = SCENES * looks
    clip = Clip(
        scenes=np.repeat(np.arange(SCENES), looks),
        looks=np.tile(np.arange(looks), SCENES),
        runs=np.repeat(np.arange(SCENES), looks),
        times=np.arange(frames) * family.time_units,
        kept=np.ones((frames, len(family.frame_slots()[0])), dtype=bool),
    )
    return pool, clip


def batch_of(case, length):
    family, _model, plot, _pictures = case
    pool, clip = pool_and_clip(*case)
    scribe = Scribe(family)
    turns = [(question.text, question.answer) for question in plot.questions]
    return scribe, pool, scribe.batch(pool, [clip], [scribe.chat(turns)], length)


def test_a_packed_clip_is_the_chat_that_processor_and_template_make(case):
    family, _, plot, pictures = case
    chat = []
    for question in plot.questions:
        content = [{"type": "text", "text": question.text}]
        if not chat:
            content.insert(0, {"type": "video"})
        chat.append({"role": "user", "content": content})
        answer = [{"type": "text", "text": question.answer}]
        chat.append({"role": "assistant", "content": answer})
    prompt = family.processor.apply_chat_template(chat, tokenize=False)
    metadata = {"fps": 2, "total_num_frames": 8, "frames_indices": list(range(8))}
    real = family.processor(
        text=[prompt],
        videos=[torch.from_numpy(pictures).permute(0, 3, 1, 2)],
        video_metadata=[metadata],
        do_sample_frames=False,
        return_tensors="pt",
    )["input_ids"][0]
    scribe, _, batch = batch_of(case, len(real) + 5)
    ids = batch.ids[0]
    text = ids >= 0
    assert (ids[: len(real)][text[: len(real)]] == real[text[: len(real)]]).all()
    assert (ids[len(real) :] == scribe.pad).all()
    placeholders = set(real[~text[: len(real)]].tolist())
    assert len(placeholders) == 1
    assert placeholders.isdisjoint(ids.tolist())


def test_exactly_the_answers_and_their_ends_are_learned(case):
    family, _, plot, _ = case
    _scribe, _, batch = batch_of(case, 160)
    learned = batch.targets[0][batch.targets[0] != IGNORE]
    words = family.tokenizer.convert_ids_to_tokens(learned)
    assert words == [word for q in plot.questions for word in (q.answer, "<|im_end|>")]
    at = (batch.targets[0] != IGNORE).nonzero()[:, 0]
    assert (batch.ids[0][at + 1] == learned).all()


def test_training_logits_are_those_of_the_real_inputs(case):
    family, model, plot, pictures = case
    _scribe, pool, batch = batch_of(case, 160)
    with torch.no_grad():
        embeddings = embed(
            batch, model.get_input_embeddings().weight, pool.features, family.newline(model)
        )
        states = model.model.language_model(
            inputs_embeds=embeddings,
            position_ids=batch.positions,
            attention_mask={"full_attention": None},
            use_cache=False,
        ).last_hidden_state
        inputs = family_inputs(family, pictures, plot.questions[0].text)
        real = model(**inputs, use_cache=False).logits[0]
    at = int((batch.targets[0] != IGNORE).nonzero()[0, 0])
    assert len(real) == at + 1
    trained = states[0, : at + 1] @ model.get_input_embeddings().weight.T
    torch.testing.assert_close(trained, real, atol=1e-4, rtol=1e-4)


def test_pixels_of_training_are_those_of_the_whole_processor(case):
    family, _, plot, pictures = case
    inputs = family_inputs(family, pictures, plot.questions[0].text)
    real = inputs["pixel_values"] if family.name == "internvl" else inputs["pixel_values_videos"]
    own = family._pixels(pictures)["pixel_values_videos"]
    assert torch.equal(real.flatten(), torch.as_tensor(own).flatten())


def test_each_cell_has_its_token_row_by_row(case):
    family, model, _, _ = case
    blank = np.full((1, GRID, GRID, 3), EMPTY)
    for cell in range(CELLS):
        marked = blank.copy()
        marked[0, cell // GRID, cell % GRID] = (2, 3, 4)
        with torch.no_grad():
            without, with_mark = (
                family.encode(model, draw_frames(cells, np.random.RandomState(0), hold=HOLD))
                for cells in (blank, marked)
            )
        change = (without - with_mark).abs().mean((0, 2))
        if family.name == "llava_video":
            # A random SigLIP tower averages over the frame; only the trained one keeps places
            # apart, so here the patches before its attention have to show the order.
            change = _patch_change(model, family, blank, marked)
        assert int(change.argmax()) == cell


def _patch_change(model, family, blank, marked):
    embedded = []
    for cells in (blank, marked):
        pictures = draw_frames(cells, np.random.RandomState(0), hold=HOLD)
        pixels = family._pixels(pictures)["pixel_values_videos"][0]
        embedded.append(model.model.vision_tower.embeddings(pixels))
    change = (embedded[0] - embedded[1]).abs().mean((0, 2))
    return change.unflatten(0, (GRID, 2, GRID, 2)).sum((1, 3)).flatten()


def test_qwen_positions_are_those_of_the_family():
    from flexselect.qwen2_5_vl.encode import read_requests
    from flexselect.qwen2_5_vl.positions import whole_positions

    family = family_of("qwen2_5_vl")
    model = family.build(**SMALL)
    pictures = decode_video(encode_video(draw_plot(compose(2, 6, ["number"]))))
    inputs = family_inputs(family, pictures, "What number is on the red star?")
    own = inputs.pop("position_ids")[:, 0]
    (request,) = read_requests(inputs, model.config)
    theirs = whole_positions(request.prompt, model.config.vision_config.tokens_per_second)
    assert torch.equal(own, theirs)


def test_an_unknown_family_is_refused():
    with pytest.raises(OptionError, match="gpt"):
        family_of("gpt")
