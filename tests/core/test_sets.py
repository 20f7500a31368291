"""Frame sets: a partition, interleaved, and what the reference forms at real sizes."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexselect.core.budget import round_up, set_quotas
from flexselect.core.errors import OptionError
from flexselect.core.selection import select_from_sets
from flexselect.core.sets import frame_sets
from flexselect.tests.paths import FIXTURES, needs_fixtures


def golden() -> list[Any]:
    cases = []
    for family in ("llava", "qwen", "internvl"):
        path = FIXTURES / f"grouping_{family}.json"
        for entry in json.loads(path.read_text()) if path.is_file() else []:
            name = f"{family}-{entry['frames']}-{entry['budget']}"
            cases.append(pytest.param(family, entry, id=name))
    return cases


@given(frames=st.integers(0, 600), frames_per_set=st.integers(1, 80))
def test_sets_partition_the_frames(frames: int, frames_per_set: int) -> None:
    sets = frame_sets(frames, frames_per_set)
    assert len(sets) == -(-frames // frames_per_set)
    for first, part in enumerate(sets):
        assert part.dtype == torch.long
        assert part.tolist() == list(range(first, frames, len(sets)))
    sizes = [len(part) for part in sets]
    assert sum(sizes) == frames
    if sizes:
        assert max(sizes) <= frames_per_set
        assert max(sizes) - min(sizes) <= 1
        assert sorted(torch.cat(sets).tolist()) == list(range(frames))


@pytest.mark.parametrize("frames_per_set", [0, -4])
def test_frames_per_set_is_positive(frames_per_set: int) -> None:
    with pytest.raises(OptionError, match=f"frames_per_set .* got {frames_per_set}"):
        frame_sets(8, frames_per_set)


@needs_fixtures
def test_golden_data_is_all_there() -> None:
    assert len(golden()) == 3 * 38


@needs_fixtures
@pytest.mark.parametrize(("family", "entry"), golden())
def test_grouping_at_real_sizes(family: str, entry: dict[str, Any]) -> None:
    """The reference's grouping under a stub: token i of n is kept iff i * 7919 % n < k."""
    frames, tokens = entry["frames"], entry["tokens_per_frame"]
    budget = round_up(entry["budget"], tokens) if family == "qwen" else entry["budget"]
    sets = frame_sets(frames, entry["max_frames_per_group"])
    within = torch.arange(tokens)
    members = [(part[:, None] * tokens + within).flatten() for part in sets]
    sizes = [len(rows) for rows in members]
    quotas = set_quotas(budget, sizes)
    for part, rows, quota, expected in zip(sets, members, quotas, entry["sets"], strict=False):
        assert len(rows) == expected["tokens"]
        assert quota == expected["tkn_number"]
        assert len(part) == expected["num_frames"]
        assert part[:4].tolist() == expected["first_frames"]
        assert int(part[-1]) == expected["last_frame"]
    assert len(entry["sets"]) in (0, len(sets))
    # A stride prime to n orders a set's tokens without ties: the k first are the stub's.
    scores = torch.empty(frames * tokens)
    for rows in members:
        scores[rows] = -(torch.arange(len(rows)) * 7919 % len(rows)).float()
    kept = select_from_sets(scores, members, quotas)
    assert len(kept) == entry["num_selected"]
    assert int(kept.sum()) == entry["sum"]
    assert kept[:6].tolist() == entry["first"]
    assert kept[-6:].tolist() == entry["last"]
    assert hashlib.sha256(kept.numpy().tobytes()).hexdigest() == entry["sha256_int64le"]
