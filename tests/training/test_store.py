"""Stored scores: their order is exact, every byte is checked, and no end of a process harms."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexselect.core.errors import CheckpointError, FlexSelectError, OptionError
from flexselect.core.layout import Clip, Layout, Prompt
from flexselect.training.packing import pack, unpack
from flexselect.training.store import ScoreStore, ScoreWriter, merge

SETTINGS = {"layer": 4, "aggregation": "max", "sampling": {"frames": 16, "size": (56, 56)}}
TOKENS = 12


def prompt(seed: int = 0, frames: int = 3) -> Prompt:
    visual = torch.arange(20) < TOKENS
    frame = torch.where(visual, torch.arange(20) * frames // TOKENS, -1)
    return Prompt(
        Layout(
            ids=torch.arange(20) + 100 * seed,
            video=torch.where(visual, 0, -1),
            frame=frame,
            visual=visual,
            feature=visual,
            query=~visual,
        ),
        videos=(Clip(frames, 2, 2),),
    )


def scores(seed: int) -> torch.Tensor:
    return torch.rand(TOKENS, generator=torch.Generator().manual_seed(seed)) * 1e-6


NAMES = [f"s{n}" for n in range(10)]


def fill(
    folder: Path,
    names: list[str],
    shard: tuple[int, int] = (0, 1),
    settings: Any = SETTINGS,
    flush_samples: int = 3,
) -> None:
    with ScoreWriter(folder, settings, shard=shard, flush_samples=flush_samples) as writer:
        for name in names:
            number = int(name[1:])
            if number == 4:
                writer.add_damaged(name, "four.mp4 is cut")
            else:
                writer.add(name, scores(number), prompt(number))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return what a store holds that one process wrote without disturbance."""
    folder = tmp_path_factory.mktemp("whole")
    fill(folder, NAMES, flush_samples=100)
    assert merge(folder, NAMES, shard_samples=4)
    return contents(folder)


# -- numbers ------------------------------------------------------------------------------------


def check_round_trip(values: torch.Tensor) -> None:
    packed = pack(values)
    back = unpack(packed)
    assert packed.half.dtype == torch.float16
    assert back.dtype == torch.float32
    # Dense ranks are equal, so ties are the same and every order is.
    assert torch.equal(values.unique(return_inverse=True)[1], back.unique(return_inverse=True)[1])
    span = values.max() - values.min()
    steps = 2 * len(values) * torch.finfo(torch.float32).eps * values.max()
    bound = (values - values.min()) * 2**-10 + span * 2**-30 + steps + 1e-44
    assert bool(((back - values).abs() <= bound).all())


@given(
    st.lists(
        st.floats(0, 1, width=32) | st.floats(0, 2**-120, width=32) | st.sampled_from([0.0, 0.25]),
        min_size=1,
        max_size=60,
    )
)
def test_order_and_ties_survive_storage(values: list[float]) -> None:
    check_round_trip(torch.tensor(values))


@pytest.mark.parametrize("power", [1, 4, 16])
@pytest.mark.parametrize("scale", [1.0, 1e-8, 1e-30])
def test_order_survives_among_many_tokens(power: int, scale: float) -> None:
    torch.manual_seed(power)
    values = torch.rand(13_440).pow(power) * scale
    values[::7] = values[3]
    check_round_trip(values)


def test_order_survives_among_neighbours_of_float32() -> None:
    # 40,000 different scores become fewer than ten of float16.
    start = torch.tensor(0.3).view(torch.int32) + torch.arange(40_000, dtype=torch.int32)
    values = torch.cat([torch.tensor([0.0, 100.0]), start.view(torch.float32)])
    assert len(pack(values).half.unique()) < 12
    check_round_trip(values)
    check_round_trip(values.flip(0))


def test_scores_that_mean_nothing_are_refused() -> None:
    for bad in (float("nan"), float("inf"), -1.0):
        with pytest.raises(FlexSelectError, match="relevance"):
            pack(torch.tensor([0.5, bad]))


# -- files --------------------------------------------------------------------------------------


def test_scores_come_back(tmp_path: Path) -> None:
    fill(tmp_path, NAMES)
    for _ in range(2):
        store = ScoreStore(tmp_path)
        assert store.ranked == 9
        assert store.damaged == {"s4": "four.mp4 is cut"}
        for number, name in enumerate(NAMES):
            if number != 4:
                assert torch.equal(store.scores(name), unpack(pack(scores(number))))
                assert store.entry(name).frames == 3
        store.verify()
        with pytest.raises(CheckpointError, match=r"s4, which was damaged.*four\.mp4 is cut"):
            store.scores("s4")
        with pytest.raises(CheckpointError, match=r"no scores of the sample s99.*flexselect rank"):
            store.scores("s99")
        merge(tmp_path, NAMES, shard_samples=4)


@pytest.mark.parametrize("place", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("merged", [True, False], ids=["merged", "parts"])
def test_a_flipped_bit_is_caught_wherever_it_is(tmp_path: Path, merged: bool, place: float) -> None:
    fill(tmp_path, NAMES)
    if merged:
        merge(tmp_path, NAMES, shard_samples=4)
    for name, content in contents(tmp_path).items():
        if name == "settings.json":
            continue  # compared with what is expected, whenever it is used
        changed = bytearray(content)
        changed[int(place * len(content))] ^= 4
        (tmp_path / name).write_bytes(changed)
        with pytest.raises(CheckpointError, match="damaged"):
            ScoreStore(tmp_path).verify()
        (tmp_path / name).write_bytes(content)
    ScoreStore(tmp_path).verify()


def test_changed_numbers_are_caught_where_they_are_read(tmp_path: Path) -> None:
    fill(tmp_path, NAMES)
    merge(tmp_path, NAMES)
    (shard,) = tmp_path.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    caught = 0
    for name in NAMES:
        try:
            ScoreStore(tmp_path).scores(name)
        except CheckpointError as error:
            caught += "is missing or damaged" in str(error)
    assert caught == 1
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing or damaged"):
        ScoreStore(tmp_path).scores("s0")


def test_other_settings_are_refused(tmp_path: Path) -> None:
    fill(tmp_path, NAMES[:3])
    before = contents(tmp_path)
    with pytest.raises(OptionError, match=r"other settings: layer \(4 there, 5 here\)"):
        fill(tmp_path, NAMES[3:], settings={**SETTINGS, "layer": 5})
    with pytest.raises(OptionError, match="query"):
        fill(tmp_path, NAMES[3:], settings={**SETTINGS, "query": "last"})
    assert contents(tmp_path) == before
    fill(tmp_path, NAMES[3:])


def test_two_processes_cannot_write_one_shard(tmp_path: Path) -> None:
    with ScoreWriter(tmp_path, SETTINGS):
        with pytest.raises(OptionError, match="Another process is ranking shard 1/1"):
            ScoreWriter(tmp_path, SETTINGS)
        ScoreWriter(tmp_path, SETTINGS, shard=(1, 2)).close()
    ScoreWriter(tmp_path, SETTINGS).close()


def test_what_is_no_store_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no settings\.json"):
        ScoreStore(tmp_path)
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"settings\.json is damaged"):
        ScoreStore(tmp_path)


# -- one result -----------------------------------------------------------------------------------

Way = Callable[[Path], None]


def in_parts(folder: Path) -> None:
    fill(folder, NAMES, flush_samples=1)


def in_two_shards(folder: Path) -> None:
    fill(folder, NAMES[1::2], (1, 2))
    fill(folder, NAMES[::2], (0, 2))


def twice(folder: Path) -> None:
    fill(folder, NAMES[:7], (0, 3))
    fill(folder, NAMES[::-1], (0, 1))


def merged_before(folder: Path) -> None:
    fill(folder, NAMES[:5])
    assert merge(folder, NAMES[:5], shard_samples=2)
    fill(folder, NAMES[5:])


def after_an_error(folder: Path) -> None:
    def fail() -> None:
        with ScoreWriter(folder, SETTINGS, flush_samples=3) as writer:
            for number in range(4):
                writer.add(f"s{number}", scores(number), prompt(number))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert set(ScoreStore(folder).entries) == {"s0", "s1", "s2"}
    fill(folder, NAMES[3:])


@pytest.mark.parametrize("way", [in_parts, in_two_shards, twice, merged_before, after_an_error])
def test_a_merged_store_does_not_tell_how_it_came_about(
    tmp_path: Path, whole: dict[str, bytes], way: Way
) -> None:
    way(tmp_path)
    assert merge(tmp_path, NAMES, shard_samples=4)
    assert contents(tmp_path) == whole
    assert merge(tmp_path, NAMES, shard_samples=4)
    assert contents(tmp_path) == whole


def test_nothing_is_merged_before_all_is_there(tmp_path: Path) -> None:
    fill(tmp_path, NAMES[:-1])
    before = contents(tmp_path)
    assert not merge(tmp_path, NAMES)
    assert contents(tmp_path) == before


def test_files_of_a_process_at_work_are_left_alone(tmp_path: Path) -> None:
    with ScoreWriter(tmp_path, SETTINGS, shard=(1, 2)):
        half_way = tmp_path / "part-2-of-2-0.safetensors"
        half_way.write_bytes(b"its index is still to come")
        fill(tmp_path, NAMES, (0, 2))
        assert merge(tmp_path, NAMES)
        assert half_way.exists()
    assert merge(tmp_path, NAMES)
    assert not half_way.exists()


def test_what_is_repaired_replaces_the_damage(tmp_path: Path) -> None:
    fill(tmp_path, NAMES)
    merge(tmp_path, NAMES)
    with ScoreWriter(tmp_path, SETTINGS) as writer:
        writer.add("s4", scores(4), prompt(4))
    assert ScoreStore(tmp_path).damaged == {}
    merge(tmp_path, NAMES)
    store = ScoreStore(tmp_path)
    assert list(store.entries) == NAMES
    assert store.ranked == 10


class Killed(BaseException):
    """Stands for the end of the process: nothing of ours catches it."""


@pytest.mark.parametrize("merged", [False, True], ids=["first merge", "second merge"])
def test_killed_between_any_two_steps_of_a_merge_nothing_is_lost(
    tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, merged: bool
) -> None:
    start = tmp_path / "start"
    (merged_before if merged else in_two_shards)(start)
    step = 0
    while True:
        folder = tmp_path / f"killed at {step}"
        shutil.copytree(start, folder)
        left = step

        def count_down(call: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*args: Any, **options: Any) -> Any:
                nonlocal left
                if left == 0:
                    raise Killed
                left -= 1
                return call(*args, **options)

            return counted

        killed = False
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", count_down(os.replace))
            patch.setattr(Path, "unlink", count_down(Path.unlink))
            try:
                merge(folder, NAMES, shard_samples=4)
            except Killed:
                killed = True
        store = ScoreStore(folder)
        store.verify()
        assert set(store.entries) == set(NAMES)
        assert merge(folder, NAMES, shard_samples=4)
        assert contents(folder) == whole
        if not killed:
            break
        step += 1
    assert step > 8
