"""A model whose weights accelerate keeps elsewhere answers as one whose weights are in place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload

from .factories import Family, Image, Video


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_offloaded_weights(
    family: Family, model: Any, select: Callable[..., Any], positions: str
) -> None:
    inputs = family.inputs([Image(), Video(7), "What is it?"])
    offloaded = copy.deepcopy(model)
    cpu_offload(offloaded, execution_device=torch.device("cpu"))
    assert all(weight.is_meta for weight in offloaded.parameters())
    results = []
    for each in (model, offloaded):
        select(each, 24, positions=positions)
        tokens = each.generate(**inputs, max_new_tokens=4, do_sample=False)
        results.append((tokens, each.flexselect.selections[0]))
    (tokens, selection), (tokens_offloaded, selection_offloaded) = results
    assert torch.equal(tokens, tokens_offloaded)
    assert torch.equal(selection.kept, selection_offloaded.kept)
