"""Encoding in chunks with a tower of arithmetic, and putting features in their place."""

from __future__ import annotations

import logging
import platform
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flexselect.core.architecture import Pixels
from flexselect.core.errors import FlexSelectError
from flexselect.core.layout import Clip
from flexselect.inference import features
from flexselect.inference.features import assemble, encode
from flexselect.tests.core.handmade import make


class Tower:
    """Two feature tokens a frame: the frame's value, and ten times it."""

    def __init__(self, fits: int = 99) -> None:
        self.fits = fits
        self.seen: list[int] = []

    def encode(self, pixels: Pixels, selector: Any | None) -> tuple[Tensor, Tensor | None]:
        if pixels.clip.frames > self.fits:
            raise torch.OutOfMemoryError
        assert len(pixels.values) == 3 * pixels.clip.frames
        self.seen.append(pixels.clip.frames)
        value = pixels.values.reshape(-1, 3)[:, 0]
        tokens = torch.stack((value, 10 * value), 1).reshape(-1, 1)
        return tokens, None if selector is None else -tokens


def clip(first: int, frames: int) -> Pixels:
    values = torch.arange(first, first + frames).repeat_interleave(3).float()
    return Pixels(values, Clip(frames, 1, 2, 0.5))


def expected(frames: int) -> Tensor:
    value = torch.arange(frames).float()
    return torch.stack((value, 10 * value), 1).reshape(-1, 1)


def run(tower: Tower, *arguments: Any, **more: Any) -> Any:
    return encode(tower, *arguments, **more)  # type: ignore[arg-type]


@given(
    clips=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    frames_per_chunk=st.integers(1, 12),
    fits=st.integers(1, 12),
    selector=st.booleans(),
)
def test_any_chunks_give_the_same_features(
    clips: list[int], frames_per_chunk: int, fits: int, selector: bool
) -> None:
    starts = [sum(clips[:i]) for i in range(len(clips))]
    pieces = [clip(start, frames) for start, frames in zip(starts, clips, strict=True)]
    tower = Tower(fits)
    logging.disable()
    found = run(tower, pieces, object() if selector else None, frames_per_chunk)
    logging.disable(logging.NOTSET)
    assert torch.equal(found.model, expected(sum(clips)))
    assert (found.selector is not None) == selector
    if selector:
        assert torch.equal(found.selector, -expected(sum(clips)))
    assert max(tower.seen) <= min(frames_per_chunk, fits)


def test_frames_of_a_clip() -> None:
    part = clip(0, 5).frames(1, 3)
    assert part.clip == Clip(2, 1, 2, 0.5)
    assert part.values.tolist() == [1, 1, 1, 2, 2, 2]


def test_a_stream_is_consumed_piece_by_piece() -> None:
    tower = Tower()
    encoded_when_asked = []

    def stream() -> Iterator[Pixels]:
        for start in (0, 4, 8):
            encoded_when_asked.append(sum(tower.seen))
            yield clip(start, 4)

    calls: list[tuple[str, int, int]] = []
    found = run(tower, stream(), frames_per_chunk=3, progress=lambda *a: calls.append(a), total=12)
    assert torch.equal(found.model, expected(12))
    assert encoded_when_asked == [0, 4, 8]
    assert tower.seen == [3, 1] * 3
    assert calls == [("encode", done, 12) for done in (3, 4, 7, 8, 11, 12)]


def test_halving_says_so_and_goes_on_smaller(caplog: pytest.LogCaptureFixture) -> None:
    tower = Tower(fits=3)
    with caplog.at_level(logging.WARNING):
        found = run(tower, [clip(0, 16), clip(16, 4)], frames_per_chunk=8)
    assert torch.equal(found.model, expected(20))
    assert set(tower.seen) == {2}
    messages = [record.getMessage() for record in caplog.records]
    assert [record.name for record in caplog.records] == ["flexselect.inference.features"] * 2
    assert "8 frames at a time; going on with 4" in messages[0]
    assert "4 frames at a time; going on with 2" in messages[1]


def test_one_frame_that_does_not_fit() -> None:
    with pytest.raises(FlexSelectError, match="single frame") as error:
        run(Tower(fits=0), [clip(0, 4)])
    assert isinstance(error.value.__cause__, torch.OutOfMemoryError)


def test_other_errors_are_not_swallowed() -> None:
    class Broken(Tower):
        def encode(self, pixels: Pixels, selector: Any | None) -> Any:
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run(Broken(), [clip(0, 4)])


class Remote(Tensor):
    """Looks like a tensor on a GPU."""

    @property
    def device(self) -> Any:  # type: ignore[override]
        return torch.device("cuda")


def test_features_that_travel_are_read_after_they_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy is filled only when it is waited for, and never held longer than the next one."""
    travelling: list[int] = []
    sent: list[int] = []

    def send(part: Tensor) -> Any:
        locked = torch.full(part.shape, float("nan"))
        number = len(sent)
        sent.append(number)
        travelling.append(number)
        assert len(travelling) <= 3, "two of the model, or one and two of the selector"

        def wait() -> None:
            locked.copy_(part.as_subclass(Tensor))
            travelling.remove(number)

        return locked, wait

    class Far(Tower):
        def encode(self, pixels: Pixels, selector: Any | None) -> Any:
            model, extra = super().encode(pixels, selector)
            return model.as_subclass(Remote), None if extra is None else extra.as_subclass(Remote)

    monkeypatch.setattr(features, "_send", send)
    found = run(Far(), [clip(0, 5), clip(5, 4)], object(), 2)
    assert torch.equal(found.model, expected(9))
    assert torch.equal(found.selector, -expected(9))
    assert len(sent) == 10
    assert not travelling


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's allocator")
def test_freed_memory_is_kept_for_the_next_layer() -> None:
    """Blocks as large as activations, written and freed again and again, in a fresh process."""
    program = """
import resource, torch
from flexselect.inference.features import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        [torch.ones(11 << 20, dtype=torch.uint8) for _ in range(2)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
given_back = faults()
keep_freed_memory()
faults()
print(given_back, faults())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True
    )
    given_back, kept = map(int, done.stdout.split())
    # A machine may use pages that are larger than usual.
    assert kept < max(given_back, 100) / 10


def test_nothing_to_encode() -> None:
    with pytest.raises(FlexSelectError, match="no frame"):
        run(Tower(), [])


def test_features_carry_no_gradient() -> None:
    weight = torch.ones(1, requires_grad=True)

    class Trained(Tower):
        def encode(self, pixels: Pixels, selector: Any | None) -> Any:
            return pixels.values[::3, None] * weight, None

    assert not run(Trained(), [clip(0, 4)]).model.requires_grad


def embed(ids: Tensor) -> Tensor:
    """Stands in for an embedding table of 128 rows."""
    assert bool((ids < 128).all())
    return torch.stack((ids, -ids), -1).double()


@given(st.sets(st.integers(0, 23)))
def test_assemble(chosen: set[int]) -> None:
    """Text by its id, features by their place among all feature tokens of the whole prompt."""
    prompt = make()
    layout = prompt.layout
    features = torch.arange(24.0).reshape(12, 2) + 1000
    rows = torch.tensor(sorted(chosen), dtype=torch.long)
    out = assemble(layout, rows, features, embed)
    assert out.shape == (len(rows), 2)
    assert out.dtype == torch.float64
    for value, row in zip(out.tolist(), rows.tolist(), strict=True):
        if layout.feature[row]:
            assert value == features[int(layout.feature[:row].sum())].tolist()
        else:
            assert value == [float(layout.ids[row]), -float(layout.ids[row])]


def test_placeholder_ids_may_lie_outside_the_table() -> None:
    layout = make().layout
    ids = layout.ids.masked_fill(layout.feature, 10**6)
    moved = type(layout)(**{**vars(layout), "ids": ids})
    rows = torch.arange(len(ids))
    features = torch.zeros(12, 2)
    assert torch.equal(
        assemble(moved, rows, features, embed), assemble(layout, rows, features, embed)
    )
