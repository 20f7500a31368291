"""Different ways to compute the same thing give the same thing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import flexselect
from flexselect import FlexSelect, Full, Random, Uniform
from flexselect.core.layout import Prompt
from flexselect.inference.engine import kept_rows
from flexselect.inference.features import encode
from flexselect.inference.scoring import score, split_prompt

from .factories import LAYER, Family, Image, Video, encoded, knobs, unpatched_positions

SHORT, LONG = ["What is it?"], ["A much longer question: what is shown at the end, and why?"]
ROWS: list[list[Any]] = [
    [Video(7, 1), *SHORT],
    [Video(4, 2), *LONG],
    [Image(3), "An image first.", Video(5, 3), *SHORT],
    ["No picture at all; ", *SHORT],
    [Video(5, 4), "Then another.", Video(4, 5), *LONG],
    [Image(4), *SHORT],
]

CLOSE: Any = {"rtol": 1e-4, "atol": 1e-4}


def logits(model: Any, inputs: dict[str, Tensor], **more: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs, **more).logits


def new_tokens(model: Any, inputs: dict[str, Tensor], **more: Any) -> Tensor:
    more = {"max_new_tokens": 6, "do_sample": False, **more}
    return model.generate(**inputs, **more)[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_equals_one_by_one(
    family: Family, model: Any, select: Callable[..., Any], side: str
) -> None:
    select(model, 24)
    batch = family.inputs(*ROWS, padding_side=side)
    assert not bool(batch["attention_mask"].all())
    together = logits(model, batch)
    selections = model.flexselect.selections
    tokens = new_tokens(model, batch)
    for index, row in enumerate(ROWS):
        alone = family.inputs(row)
        expected = logits(model, alone)
        [selection] = model.flexselect.selections if any_video(row) else [None]
        length = expected.shape[1]
        got = together[index, -length:] if side == "left" else together[index, :length]
        if any_video(row):
            assert selection is not None
            assert torch.equal(selections[index].kept, selection.kept)
            torch.testing.assert_close(got, expected[0], **CLOSE)
            assert torch.equal(tokens[index], new_tokens(model, alone)[0])
        else:
            # Alone, such a prompt goes to the unpatched model with its own choice of positions.
            assert selections[index] is None
            positions = unpatched_positions(model, alone)
            torch.testing.assert_close(
                got, logits(model, alone, position_ids=positions)[0], **CLOSE
            )


def any_video(row: list[Any]) -> bool:
    return any(isinstance(part, Video) for part in row)


def test_sets_batched_equal_one_by_one(
    family: Family, model: Any, select: Callable[..., Any]
) -> None:
    inputs = family.inputs([Video(8), *LONG])
    found = []
    for sets_per_batch in (1, 2, None):
        select(model, 30, frames_per_set=2, sets_per_batch=sets_per_batch)
        logits(model, inputs)
        found += model.flexselect.selections
        flexselect.remove(model)
    for other in found[1:]:
        torch.testing.assert_close(other.scores, found[0].scores, rtol=1e-5, atol=1e-6)
        assert torch.equal(other.kept, found[0].kept)


def test_streamed_encoding_equals_at_once(
    family: Family, model: Any, select: Callable[..., Any]
) -> None:
    applied = select(model, 24).flexselect
    selector = applied.method.encodes_for
    [request] = applied.architecture.read(family.inputs([Image(), Video(5), *SHORT]))
    at_once = encode(applied.architecture, request.pixels, selector, frames_per_chunk=99)
    for frames_per_chunk in (1, 2, 3):
        streamed = encode(applied.architecture, request.pixels, selector, frames_per_chunk)
        torch.testing.assert_close(streamed.model, at_once.model, rtol=1e-5, atol=1e-5)
        assert (streamed.selector is None) == (at_once.selector is None) == (selector is None)
        if selector is not None:
            torch.testing.assert_close(streamed.selector, at_once.selector, rtol=1e-5, atol=1e-5)


def test_encoding_equals_what_the_stock_model_puts_in_place(family: Family, model: Any) -> None:
    inputs = family.inputs([Image(), "and", Video(5), *SHORT])
    stock = stock_embeds(model, inputs)
    applied = flexselect.apply(model, Full()).flexselect
    embeds, _ = applied.engine.gather(encoded(applied, inputs)[0], None)
    torch.testing.assert_close(embeds, stock[0], rtol=1e-5, atol=1e-5)


def test_sdpa_equals_eager(family: Family, model: Any, select: Callable[..., Any]) -> None:
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    assert flexselect.architecture_of(eager).decoder.config._attn_implementation == "eager"
    assert flexselect.architecture_of(model).decoder.config._attn_implementation == "sdpa"
    inputs = family.inputs([Video(7), *SHORT], [Video(5, 1), *LONG])
    results = []
    for each in (model, eager):
        select(each, 24)
        if each is eager and each.flexselect.method.selector is not None:
            each.flexselect.method.selector.set_attn_implementation("eager")
        results.append((logits(each, inputs), each.flexselect.selections, new_tokens(each, inputs)))
    (first, chosen, tokens), (second, chosen_eager, tokens_eager) = results
    # What the padding of the shorter row attends to is nobody's business.
    for row, selection in enumerate(chosen):
        length = inputs["attention_mask"][row].sum() - selection.num_visual + len(selection.kept)
        torch.testing.assert_close(first[row, -length:], second[row, -length:], **CLOSE)
    assert torch.equal(tokens, tokens_eager)
    for one, other in zip(chosen, chosen_eager, strict=True):
        torch.testing.assert_close(one.scores, other.scores, rtol=1e-4, atol=1e-6)
        assert torch.equal(one.kept, other.kept)


def test_scores_are_the_stock_models_attention(family: Family, model: Any) -> None:
    """One set, so that the whole prompt is what the reference layer sees."""
    model.set_attn_implementation("eager")
    inputs = family.inputs([Video(4), *SHORT])
    architecture = flexselect.architecture_of(model)
    [request] = architecture.read(inputs)
    layout = request.prompt.layout
    clip = request.prompt.as_clip(0, torch.arange(4), torch.arange(len(layout)))
    positions = architecture.positions(clip)[..., None, :]
    with torch.no_grad():
        out = model(**inputs, position_ids=positions, output_attentions=True)
    query = clip.layout.query
    weights = out.attentions[LAYER][0][:, query][:, :, layout.visual]
    assert query.sum() > len(SHORT[0])
    for aggregation, expected in [("max", weights.amax((0, 1))), ("mean", weights.mean((0, 1)))]:
        with FlexSelect(**knobs(24, frames_per_set=4, aggregation=aggregation))(model):
            logits(model, inputs)
            scores = model.flexselect.selections[0].scores
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("frames_per_set", [1, 2, 5, 9])
def test_sets_that_share_their_places_are_what_each_would_be_alone(
    family: Family, model: Any, frames_per_set: int
) -> None:
    """23 frames in two or more sets of two sizes; some families number frames with two digits."""
    applied = flexselect.apply(model, **knobs(24)).flexselect
    for row in ([Video(23, 1), *SHORT], [Image(3), "One.", Video(13, 4), "Two.", Video(6), *LONG]):
        [one] = encoded(applied, family.inputs(row))
        sets = split_prompt(one.prompt, applied.architecture, frames_per_set)
        for part in sets:
            alone = one.prompt.as_clip(part.video, part.frames, part.rows)
            expected = one.prompt.rows_of_frames(part.video, part.frames)
            assert part.rows.tolist() == expected.tolist()
            assert part.columns.tolist() == alone.layout.visual.nonzero()[:, 0].tolist()
            assert part.query_rows.tolist() == alone.layout.query.nonzero()[:, 0].tolist()
            assert torch.equal(part.positions, applied.architecture.positions(alone))
            ranked = one.prompt.visual_rows()[part.members]
            assert ranked.tolist() == part.rows[part.columns].tolist()


def test_query_last_reads_the_last_token_alone(family: Family, model: Any) -> None:
    inputs = family.inputs([Video(4), *SHORT])
    applied = flexselect.apply(model, **knobs(24, query="last")).flexselect
    [row] = encoded(applied, inputs)
    sets = split_prompt(row.prompt, applied.architecture, 3, last_only=True)
    assert all(len(part.query_rows) == 1 for part in sets)
    assert all(int(part.query_rows) == len(part.rows) - 1 for part in sets)
    every = split_prompt(row.prompt, applied.architecture, 3)
    arguments: Any = {"layer": LAYER, "aggregation": "max"}
    last = score(row.prompt, sets, row.features.model, applied.architecture, **arguments)
    whole = score(row.prompt, every, row.features.model, applied.architecture, **arguments)
    assert bool((last <= whole + 1e-6).all())
    assert not torch.allclose(last, whole)
    torch.testing.assert_close(applied.engine.select(row).scores, last)


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_forward_is_the_stock_decoder_on_the_kept_rows(
    family: Family, model: Any, select: Callable[..., Any], positions: str
) -> None:
    inputs = family.inputs([Video(7), *LONG])
    architecture = flexselect.architecture_of(model)
    [request] = architecture.read(inputs)
    stock = stock_embeds(model, inputs)
    select(model, 24, positions=positions)
    got = logits(model, inputs)
    rows = kept_rows(request.prompt, model.flexselect.selections[0].kept)
    assert got.shape[1] == len(rows) < len(request.prompt.layout)
    where = positions_of(architecture, request.prompt, rows, positions)
    expected = decoder_logits(model, architecture, stock[:, rows], where)
    torch.testing.assert_close(got, expected, **CLOSE)
    # Generation: the same tokens as a loop that keeps no cache, positions counting on.
    embeds, answer = stock[:, rows], []
    for _ in range(5):
        answer.append(decoder_logits(model, architecture, embeds, where)[:, -1].argmax(-1))
        with torch.no_grad():
            embeds = torch.cat((embeds, architecture.embed(answer[-1])[None]), 1)
        where = torch.cat(
            (where, where[..., -1:].amax(0, keepdim=True).expand_as(where[..., -1:]) + 1), -1
        )
    assert torch.equal(new_tokens(model, inputs, max_new_tokens=5)[0], torch.cat(answer))


def positions_of(architecture: Any, prompt: Prompt, rows: Tensor, positions: str) -> Tensor:
    if positions == "original":
        return architecture.positions(prompt)[..., rows]
    return architecture.compact_positions(prompt, rows)


def decoder_logits(model: Any, architecture: Any, embeds: Tensor, positions: Tensor) -> Tensor:
    prompt = {
        "inputs_embeds": embeds,
        "position_ids": positions[..., None, :],
        "attention_mask": torch.ones(embeds.shape[:2], dtype=torch.long),
    }
    with torch.no_grad(), architecture.reading(prompt) as inputs:
        out = architecture.decoder(**inputs)
        return model.get_output_embeddings()(out.last_hidden_state)


def stock_embeds(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """What the unpatched model hands its decoder: embeddings, and what is added after layers."""
    seen = []
    decoder = flexselect.architecture_of(model).decoder

    def keep(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        rows = [kwargs["inputs_embeds"]]
        for level in kwargs.get("deepstack_visual_embeds") or ():
            rows.append(torch.zeros_like(rows[0]))
            rows[-1][kwargs["visual_pos_masks"]] = level
        seen.append(torch.cat(rows, -1))

    handle = decoder.register_forward_pre_hook(keep, with_kwargs=True)
    logits(model, inputs)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_keep_all_equals_the_unpatched_model(
    family: Family, model: Any, select: Callable[..., Any], side: str, positions: Any
) -> None:
    inputs = family.inputs([Video(5), *SHORT], [Image(), Video(3, 1), *LONG], padding_side=side)
    where = unpatched_positions(model, inputs)
    expected = logits(model, inputs, position_ids=where)
    mask = inputs["attention_mask"].bool()
    total = int(flexselect.architecture_of(model).read(inputs)[0].prompt.num_visual)
    for prepare in (
        lambda: flexselect.apply(model, Full(positions=positions)),
        lambda: select(model, total, positions=positions),
        lambda: select(model, 10 * total, positions=positions),
        lambda: flexselect.apply(model, Uniform(budget=total, positions=positions)),
        lambda: flexselect.apply(model, Random(budget=total, positions=positions)),
    ):
        prepare()
        got = logits(model, inputs)
        assert [len(s.kept) for s in model.flexselect.selections] == [
            s.num_visual for s in model.flexselect.selections
        ]
        flexselect.remove(model)
        torch.testing.assert_close(got[mask], expected[mask], **CLOSE)


def test_keep_all_generates_as_the_unpatched_model(family: Family, model: Any) -> None:
    inputs = family.inputs([Video(5), *SHORT], [Image(), Video(3, 1), *LONG])
    where = unpatched_positions(model, inputs)
    expected = model.generate(**inputs, position_ids=where, max_new_tokens=8, do_sample=False)
    flexselect.apply(model, Full())
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False), expected)


def test_apply_and_remove_leave_no_trace(
    family: Family, model: Any, select: Callable[..., Any]
) -> None:
    inputs = family.inputs([Video(5), *SHORT])
    before = logits(model, inputs), model.generate(**inputs, max_new_tokens=4, do_sample=False)
    names = set(model.__dict__)
    config, weights = model.config.to_dict(), {k: v.clone() for k, v in model.state_dict().items()}
    class_names = {cls: set(vars(cls)) for cls in type(model).__mro__}

    select(model, 24)
    assert {cls: set(vars(cls)) for cls in type(model).__mro__} == class_names
    assert model.state_dict().keys() == weights.keys()
    assert model.config.to_dict() == config
    assert not torch.equal(logits(model, inputs)[:, -1], before[0][:, -1])
    new_tokens(model, inputs)
    flexselect.remove(model)

    assert set(model.__dict__) == names
    assert model.config.to_dict() == config
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())
    assert torch.equal(logits(model, inputs), before[0])
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), before[1])
    flexselect.remove(model)
    assert set(model.__dict__) == names


def test_remove_gives_back_a_forward_that_was_replaced_before(family: Family, model: Any) -> None:
    """Tools such as accelerate replace an instance's forward too."""
    inputs = family.inputs([Video(5), *SHORT])
    calls = []
    plain = model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return plain(*args, **kwargs)

    model.forward = counted
    flexselect.apply(model, **knobs(24))
    logits(model, inputs)
    flexselect.remove(model)
    assert model.forward is counted
    assert calls == [1]


def test_two_applied_models_do_not_touch_each_other(family: Family, model: Any) -> None:
    other = family.model(seed=7)
    inputs = family.inputs([Video(7), *SHORT])
    alone = []
    for each, options in ((model, knobs(24)), (other, knobs(36, layer=1, aggregation="mean"))):
        flexselect.apply(each, **options)
        alone.append((new_tokens(each, inputs), each.flexselect.selections[0]))
        flexselect.remove(each)
    flexselect.apply(model, **knobs(24))
    flexselect.apply(other, **knobs(36, layer=1, aggregation="mean"))
    for _ in range(2):
        for each, (tokens, selection) in zip((model, other), alone, strict=True):
            assert torch.equal(new_tokens(each, inputs), tokens)
            assert torch.equal(each.flexselect.selections[0].kept, selection.kept)
    flexselect.remove(model)
    assert flexselect.is_applied(other)
    assert torch.equal(new_tokens(other, inputs), alone[1][0])


def test_a_copy_of_an_applied_model_is_a_model_of_its_own(family: Family, model: Any) -> None:
    inputs = family.inputs([Video(7), *SHORT])
    flexselect.apply(model, **knobs(24))
    expected = logits(model, inputs)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for weight in twin.parameters():
            weight.zero_()
    assert not torch.equal(logits(twin, inputs), expected)
    assert torch.equal(logits(model, inputs), expected)
    flexselect.remove(twin)
    assert flexselect.is_applied(model)
    assert not flexselect.is_applied(twin)


def test_bfloat16_selects_nearly_the_same(
    family: Family, model: Any, record_property: Callable[[str, object], None]
) -> None:
    inputs = family.inputs([Video(12), *LONG])
    kept = []
    for dtype in (torch.float32, torch.bfloat16):
        flexselect.apply(model.to(dtype), **knobs(72, frames_per_set=6))
        logits(model, inputs)
        kept.append(set(model.flexselect.selections[0].kept.tolist()))
        flexselect.remove(model)
    assert len(kept[0]) == len(kept[1])
    overlap = len(kept[0] & kept[1]) / len(kept[0])
    record_property("overlap of bfloat16 with float32", overlap)
    assert overlap >= 0.85
