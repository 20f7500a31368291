"""``generate`` and forward of an applied model behave as the caller knows them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

import flexselect
from flexselect import FlexSelect, Full, OptionError

from .factories import Family, Image, Video, encoded, knobs, unpatched_positions

QUESTION = "What is it?"
TWO_ROWS = ([Video(7, 1), QUESTION], [Image(), Video(5, 2), "And why, would you say, is that so?"])


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.values.append(value.clone())

    def end(self) -> None:
        self.ended = True


class SeenIds(LogitsProcessor):
    def __init__(self) -> None:
        self.ids: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.ids.append(input_ids.clone())
        return scores


def both(
    family: Family, model: Any, inputs: dict[str, Tensor], options: Callable[[], dict[str, Any]]
) -> tuple[Any, Any]:
    """Generate with the unpatched model, then with every token kept by `Full`."""
    where = unpatched_positions(model, inputs)
    torch.manual_seed(0)
    stock = model.generate(**inputs, position_ids=where, **options())
    flexselect.apply(model, Full())
    torch.manual_seed(0)
    ours = model.generate(**inputs, **options())
    flexselect.remove(model)
    return stock, ours


def test_generate_and_forward_both_select(
    family: Family, model: Any, select: Callable[..., Any]
) -> None:
    inputs = family.inputs([Video(7), QUESTION])
    select(model, 24)
    with torch.no_grad():
        logits = model(**inputs).logits
    [by_forward] = model.flexselect.selections
    out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    [by_generate] = model.flexselect.selections
    assert len(by_forward.kept) == 24 < by_forward.num_visual
    assert torch.equal(by_forward.kept, by_generate.kept)
    assert logits.shape[1] == inputs["input_ids"].shape[1] - by_forward.num_visual + 24
    length = inputs["input_ids"].shape[1]
    assert torch.equal(out[:, :length], inputs["input_ids"])
    assert out.shape[1] == length + 3
    assert int(out[0, length]) == int(logits[0, -1].argmax())


OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "nothing": lambda: {},
    "max_new_tokens": lambda: {"max_new_tokens": 5},
    "generation_config": lambda: {"generation_config": GenerationConfig(max_new_tokens=4)},
    "max_time": lambda: {"max_time": 1000.0, "max_new_tokens": 3},
    "sampling": lambda: {"do_sample": True, "temperature": 1.5, "top_k": 20, "max_new_tokens": 6},
    "several sequences": lambda: {
        "do_sample": True,
        "num_return_sequences": 3,
        "max_new_tokens": 4,
    },
    "beams": lambda: {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5},
    "repetition_penalty": lambda: {"repetition_penalty": 3.0, "max_new_tokens": 6},
    "no_repeat_ngram_size": lambda: {"no_repeat_ngram_size": 1, "max_new_tokens": 6},
    "no cache": lambda: {"use_cache": False, "max_new_tokens": 4},
    "static cache": lambda: {"cache_implementation": "static", "max_new_tokens": 4},
    "own cache": lambda: {"past_key_values": DynamicCache(), "max_new_tokens": 4},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_mean_what_they_mean_unpatched(family: Family, model: Any, name: str) -> None:
    if name in ("several sequences", "beams") and not repeats_pictures_in_order(model):
        pytest.skip("this release of transformers gives the copies of a prompt the wrong pictures")
    stock, ours = both(family, model, family.inputs(*TWO_ROWS), OPTIONS[name])
    assert torch.equal(stock, ours)


def repeats_pictures_in_order(model: Any) -> bool:
    """Whether the unpatched model encodes before it copies prompts, or copies with care.

    transformers 5.17 repeats whatever tensor it finds row by row, pictures of a batch too.
    """
    encodes_first = "mm_encoder_outputs" in inspect.signature(model.forward).parameters
    return encodes_first or "_expand_inputs_for_generation" in vars(type(model))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            lambda length: {"max_length": length + 5, "do_sample": False}, id="max_length"
        ),
        pytest.param(
            lambda length: {"generation_config": GenerationConfig(max_length=length + 5)},
            id="generation_config",
        ),
        pytest.param(lambda length: {"max_length": 3, "max_new_tokens": 5}, id="both"),
    ],
)
def test_lengths_count_the_callers_prompt(
    family: Family, model: Any, options: Callable[[int], dict[str, Any]]
) -> None:
    inputs = family.inputs([Video(7), QUESTION])
    length = inputs["input_ids"].shape[1]
    assert model.generate(**inputs, **options(length)).shape[1] == length + 5
    flexselect.apply(model, **knobs(24))
    config = model.generation_config.to_dict()
    assert model.generate(**inputs, **options(length)).shape[1] == length + 5
    assert model.generation_config.to_dict() == config


def test_lengths_of_the_models_own_generation_config(family: Family, model: Any) -> None:
    inputs = family.inputs([Video(7), QUESTION])
    length = inputs["input_ids"].shape[1]
    flexselect.apply(model, **knobs(24))
    assert model.generate(**inputs).shape[1] == length + 20
    model.generation_config.max_new_tokens = 3
    assert model.generate(**inputs).shape[1] == length + 3
    model.generation_config.max_new_tokens = None
    model.generation_config.max_length = length + 4
    assert model.generate(**inputs).shape[1] == length + 4
    assert model.generation_config.max_length == length + 4


@pytest.mark.parametrize("name", ["min_length", "min_new_tokens"])
def test_least_lengths_hold_back_the_end(family: Family, model: Any, name: str) -> None:
    inputs = family.inputs([Video(7), QUESTION])
    length = inputs["input_ids"].shape[1]
    flexselect.apply(model, **knobs(24))
    free = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    end = int(free[0, length])
    stop = {"eos_token_id": end, "pad_token_id": end, "do_sample": False, "max_new_tokens": 9}
    assert model.generate(**inputs, **stop).shape[1] == length + 1
    least = {name: length + 4 if name == "min_length" else 4}
    for options in ({**stop, **least}, {"generation_config": GenerationConfig(**stop, **least)}):
        out = model.generate(**inputs, **options)
        assert out.shape[1] >= length + 4
        assert end not in out[0, length : length + 4].tolist()


def test_end_of_text_stops_each_row(family: Family, model: Any) -> None:
    inputs = family.inputs(*TWO_ROWS)
    length = inputs["input_ids"].shape[1]
    flexselect.apply(model, **knobs(24))
    free = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, length:]
    end = int(free[0, 2])
    pad = (end + 1) % 200
    out = model.generate(
        **inputs, max_new_tokens=6, do_sample=False, eos_token_id=end, pad_token_id=pad
    )[:, length:]
    for row in range(2):
        stop = (free[row] == end).nonzero()
        stop = int(stop[0]) + 1 if len(stop) else 6
        assert torch.equal(out[row, :stop], free[row, :stop])
        assert bool((out[row, stop:] == pad).all())


def test_streamer_gets_the_prompt_then_the_tokens(
    family: Family, model: Any, select: Callable[..., Any]
) -> None:
    inputs = family.inputs([Video(7), QUESTION])
    select(model, 24)
    streamer = Recorder()
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False, streamer=streamer)
    assert streamer.ended
    assert torch.equal(streamer.values[0], inputs["input_ids"])
    assert len(streamer.values) == 5
    assert torch.equal(torch.cat([value.flatten() for value in streamer.values]), out[0])


def test_logits_processors_see_the_callers_prompt(family: Family, model: Any) -> None:
    inputs = family.inputs(*TWO_ROWS)
    flexselect.apply(model, **knobs(24))
    seen = SeenIds()
    out = model.generate(
        **inputs,
        max_new_tokens=3,
        do_sample=False,
        logits_processor=LogitsProcessorList([seen]),
    )
    length = inputs["input_ids"].shape[1]
    for step, ids in enumerate(seen.ids):
        assert torch.equal(ids, out[:, : length + step])


def test_sampling_is_seeded(family: Family, model: Any, select: Callable[..., Any]) -> None:
    inputs = family.inputs(*TWO_ROWS)
    select(model, 24)

    def sample(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model.generate(
            **inputs, do_sample=True, num_return_sequences=3, max_new_tokens=6, temperature=2.0
        )

    first = sample(0)
    assert first.shape == (6, inputs["input_ids"].shape[1] + 6)
    length = inputs["input_ids"].shape[1]
    assert torch.equal(first[:, :length], inputs["input_ids"].repeat_interleave(3, 0))
    assert len({tuple(row) for row in first[:3, length:].tolist()}) > 1
    assert torch.equal(first, sample(0))
    assert not torch.equal(first, sample(1))


def test_beam_search_of_a_batch_equals_one_by_one(
    family: Family, model: Any, select: Callable[..., Any]
) -> None:
    select(model, 24)
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5, "do_sample": False}
    together = model.generate(**family.inputs(*TWO_ROWS), **options)
    for index, row in enumerate(TWO_ROWS):
        alone = model.generate(**family.inputs(row), **options)
        assert torch.equal(together[2 * index : 2 * index + 2, -5:], alone[:, -5:])


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}])
def test_return_dict(family: Family, model: Any, options: dict[str, Any]) -> None:
    inputs = family.inputs(*TWO_ROWS)
    flexselect.apply(model, **knobs(24))
    options = {"max_new_tokens": 4, "do_sample": False, **options}
    plain = model.generate(**inputs, **options)
    out = model.generate(
        **inputs, **options, return_dict_in_generate=True, output_scores=True, output_logits=True
    )
    assert torch.equal(out.sequences, plain)
    assert len(out.scores) == len(out.logits) == 4
    if "num_beams" not in options:
        assert torch.equal(torch.stack(out.scores, 1).argmax(-1), plain[:, -4:])


def test_without_a_cache_is_the_same(family: Family, model: Any) -> None:
    inputs = family.inputs(*TWO_ROWS)
    flexselect.apply(model, **knobs(24))
    cached = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    plain = model.generate(**inputs, max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(plain, cached)


def test_static_cache_is_the_same(family: Family, model: Any) -> None:
    inputs = family.inputs(*TWO_ROWS)
    flexselect.apply(model, **knobs(24))
    options = {"max_new_tokens": 5, "do_sample": False}
    plain = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, cache_implementation="static", **options), plain)


def test_ids_as_the_first_argument(family: Family, model: Any) -> None:
    inputs = family.inputs(*TWO_ROWS)
    flexselect.apply(model, **knobs(24))
    named = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    rest = dict(inputs)
    ids = rest.pop("input_ids")
    assert torch.equal(model.generate(ids, **rest, max_new_tokens=4, do_sample=False), named)
    assert torch.equal(model.generate(inputs=ids, **rest, max_new_tokens=4, do_sample=False), named)
    for config in (
        GenerationConfig(max_new_tokens=4, do_sample=False),
        GenerationConfig(max_length=ids.shape[1] + 4, do_sample=False),
    ):
        assert torch.equal(model.generate(ids, config, **rest), named)
    with torch.no_grad():
        assert torch.equal(model(ids, **rest).logits, model(**inputs).logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_does_not_matter(
    family: Family, model: Any, select: Callable[..., Any], side: str
) -> None:
    select(model, 24)
    answers = []
    for padding in ("left", side):
        inputs = family.inputs(*TWO_ROWS, padding_side=padding)
        out = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        assert torch.equal(out[:, :-5], inputs["input_ids"])
        answers.append(out[:, -5:])
    assert torch.equal(*answers)


def test_the_callers_tensors_are_never_written_to(
    family: Family, model: Any, select: Callable[..., Any]
) -> None:
    inputs = family.inputs(*TWO_ROWS)
    inputs["position_ids"] = unpatched_positions(model, inputs)
    # Videos of different length stay a list in some families.
    tensors = [
        (name, tensor)
        for name, value in inputs.items()
        for tensor in (value if isinstance(value, list) else [value])
    ]
    before = [(tensor.clone(), tensor._version) for _, tensor in tensors]
    select(model, 24)
    with torch.no_grad():
        model(**inputs)
    model.generate(**inputs, max_new_tokens=3)
    for (name, tensor), (copy, version) in zip(tensors, before, strict=True):
        assert torch.equal(tensor, copy), name
        assert tensor._version == version, name


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_a_decoding_loop_of_the_callers_own(
    family: Family, model: Any, select: Callable[..., Any], positions: str
) -> None:
    """Forward on the prompt, then token by token with its cache and nothing else."""
    inputs = family.inputs([Video(7), QUESTION])
    select(model, 24, positions=positions)
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, -6:]
    # What another prompt left behind must not matter.
    model.generate(**family.inputs([Video(12), "Long?"]), max_new_tokens=2)
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
        answer = [out.logits[:, -1:].argmax(-1)]
        for _ in range(5):
            out = model(input_ids=answer[-1], past_key_values=out.past_key_values, use_cache=True)
            answer.append(out.logits[:, -1:].argmax(-1))
    assert torch.equal(torch.cat(answer, 1)[0], expected)


def test_two_decoding_loops_at_a_time(
    family: Family, model: Any, select: Callable[..., Any]
) -> None:
    """A padded batch and another prompt, step by step in turns: each goes on from its own end."""
    select(model, 24, positions="original")
    batches = [family.inputs(*TWO_ROWS), family.inputs([Video(12), "Long?"])]
    expected = [
        model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, -5:] for inputs in batches
    ]
    with torch.no_grad():
        outs = [model(**inputs, use_cache=True) for inputs in batches]
        masks = [
            model.flexselect.engine.prefill(gathered(model, b))["attention_mask"] for b in batches
        ]
        answers = [[out.logits[:, -1:].argmax(-1)] for out in outs]
        for _ in range(4):
            for index, out in enumerate(outs):
                last = answers[index][-1]
                masks[index] = torch.cat((masks[index], torch.ones_like(last)), 1)
                out = model(
                    input_ids=last,
                    attention_mask=masks[index],
                    past_key_values=out.past_key_values,
                    use_cache=True,
                )
                answers[index].append(out.logits[:, -1:].argmax(-1))
    for answer, tokens in zip(answers, expected, strict=True):
        assert torch.equal(torch.cat(answer, 1), tokens)


def gathered(model: Any, inputs: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    engine = model.flexselect.engine
    return [engine.gather(row, engine.select(row)) for row in encoded(model.flexselect, inputs)]


def test_logits_to_keep_counts_from_the_end(family: Family, model: Any) -> None:
    inputs = family.inputs([Video(7), QUESTION])
    flexselect.apply(model, **knobs(24))
    with torch.no_grad():
        whole = model(**inputs).logits
        last = model(**inputs, logits_to_keep=2).logits
    torch.testing.assert_close(last, whole[:, -2:])


def test_return_dict_false(family: Family, model: Any) -> None:
    inputs = family.inputs([Video(7), QUESTION])
    flexselect.apply(model, **knobs(24))
    with torch.no_grad():
        whole = model(**inputs)
        assert torch.equal(model(**inputs, return_dict=False)[0], whole.logits)


def test_signatures_stay_visible(family: Family, model: Any) -> None:
    stock = inspect.signature(model.forward), inspect.signature(model.generate)
    flexselect.apply(model, **knobs(24))
    assert (inspect.signature(model.forward), inspect.signature(model.generate)) == stock


def test_a_misspelt_option_is_still_refused(family: Family, model: Any) -> None:
    inputs = family.inputs([Video(7), QUESTION])
    flexselect.apply(model, **knobs(24))
    with pytest.raises((ValueError, TypeError), match="max_new_token"):
        model.generate(**inputs, max_new_token=3)


@pytest.mark.parametrize(
    "option",
    [
        pytest.param(lambda _: {"prompt_lookup_num_tokens": 2}, id="prompt_lookup_num_tokens"),
        pytest.param(lambda model: {"assistant_model": model}, id="assistant_model"),
        pytest.param(lambda _: {"assistant_early_exit": 1}, id="assistant_early_exit"),
        pytest.param(lambda _: {"prefill_chunk_size": 8}, id="prefill_chunk_size"),
    ],
)
def test_decoding_that_rereads_the_prompt_is_refused(
    family: Family, model: Any, option: Callable[[Any], dict[str, Any]]
) -> None:
    """Stock generation would read the ids of dropped tokens, without any features."""
    inputs = family.inputs([Video(7), QUESTION])
    options = {"max_new_tokens": 3, **option(model)}
    [name] = option(model)
    flexselect.apply(model, **knobs(24))
    with pytest.raises(OptionError, match=f"{name} cannot be used"):
        model.generate(**inputs, **options)
    if name != "assistant_model":
        with pytest.raises(OptionError, match=f"{name} cannot be used"):
            model.generate(**inputs, generation_config=GenerationConfig(**options))
        setattr(model.generation_config, name, options[name])
        with pytest.raises(OptionError, match=f"{name} cannot be used"):
            model.generate(**inputs, max_new_tokens=3)


def test_context_manager(family: Family, model: Any) -> None:
    inputs = family.inputs([Video(7), QUESTION])
    with torch.no_grad():
        before = model(**inputs).logits
    method = FlexSelect(**knobs(24))
    for _ in range(2):
        with method(model) as inside:
            assert inside is model
            assert flexselect.is_applied(model)
            with torch.no_grad():
                assert model(**inputs).logits.shape[1] < before.shape[1]
        assert not flexselect.is_applied(model)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)


def test_context_manager_removes_when_the_block_raises(family: Family, model: Any) -> None:
    names = set(model.__dict__)
    with pytest.raises(RuntimeError, match="mine"), FlexSelect(**knobs(24))(model):
        raise RuntimeError("mine")
    assert set(model.__dict__) == names


def test_a_context_inside_an_applied_model_is_refused_and_changes_nothing(
    family: Family, model: Any
) -> None:
    flexselect.apply(model, **knobs(24))
    applied = model.flexselect
    with pytest.raises(flexselect.FlexSelectError, match="remove"), Full()(model):
        pytest.fail("the block must not run")
    assert model.flexselect is applied
