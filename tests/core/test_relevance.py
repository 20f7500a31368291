"""Relevance equals the softmax formulation written out in float64, however it is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flexselect.core.errors import OptionError
from flexselect.core.relevance import ALIASES, Aggregation, check_aggregation, relevance


def plain(
    query: Tensor, key: Tensor, rows: Tensor, columns: Tensor, scale: float, aggregation: str
) -> Tensor:
    """Attention weights in full, float64, one head after another."""
    query, key = query.double(), key.double()
    group = query.shape[1] // key.shape[1]
    out = []
    for q, k in zip(query, key, strict=True):
        weights = torch.empty(q.shape[0], len(rows), k.shape[1], dtype=torch.float64)
        for head in range(q.shape[0]):
            for i, row in enumerate(rows.tolist()):
                logits = scale * (k[head // group, : row + 1] @ q[head, i])
                weights[head, i] = 0
                weights[head, i, : row + 1] = logits.softmax(0)
        seen = weights[:, :, columns]
        out.append(seen.amax((0, 1)) if aggregation == "max" else seen.mean((0, 1)))
    return torch.stack(out)


@st.composite
def cases(draw: Any) -> dict[str, Any]:
    tokens = draw(st.integers(2, 40))
    rows = draw(st.lists(st.integers(0, tokens - 1), min_size=1, max_size=8, unique=True))
    columns = draw(st.lists(st.integers(0, tokens - 1), min_size=1, max_size=20, unique=True))
    return {
        "sets": draw(st.integers(1, 3)),
        "kv_heads": draw(st.integers(1, 3)),
        "group": draw(st.integers(1, 4)),
        "head_dim": draw(st.sampled_from([2, 8, 16])),
        "tokens": tokens,
        "rows": sorted(rows),
        "columns": sorted(columns),
        "block_rows": draw(st.sampled_from([None, 1, 2, 3, 7, 16])),
        "aggregation": draw(st.sampled_from(["max", "mean"])),
        "scale": draw(st.sampled_from([None, 0.1, 1.7])),
        "seed": draw(st.integers(0, 10_000)),
    }


@settings(max_examples=120, deadline=None)
@given(cases())
def test_equals_the_plain_softmax(case: dict[str, Any]) -> None:
    """Asking tokens anywhere: in the middle of the text, before some of the visual tokens too."""
    draw = torch.Generator().manual_seed(case["seed"])
    heads = case["kv_heads"] * case["group"]
    rows, columns = torch.tensor(case["rows"]), torch.tensor(case["columns"])
    query = torch.randn(case["sets"], heads, len(rows), case["head_dim"], generator=draw)
    key = torch.randn(
        case["sets"], case["kv_heads"], case["tokens"], case["head_dim"], generator=draw
    )
    got = relevance(
        query,
        key,
        rows,
        columns,
        scale=case["scale"],
        aggregation=case["aggregation"],
        block_rows=case["block_rows"],
    )
    scale = case["head_dim"] ** -0.5 if case["scale"] is None else case["scale"]
    expected = plain(query, key, rows, columns, scale, case["aggregation"])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


def example(tokens: int = 50, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)
    return {
        "query": torch.randn(2, 6, 4, 16, generator=draw).to(dtype),
        "key": torch.randn(2, 2, tokens, 16, generator=draw).to(dtype),
        "query_rows": torch.tensor([tokens - 7, tokens - 4, tokens - 3, tokens - 1]),
        "columns": torch.arange(5, tokens - 8),
    }


@pytest.mark.parametrize("aggregation", ["max", "mean"])
def test_sets_do_not_see_each_other(aggregation: Aggregation) -> None:
    case = example()
    together = relevance(**case, aggregation=aggregation)
    for index in range(2):
        alone = {**case, "query": case["query"][[index]], "key": case["key"][[index]]}
        torch.testing.assert_close(relevance(**alone, aggregation=aggregation)[0], together[index])


@pytest.mark.parametrize("aggregation", ["max", "mean"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_accumulated_in_float32(
    dtype: torch.dtype, aggregation: Aggregation
) -> None:
    case = example(dtype=dtype)
    wide = {**case, "query": case["query"].float(), "key": case["key"].float()}
    got = relevance(**case, aggregation=aggregation)
    assert got.dtype == torch.float32
    assert torch.equal(got, relevance(**wide, aggregation=aggregation))


def test_large_logits_stay_finite() -> None:
    case = example()
    case["query"] = case["query"] * 300
    for aggregation in ("max", "mean"):
        got = relevance(**case, aggregation=aggregation)
        assert bool(got.isfinite().all())
        assert bool((got >= 0).all())
        assert bool((got <= 1 + 1e-6).all())


def test_inputs_are_not_written_to() -> None:
    case = example()
    before = {name: value.clone() for name, value in case.items()}
    relevance(**case)
    assert all(torch.equal(case[name], value) for name, value in before.items())


@pytest.mark.parametrize("aggregation", ["max", "mean"])
def test_the_gradient_is_that_of_the_plain_softmax(aggregation: Aggregation) -> None:
    """Learning needs scores that inference may write over, so the two take different ways."""
    case = example(tokens=20)
    weight = torch.randn(2, len(case["columns"]), generator=torch.Generator().manual_seed(1))
    gradients = []
    for blocks in (None, 16):
        query, key = (case[name].clone().requires_grad_() for name in ("query", "key"))
        if blocks is None:
            repeated = key.repeat_interleave(3, 1)
            scores = query @ repeated.mT / 4
            ahead = torch.arange(20) > case["query_rows"][:, None]
            weights = scores.masked_fill(ahead, float("-inf")).softmax(-1)[..., case["columns"]]
            out = weights.amax((1, 2)) if aggregation == "max" else weights.mean((1, 2))
        else:
            changed = {**case, "query": query, "key": key}
            out = relevance(**changed, aggregation=aggregation, block_rows=5)
            torch.testing.assert_close(out.detach(), relevance(**case, aggregation=aggregation))
        (out * weight).sum().backward()
        gradients.append((query.grad, key.grad))
    torch.testing.assert_close(gradients[1], gradients[0])


def test_mean_over_every_column_sums_to_one() -> None:
    case = example()
    case["columns"] = torch.arange(50)
    torch.testing.assert_close(relevance(**case, aggregation="mean").sum(-1), torch.ones(2))


def test_the_whole_attention_matrix_is_never_built() -> None:
    """No tensor is larger than the keys; heads x text x keys would be."""
    case = example(tokens=2000)
    case["query"] = torch.randn(2, 6, 40, 16)
    case["query_rows"] = torch.arange(1960, 2000)
    sizes = []

    class Watch(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                sizes.append(out.numel())
            return out

    with Watch():
        relevance(**case, block_rows=8)
    assert len(sizes) > 10
    assert max(sizes) <= case["key"].numel() < 2 * 6 * 40 * 2000 / 3


def test_names_of_the_reference() -> None:
    assert check_aggregation("max") == "max"
    assert check_aggregation("mean") == "mean"
    assert {name: check_aggregation(name) for name in ALIASES} == ALIASES
    assert check_aggregation("token_selection") == "max"
    assert check_aggregation("token_selection_qwen_mean") == "mean"
    for name in ("token_selection_argmax", "MAX", "", "None"):
        with pytest.raises(OptionError, match="aggregation must be 'max' or 'mean'"):
            check_aggregation(name)
