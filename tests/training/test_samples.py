"""A sample and its place depend on seed and epoch alone; what is damaged costs only itself."""

from __future__ import annotations

import itertools
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flexselect.core.errors import OptionError
from flexselect.inference.features import encode
from flexselect.inference.methods import FlexSelect
from flexselect.inference.session import open_video
from flexselect.testbed.make import make_videos
from flexselect.tests.training.tiny import FRAMES, families, tiny
from flexselect.training.examples import Example, read_examples
from flexselect.training.samples import Damaged, Sample, SampleLoader, SampleSet

FILMS, QUESTIONS = 5, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("films")
    make_videos(folder, split="train", frames=32, count=FILMS, questions=QUESTIONS)
    return folder


@pytest.fixture(scope="module")
def examples(folder: Path) -> list[Example]:
    return read_examples(folder)


class Counting(SampleSet):
    """A set that remembers which videos it decoded."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.decoded: list[str] = []

    def _decode(self, example: Example) -> Any:
        self.decoded.append(example.video.name)
        return super()._decode(example)


def sample_set(examples: list[Example], family: str = "internvl") -> Counting:
    architecture, processor = tiny(family)
    return Counting(examples, architecture, processor, {"frames": FRAMES})


def ids(samples: list[Sample | Damaged]) -> list[str]:
    return [sample.example.id for sample in samples]


def check_equal(one: list[Sample | Damaged], other: list[Sample | Damaged]) -> None:
    assert ids(one) == ids(other)
    for a, b in zip(one, other, strict=True):
        if isinstance(a, Damaged):
            assert a == b
            continue
        assert isinstance(b, Sample)
        assert torch.equal(a.pixels.values, b.pixels.values)
        assert a.pixels.clip == b.pixels.clip
        assert torch.equal(a.prompt.layout.ids, b.prompt.layout.ids)
        assert torch.equal(a.prompt.layout.query, b.prompt.layout.query)


@families
def test_a_sample_is_what_an_opened_video_asks(family: str, examples: list[Example]) -> None:
    architecture, processor = tiny(family)
    samples = sample_set(examples, family)
    for index in (0, 4):
        sample = samples[index]
        assert isinstance(sample, Sample)
        video = open_video(
            architecture.model,
            processor,
            sample.example.video,
            method=FlexSelect(budget=8),
            frames_per_chunk=6,
            frames=FRAMES,
        )
        content = [{"type": "video"}, {"type": "text", "text": sample.example.question}]
        encoded = video.encoded([{"role": "user", "content": content}], 0)
        for name, value in vars(encoded.prompt.layout).items():
            assert torch.equal(getattr(sample.prompt.layout, name), value), name
        assert sample.prompt.videos == encoded.prompt.videos
        features = encode(architecture, [sample.pixels])
        assert torch.allclose(features.model, video.features.model, atol=1e-6)


def test_the_number_of_workers_changes_nothing(examples: list[Example], tmp_path: Path) -> None:
    gone = Example("gone", tmp_path / "gone.mp4", "Where?")
    samples = sample_set([*examples[:4], gone, *examples[4:]])
    for together in (True, False):
        alone = list(SampleLoader(samples, seed=3, together=together).epoch(1))
        assert sorted(ids(alone)) == sorted(example.id for example in samples.examples)
        helped = list(SampleLoader(samples, seed=3, together=together, workers=2).epoch(1))
        check_equal(alone, helped)


def test_resumed_is_uninterrupted_and_decodes_nothing_twice(examples: list[Example]) -> None:
    samples = sample_set(examples)
    loader = SampleLoader(samples, seed=1)
    whole = list(loader.epoch(2))
    for start in (0, 1, 7, len(examples) - 1, len(examples)):
        samples = sample_set(examples)
        rest = list(SampleLoader(samples, seed=1).epoch(2, start))
        check_equal(rest, whole[start:])
        films = [sample.example.video.name for sample in rest]
        assert samples.decoded == [name for name, _ in itertools.groupby(films)]


def test_questions_of_a_video_share_its_decoding(examples: list[Example]) -> None:
    samples = sample_set(examples)
    seen = list(SampleLoader(samples).epoch(0))
    assert len(samples.decoded) == len(set(samples.decoded)) == FILMS
    assert len({id(s.pixels) for s in seen if isinstance(s, Sample)}) == FILMS
    # Through a worker too: the object that tells is one and the same.
    helped = list(SampleLoader(samples, workers=1).epoch(0))
    assert len({id(s.pixels) for s in helped if isinstance(s, Sample)}) == FILMS


def test_epochs_and_seeds_differ_and_repeat(examples: list[Example]) -> None:
    samples = sample_set(examples)
    orders = [SampleLoader(samples, seed=s).order(e) for s in (0, 1) for e in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert orders[3] == SampleLoader(samples, seed=1).order(1)
    assert all(sorted(order) == list(range(len(samples))) for order in orders)
    films = [examples[index].video for index in orders[0]]
    assert len(list(itertools.groupby(films))) == FILMS
    apart = SampleLoader(samples, together=False).order(0)
    assert len(list(itertools.groupby(examples[i].video for i in apart))) > FILMS
    assert SampleLoader(samples, shuffle=False).order(5) == list(range(len(samples)))


@pytest.mark.parametrize(("processes", "workers"), [(1, 1), (1, 4), (2, 3), (4, 1)])
def test_lanes_bring_a_video_to_one_worker_and_many_videos_to_a_step(
    processes: int, workers: int
) -> None:
    lanes = processes * workers
    films = 5 * lanes
    examples = [Example(f"{n}", Path(f"{n % films}.mp4"), "What?") for n in range(3 * films)]
    order = SampleLoader(sample_set(examples), lanes=lanes, seed=2).order(0)
    assert sorted(order) == list(range(len(examples)))
    video = [examples[index].video for index in order]
    for start in range(0, len(video), processes):
        assert len(set(video[start : start + processes])) == processes
    decoded = 0
    for place in range(processes):
        own = video[place::processes]
        for worker in range(workers):
            # DataLoader hands its batches to the workers in turn.
            decoded += len(list(itertools.groupby(own[worker::workers])))
    assert decoded == films


def test_lanes_of_different_length_lose_nothing() -> None:
    examples = [Example(f"{n}", Path(f"{int(n**0.5)}.mp4"), "What?") for n in range(50)]
    for lanes in (2, 7, 60):
        loader = SampleLoader(sample_set(examples), lanes=lanes)
        assert sorted(loader.order(0)) == list(range(50))
        assert loader.order(0) == loader.order(0) != loader.order(1)


def test_videos_that_take_turns_are_remembered(examples: list[Example]) -> None:
    architecture, processor = tiny("internvl")
    turns = [examples[n] for n in (0, 3, 1, 4, 2, 5)]
    for remember, decoded in ((1, 6), (2, 2)):
        samples = Counting(turns, architecture, processor, {"frames": FRAMES}, remember=remember)
        for index in range(len(turns)):
            samples[index]
        assert len(samples.decoded) == decoded


def cut(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def scratch(path: Path) -> None:
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle - 3000 : middle + 3000] = bytes(6000)
    path.write_bytes(content)


def test_damaged_videos_are_named_and_cost_only_themselves(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    films = sorted(tmp_path.glob("*.mp4"))
    films[0].unlink()
    cut(films[1], 0.5)
    scratch(films[2])
    films[3].write_text("no film")
    examples = [
        replace(example, video=tmp_path / example.video.name) for example in read_examples(folder)
    ]
    for workers in (0, 2):
        seen = list(SampleLoader(sample_set(examples), shuffle=False, workers=workers).epoch(0))
        assert ids(seen) == [example.id for example in examples]
        damaged = [sample for sample in seen if isinstance(sample, Damaged)]
        assert len(damaged) == 4 * QUESTIONS
        for sample in damaged:
            assert sample.example.video.name in sample.reason
        assert "no such file" in damaged[0].reason
        assert "could not be decoded" in damaged[2 * QUESTIONS].reason


def test_a_question_that_looks_like_a_video_is_damaged(examples: list[Example]) -> None:
    _, processor = tiny("internvl")
    token = processor.tokenizer.convert_ids_to_tokens(processor.tokenizer.context_image_token_id)
    bad = replace(examples[0], id="bad", question=f"What is {token}?")
    samples = sample_set([bad, examples[0]])
    first, second = samples[0], samples[1]
    assert isinstance(first, Damaged)
    assert "bad: the question cannot be asked" in first.reason
    assert isinstance(second, Sample)


def test_a_worker_of_any_kind_gets_no_weights(examples: list[Example]) -> None:
    architecture, _ = tiny("internvl")
    samples = SampleSet(examples, architecture, tiny("internvl")[1], {"frames": FRAMES})
    sent = pickle.dumps(samples)
    check_equal([pickle.loads(sent)[3]], [samples[3]])
    assert not hasattr(samples.architecture.model, "parameters")


def test_sampling_is_the_training_s_unless_given(examples: list[Example]) -> None:
    for family, more in (("internvl", {}), ("qwen2_5_vl", {"max_pixels": 3136})):
        architecture, processor = tiny(family)
        policy = SampleSet(examples, architecture, processor).policy
        assert policy["frames"] == 64
        assert policy.items() >= more.items()
        with pytest.raises(OptionError, match="Unknown options"):
            SampleSet(examples, architecture, processor, {"frame": 16})
