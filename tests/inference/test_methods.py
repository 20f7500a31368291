"""Methods on a hand-made prompt: which tokens they keep, their knobs, and their record."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flexselect.core.architecture import Architecture
from flexselect.core.errors import FlexSelectError, OptionError
from flexselect.core.layout import NONE, Clip, Layout, Prompt
from flexselect.inference.features import Encoded, Features
from flexselect.inference.methods import METHODS, FlexSelect, Full, Method, Random, Uniform

PRESET = {
    "layer": 1,
    "budget": 12,
    "aggregation": "max",
    "query": "all",
    "frames_per_set": 3,
    "positions": "original",
}


class Family:
    """Scores a token by its feature: the larger, the more attention of the one asking token."""

    num_layers = 3
    round_to = 1

    def __init__(self) -> None:
        self.loaded: list[str] = []

    def effective_budget(self, budget: int, prompt: Prompt) -> int:
        return -(-budget // self.round_to) * self.round_to

    def load_selector(self, path: str) -> Any:
        self.loaded.append(path)
        return Lite(path)

    def check_selector(self, selector: Any) -> None:
        Architecture.check_selector(self, selector)  # type: ignore[arg-type]

    def embed(self, ids: Tensor) -> Tensor:
        return torch.ones(len(ids), 1)

    def positions(self, prompt: Prompt) -> Tensor:
        return torch.arange(len(prompt.layout))

    def states(
        self, embeds: Tensor, positions: Tensor, layer: int, query_rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        return embeds[:, None, query_rows], embeds[:, None]


class Lite(Family):
    num_layers = 5
    aggregation = "mean"

    def __init__(self, name: str = "") -> None:
        super().__init__()
        self.name_or_path = name

    def localise(self, prompt: Prompt) -> Prompt:
        return prompt


def encoded(*frames: int, per_frame: int = 4, seed: int = 0) -> Encoded:
    """Lay out videos of so many frames one after another, then one token that asks."""
    video = [torch.full((n * per_frame,), v) for v, n in enumerate(frames)]
    frame = [torch.arange(n).repeat_interleave(per_frame) for n in frames]
    outside = torch.tensor([NONE])
    visual = torch.tensor([True] * sum(frames) * per_frame + [False])
    layout = Layout(
        ids=torch.randint(100, (len(visual),), generator=torch.Generator().manual_seed(seed)),
        video=torch.cat([*video, outside]),
        frame=torch.cat([*frame, outside]),
        visual=visual,
        feature=visual,
        query=~visual,
    )
    values = torch.randn(int(visual.sum()), 1, generator=torch.Generator().manual_seed(seed))
    prompt = Prompt(layout, tuple(Clip(n, 1, per_frame) for n in frames))
    times = tuple(torch.arange(n).double() for n in frames)
    return Encoded(prompt, Features(values, -values), times)


def select(method: Method, row: Encoded, family: Any = None) -> Any:
    family = family or Family()
    return method.resolve(family, PRESET).select(row, family)


def test_full_keeps_all() -> None:
    found = select(Full(), encoded(3, 2))
    assert found.kept.tolist() == list(range(20))
    assert found.scores is None
    assert found.video.tolist() == [0] * 12 + [1] * 8
    assert found.frame.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [0] * 4 + [1] * 4


def test_flexselect_keeps_the_best_of_every_set() -> None:
    """Seven frames in sets (0, 3, 6), (1, 4), (2, 5): four tokens of each."""
    row = encoded(7)
    found = select(FlexSelect(), row)
    values = row.features.model[:, 0]
    for first in range(3):
        mine = (found.frame % 3 == first).nonzero()[:, 0]
        best = mine[values[mine].topk(4).indices].sort().values
        assert torch.equal(found.kept[torch.isin(found.kept, mine)], best)
        assert torch.equal(found.scores[mine].argsort(), values[mine].argsort())


def test_lite_reads_its_own_features() -> None:
    row = encoded(3)
    found = select(FlexSelect(selector=Lite(), budget=4), row)
    worst = (-row.features.model[:, 0]).topk(4).indices.sort().values
    assert torch.equal(found.kept, worst)


def test_lite_needs_features_of_its_own() -> None:
    row = encoded(3)
    row = dataclasses.replace(row, features=Features(row.features.model))
    with pytest.raises(FlexSelectError, match="without the selector"):
        select(FlexSelect(selector=Lite(), budget=4), row)


def test_keep_all_is_decided_on_the_whole_and_scores_nothing() -> None:
    class Unscored(Family):
        def states(self, *_: Any) -> Any:
            pytest.fail("nothing is to be decided")

    for budget in (28, 29, 1000):
        found = select(FlexSelect(budget=budget), encoded(7), Unscored())
        assert found.kept.tolist() == list(range(28))
        assert found.scores is None
    rounding = Unscored()
    rounding.round_to = 14
    assert len(select(FlexSelect(budget=15), encoded(7), rounding).kept) == 28


def test_the_family_rounds_the_budget_of_every_method() -> None:
    family = Family()
    family.round_to = 8
    assert len(select(Random(budget=9), encoded(7), family).kept) == 16
    assert len(select(Uniform(budget=9), encoded(7), family).kept) == 16
    assert len(select(FlexSelect(budget=9, frames_per_set=64), encoded(7), family).kept) == 16


def test_a_method_of_ones_own_may_be_careless_about_order_and_precision() -> None:
    class Backwards(Full):
        def keep(self, row: Any, architecture: Any, progress: Any = None) -> Any:
            kept, _ = super().keep(row, architecture, progress)
            return kept.flip(0), torch.ones(row.prompt.num_visual, dtype=torch.bfloat16)

    row = encoded(3)
    found = select(Backwards(), row)
    assert torch.equal(found.kept, torch.arange(row.prompt.num_visual))
    assert found.scores is not None
    assert found.scores.dtype == torch.float32
    assert found.moments()


def test_scores_that_are_not_finite() -> None:
    row = encoded(7)
    row.features.model[5] = float("nan")
    with pytest.raises(FlexSelectError, match="bfloat16 or float32"):
        select(FlexSelect(), row)


@given(
    frames=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    budget=st.integers(1, 150),
    seed=st.integers(0, 99),
)
def test_no_method_exceeds_its_budget(frames: list[int], budget: int, seed: int) -> None:
    row = encoded(*frames, seed=seed)
    total = row.prompt.num_visual
    for method in (Random(budget=budget), FlexSelect(budget=budget)):
        kept = select(method, row).kept
        assert len(kept) <= budget or len(kept) == total
        assert len(kept.unique()) == len(kept)
        assert torch.equal(kept, kept.sort().values)
        if budget >= total:
            assert len(kept) == total
    assert len(select(Random(budget=budget), row).kept) == min(budget, total)


@given(frames=st.integers(1, 40), count=st.integers(1, 45), extra=st.integers(0, 3))
def test_uniform_spaces_whole_frames_evenly(frames: int, count: int, extra: int) -> None:
    found = select(Uniform(budget=4 * count + extra), encoded(frames))
    counts = found.kept_per_frame()
    assert set(counts.tolist()) <= {0, 4}
    shown = counts.nonzero()[:, 0]
    assert len(shown) == min(count, frames)
    if len(shown) > 1:
        gaps = shown.diff()
        assert int(gaps.max() - gaps.min()) <= 1
    assert abs(int(shown[0]) - (frames - 1 - int(shown[-1]))) <= 1


def test_uniform_never_exceeds_its_budget() -> None:
    """A share below one frame keeps nothing of that video; no frame at all is an error."""
    found = select(Uniform(budget=6), encoded(5, 2))
    assert found.kept_per_frame(0).tolist() == [0, 0, 4, 0, 0]
    assert found.kept_per_frame(1).tolist() == [0, 0]
    with pytest.raises(OptionError, match="no whole frame"):
        select(Uniform(budget=3), encoded(5, 2))


def test_random_is_decided_by_seed_and_prompt() -> None:
    def kept(seed: int, prompt: int) -> list[int]:
        torch.manual_seed(seed + prompt)
        return select(Random(budget=6, seed=seed), encoded(9, seed=prompt)).kept.tolist()

    state = torch.get_rng_state()
    assert kept(0, 0) == kept(0, 0)
    assert len({tuple(kept(seed, prompt)) for seed in range(3) for prompt in range(3)}) == 9
    torch.set_rng_state(state)
    select(Random(budget=6), encoded(9))
    assert torch.equal(torch.get_rng_state(), state)


def test_random_is_even() -> None:
    """Over many draws every token is kept about equally often."""
    counts = torch.zeros(40)
    for seed in range(400):
        counts[select(Random(budget=10, seed=seed), encoded(10)).kept] += 1
    assert counts.sum() == 4000
    assert counts.min() > 60
    assert counts.max() < 140


def test_knobs_left_out_come_from_the_preset() -> None:
    family: Any = Family()
    resolved = FlexSelect(budget=5).resolve(family, PRESET)
    assert resolved == FlexSelect(
        positions="original", budget=5, layer=1, aggregation="max", query="all", frames_per_set=3
    )
    assert Full().resolve(family, PRESET) == Full(positions="original")
    assert Random(seed=4).resolve(family, PRESET) == Random(positions="original", budget=12, seed=4)


def test_knobs_with_a_selector_come_from_the_selector() -> None:
    family: Any = Family()
    resolved = FlexSelect(selector="somewhere").resolve(family, PRESET)
    assert family.loaded == ["somewhere"]
    assert (resolved.layer, resolved.aggregation, resolved.budget) == (4, "mean", 12)
    given_ones = FlexSelect(selector=Lite(), layer=2, aggregation="token_selection")
    resolved = given_ones.resolve(family, PRESET)
    assert (resolved.layer, resolved.aggregation) == (2, "max")


def test_names_of_the_reference_are_resolved() -> None:
    family: Any = Family()
    method = FlexSelect(aggregation="token_selection_mean").resolve(family, PRESET)
    assert method.aggregation == "mean"


@pytest.mark.parametrize(
    "knobs",
    [
        {"budget": 0},
        {"layer": 3},
        {"aggregation": "sum"},
        {"query": "none"},
        {"positions": "new"},
        {"frames_per_set": 0},
        {"frames_per_set": True},
        {"sets_per_batch": -1},
    ],
)
def test_knobs_out_of_range(knobs: dict[str, Any]) -> None:
    [name] = knobs
    with pytest.raises(OptionError, match=name):
        FlexSelect(**knobs).resolve(Family(), PRESET)  # type: ignore[arg-type]


def test_a_method_without_a_preset_for_its_budget() -> None:
    with pytest.raises(OptionError, match="budget must be"):
        Random().resolve(Family(), {"positions": "original"})  # type: ignore[arg-type]


def test_methods_are_values() -> None:
    assert Random(budget=3) == Random(budget=3)
    assert hash(Uniform(budget=3)) == hash(Uniform(budget=3))
    with pytest.raises(dataclasses.FrozenInstanceError):
        Random(budget=3).budget = 4  # type: ignore[misc]


def test_every_method_is_found_by_its_name() -> None:
    assert list(METHODS.values()) == [Full, Uniform, Random, FlexSelect]
    assert all(name == method.name for name, method in METHODS.items())


def test_records() -> None:
    assert select(Random(), encoded(7)).settings == {
        "method": "random",
        "positions": "original",
        "budget": 12,
        "seed": 0,
    }
    for selector, name in [(Lite("here"), "here"), (Lite(), "in memory")]:
        settings = select(FlexSelect(selector=selector), encoded(7)).settings
        assert settings["method"] == "flexselect-lite"
        assert settings["selector"] == name
        json.dumps(settings)
    assert select(FlexSelect(), encoded(7)).settings["method"] == "flexselect"
    assert select(FlexSelect(), encoded(7)).settings["selector"] is None
