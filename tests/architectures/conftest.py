"""Every property of this folder is tested for every family, many of them for both rankers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

import flexselect

from .factories import FAMILIES, Family, knobs


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture
def model(family: Family) -> Any:
    """A model of its own for every test, always with the same weights."""
    return copy.deepcopy(_model(family))


@pytest.fixture(params=["self", "lite"])
def select(request: pytest.FixtureRequest, family: Family) -> Callable[..., Any]:
    """``select(model, budget, **knobs)`` applies FlexSelect, training-free or with a selector."""

    def apply(model: Any, budget: int, **more: Any) -> Any:
        options = knobs(budget, **more)
        if request.param == "lite":
            del options["layer"]
            options["selector"] = family.selector(model)
        return flexselect.apply(model, **options)

    return apply


@cache
def _model(family: Family) -> Any:
    return family.model()
