"""The Spearman loss: the reference's values, the pairwise definition, gradients, masks, memory."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from flexselect.core.errors import OptionError
from flexselect.core.soft_rank import rank, soft_rank
from flexselect.core.spearman import selector_loss, spearman_loss
from flexselect.tests.paths import FIXTURES, needs_fixtures

T = 1e-4
EPS32 = torch.finfo(torch.float32).eps
GOLDEN = Path(FIXTURES) / "spearman"
TERMS = ("spearman", "l1", "l2", "top_recall", "listnet")


def plain_soft_rank(x: Tensor, temperature: float = T) -> Tensor:
    return torch.sigmoid((x[:, None] - x) / temperature).sum(dim=1) - 0.5


def plain_rank(x: Tensor) -> Tensor:
    return (x[:, None] > x).sum(dim=1) + ((x[:, None] == x).sum(dim=1) - 1) / 2


def plain_loss(pred: Tensor, target: Tensor, temperature: float = T) -> Tensor:
    a = plain_soft_rank(pred, temperature)
    b = plain_rank(target).to(pred.dtype)
    a, b = a - a.mean(), b - b.mean()
    return 1 - (a / a.norm()) @ (b / b.norm())


def plain_top_recall(pred: Tensor, target: Tensor, temperature: float, fraction: float) -> Tensor:
    """One minus the soft recall of a target without ties."""
    n = len(pred)
    k = max(1, round(fraction * n))
    best = target.topk(k).indices
    ranks = plain_soft_rank(pred, temperature)[best]
    cuts = [k * 2**i for i in range(n) if i == 0 or k * 2**i < n]
    recalls = [torch.sigmoid((ranks - (n - c - 0.5)) / (c / 8)).mean() for c in cuts]
    return 1 - torch.stack(recalls).mean()


def random_scores(n: int, kind: str, scale: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(n, generator=generator, dtype=torch.float64)
    values = {
        "normal": normal,
        "ties": (2 * normal).round(),
        "constant": torch.full_like(normal, 0.3),
        "heavy": normal / torch.rand(n, generator=generator, dtype=torch.float64),
        "clusters": normal.sign() + 1e-3 * normal,
    }[kind]
    return scale * values


def value_and_grad(pred: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    pred = pred.detach().clone().requires_grad_()
    loss = spearman_loss(pred, *args, **options)
    loss.backward()
    assert pred.grad is not None
    return loss.detach(), pred.grad


# The reference's values.


@cache
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "spearman.safetensors")


def golden_entries() -> list[tuple[str, float]]:
    meta = GOLDEN / "meta.json"
    if not meta.is_file():
        return [("absent", T)]
    return [(entry["name"], entry["temperature"]) for entry in json.loads(meta.read_text())]


def golden_target(name: str) -> Tensor:
    """The reference's own target ranks: where targets tie they hold its arbitrary order."""
    return golden()[f"{name}.target_rank"].float()


@needs_fixtures
@pytest.mark.parametrize(("name", "temperature"), golden_entries())
def test_reference_value_and_gradient(name: str, temperature: float) -> None:
    pred = golden()[f"{name}.pred"]
    truth, truth_grad, run, run_grad = (
        golden()[f"{name}.T{temperature}.{kind}"].double()
        for kind in ("loss64", "grad64", "loss", "grad")
    )
    loss, grad = value_and_grad(pred, golden_target(name), temperature=temperature)
    assert loss.dtype == torch.float32
    assert grad.dtype == pred.dtype
    if truth.isnan():
        assert name.startswith("constant_pred")
        assert loss == 1
        assert not grad.any()
        return
    # One rounding to float32 of the float64 truth, which is stricter than the difference of the
    # reference's own float32 run but where that happens to be smaller.
    rounding = EPS32 * truth + 1e-15
    assert (loss.double() - truth).abs() <= rounding
    assert (loss.double() - truth).abs() <= max((run - truth).abs(), rounding / 2)
    half = pred.dtype == torch.bfloat16
    scale = truth_grad.abs().max()
    _, exact_grad = value_and_grad(pred.float(), golden_target(name), temperature=temperature)
    error = (exact_grad.double() - truth_grad).abs().max()
    assert error <= EPS32 * scale
    assert error <= max((run_grad - truth_grad).abs().max(), EPS32 * scale / 2)
    assert (grad.double() - truth_grad).abs().max() <= (2**-8 if half else EPS32) * scale


@needs_fixtures
@pytest.mark.parametrize(("name", "temperature"), golden_entries())
def test_reference_ranks(name: str, temperature: float) -> None:
    pred, target = golden()[f"{name}.pred"], golden()[f"{name}.target"]
    if pred.dtype == torch.float32:
        recorded = golden()[f"{name}.T{temperature}.ranks"]
        # The recorded ranks are float32 sums of as many sigmoids as there are tokens.
        tolerance = EPS32 * len(pred)
        torch.testing.assert_close(soft_rank(pred, temperature), recorded, rtol=0, atol=tolerance)
    if len(target.unique()) == len(target):
        assert torch.equal(rank(target), golden_target(name))


# The definition, pair by pair.


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(1, 70),
    kind=st.sampled_from(["normal", "ties", "constant", "heavy", "clusters"]),
    log_scale=st.floats(-10, 8),
    shift=st.sampled_from([0.0, -7.3, 40.0]),
    seed=st.integers(0, 999),
)
def test_soft_rank_equals_all_pairs(
    n: int, kind: str, log_scale: float, shift: float, seed: int
) -> None:
    """Scales from a millionth of the temperature to a trillion times it."""
    x = random_scores(n, kind, 10**log_scale, seed) + shift
    weight = random_scores(n, "normal", 1.0, seed + 1)
    ours, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    result, expected = soft_rank(ours), plain_soft_rank(plain)
    # What float64 cannot tell apart in the scores themselves, in temperatures.
    unresolved = 4 * torch.finfo(torch.float64).eps * float(x.abs().max()) / T
    torch.testing.assert_close(result, expected, rtol=0, atol=n * (1e-13 + min(1.0, unresolved)))
    (grad,) = torch.autograd.grad(result @ weight, ours)
    (expected_grad,) = torch.autograd.grad(expected @ weight, plain)
    tolerance = n * (1e-12 + min(1.0, unresolved)) * float(weight.abs().max()) / T
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", ["normal", "ties", "heavy", "clusters"])
@pytest.mark.parametrize("scale", [1e-5, 1e-3, 0.1])
def test_loss_equals_all_pairs_in_float32(kind: str, scale: float) -> None:
    pred = random_scores(700, kind, scale, 3).float()
    target = random_scores(700, "ties", 1.0, 4)
    loss, grad = value_and_grad(pred, target)
    exact = pred.double().requires_grad_()
    expected = plain_loss(exact, target)
    (expected_grad,) = torch.autograd.grad(expected, exact)
    assert abs(float(loss) - float(expected.detach())) <= EPS32
    error = (grad.double() - expected_grad).abs().max()
    assert error <= EPS32 * expected_grad.abs().max()


@pytest.mark.parametrize("block", [1, 7, 256, 10_000])
def test_any_block_size_gives_the_same(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pred = random_scores(1200, "heavy", 1e-3, 25)
    target = random_scores(1200, "normal", 1.0, 26)
    expected = value_and_grad(pred, target)
    monkeypatch.setattr("flexselect.core.soft_rank._BLOCK", block)
    result = value_and_grad(pred, target)
    torch.testing.assert_close(result[0], expected[0], rtol=1e-13, atol=0)
    tolerance = 1e-13 * float(expected[1].abs().max())
    torch.testing.assert_close(result[1], expected[1], rtol=0, atol=tolerance)


def test_where_boxes_begin_does_not_matter() -> None:
    """A token far below moves every box edge and nothing else than ranks by one."""
    x = random_scores(300, "normal", 1e-3, 5)
    alone = soft_rank(x)
    for below in torch.linspace(0.5, 0.5002, 9, dtype=torch.float64):
        ranks = soft_rank(torch.cat([x, (x.min() - below)[None]]))
        torch.testing.assert_close(ranks[:-1], alone + 1, rtol=0, atol=1e-9)
        assert ranks[-1] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("dtype", "huge"), [(torch.float32, 3e38), (torch.float64, 1.7e308)])
def test_scores_as_far_apart_as_the_dtype_allows(dtype: torch.dtype, huge: float) -> None:
    """Over the temperature the float64 ones overflow: finite, though no longer told apart."""
    x = torch.tensor([huge, -huge, 0.0, 1e-45, -huge], dtype=dtype)
    ranks = soft_rank(x)
    torch.testing.assert_close(ranks[[1, 4]], torch.full((2,), 0.5, dtype=dtype))
    torch.testing.assert_close(ranks.sum(), torch.tensor(10.0, dtype=dtype))
    if dtype == torch.float32:
        assert torch.equal(ranks, torch.tensor([4.0, 0.5, 2.5, 2.5, 0.5]))
    loss, grad = value_and_grad(x, torch.arange(5.0))
    assert loss.isfinite()
    assert grad.isfinite().all()


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.sampled_from([-math.inf, -2.0, -0.0, 0.0, 1.5, math.inf]), min_size=1))
def test_rank_shares_ties(values: list[float]) -> None:
    x = torch.tensor(values)
    assert torch.equal(rank(x), plain_rank(x))


# Gradients.


def small_case() -> tuple[Tensor, Tensor, Tensor]:
    pred = torch.stack([random_scores(9, "normal", 1.0, seed) for seed in (1, 2)])
    target = torch.stack([random_scores(9, "ties", 1.0, seed) for seed in (3, 4)])
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, [0, 5, 8]] = False
    return pred.requires_grad_(), target, mask


@pytest.mark.parametrize("temperature", [0.05, 0.5, 5.0])
def test_gradcheck_soft_rank(temperature: float) -> None:
    pred, _, mask = small_case()
    assert torch.autograd.gradcheck(lambda x: soft_rank(x, temperature, mask), (pred,))


@pytest.mark.parametrize("term", TERMS)
def test_gradcheck_terms(term: str) -> None:
    pred, target, mask = small_case()
    assert torch.autograd.gradcheck(
        lambda x: selector_loss(
            x, target, mask, {term: 0.7}, temperature=0.5, top_fraction=0.3, reduction="none"
        ),
        (pred,),
    )


def test_no_second_derivative() -> None:
    """Better refused than silently wrong."""
    pred, target, _ = small_case()
    loss = spearman_loss(pred, target, temperature=0.5)
    (grad,) = torch.autograd.grad(loss, pred, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_target_gets_no_gradient() -> None:
    pred, target, _ = small_case()
    target.requires_grad_()
    selector_loss(pred, target, terms=dict.fromkeys(TERMS, 1.0), temperature=0.5).backward()
    assert pred.grad is not None
    assert target.grad is None


# Symmetries, masks, batches.


@pytest.mark.parametrize("term", TERMS)
def test_permutation_equivariance(term: str) -> None:
    pred = random_scores(400, "normal", 1e-3, 6).float()
    target = random_scores(400, "ties", 1e-3, 7).float()
    order = torch.randperm(400, generator=torch.Generator().manual_seed(8))

    def run(p: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        p = p.clone().requires_grad_()
        loss = selector_loss(p, t, terms={term: 1.0})
        return loss.detach(), torch.autograd.grad(loss, p)[0]

    loss, grad = run(pred, target)
    moved_loss, moved_grad = run(pred[order], target[order])
    torch.testing.assert_close(moved_loss, loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(moved_grad, grad[order], rtol=1e-5, atol=1e-6 * float(grad.norm()))


@pytest.mark.parametrize("padding", [0.0, 1e30, math.inf, math.nan])
@pytest.mark.parametrize("term", TERMS)
def test_mask_equals_compacted(term: str, padding: float) -> None:
    """Rows of different lengths, padded with anything anywhere, equal one call for each row."""
    generator = torch.Generator().manual_seed(9)
    mask = torch.rand(2, 3, 120, generator=generator) < torch.rand(2, 3, 1, generator=generator)
    mask[..., 0] = True
    pred = random_scores(720, "normal", 3e-4, 10).reshape(2, 3, 120)
    target = random_scores(720, "ties", 1e-3, 11).reshape(2, 3, 120)
    padded = pred.where(mask, padding).requires_grad_()
    options: dict[str, Any] = {"terms": {term: 1.0}, "reduction": "none"}
    losses = selector_loss(padded, target.where(mask, padding), mask, **options)
    weight = torch.tensor([[1.0, -2.0, 3.0], [0.5, 1.5, -1.0]], dtype=torch.float64)
    (grad,) = torch.autograd.grad((losses * weight).sum(), padded)
    assert losses.shape == (2, 3)
    assert not grad[~mask].any()
    for place in [(i, j) for i in range(2) for j in range(3)]:
        row = pred[place][mask[place]].requires_grad_()
        loss = selector_loss(row, target[place][mask[place]], **options)
        (row_grad,) = torch.autograd.grad(loss, row)
        torch.testing.assert_close(losses[place], loss, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(
            grad[place][mask[place]], weight[place] * row_grad, rtol=1e-8, atol=1e-8
        )


def test_masked_ranks() -> None:
    x = torch.tensor([[0.3, math.nan, 0.1, math.inf, 0.1], [5.0, 4.0, 3.0, 2.0, 1.0]])
    mask = torch.tensor([[True, False, True, False, True], [False, True, True, True, False]])
    expected = torch.tensor([[2.0, 0, 0.5, 0, 0.5], [0, 2.0, 1.0, 0, 0]])
    assert torch.equal(rank(x, mask), expected)
    torch.testing.assert_close(soft_rank(x, mask=mask), expected, rtol=0, atol=1e-6)
    infinite = torch.tensor([math.inf, 1.0, math.inf, math.nan])
    counts = torch.tensor([True, True, True, False])
    assert torch.equal(rank(infinite, counts), torch.tensor([1.5, 0.0, 1.5, 0.0]))


def test_reductions() -> None:
    pred, target, mask = small_case()
    rows = spearman_loss(pred, target, mask, 0.5, "none")
    assert torch.equal(spearman_loss(pred, target, mask, 0.5), rows.mean())
    assert torch.equal(spearman_loss(pred, target, mask, 0.5, "sum"), rows.sum())


# Degenerate and damaged inputs.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 2, 16, 257, 5000])
@pytest.mark.parametrize("value", [0.0, 1 / 3, -1e4])
def test_constant_prediction(dtype: torch.dtype, n: int, value: float) -> None:
    loss, grad = value_and_grad(torch.full((n,), value, dtype=dtype), torch.arange(float(n)))
    assert loss == 1
    assert torch.equal(grad, torch.zeros(n, dtype=dtype))


def test_constant_target_and_empty_row() -> None:
    pred = torch.rand(2, 50).requires_grad_()
    mask = torch.tensor([[True], [False]]).expand(2, 50)
    loss = spearman_loss(pred, torch.ones(2, 50), mask, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), pred)
    assert torch.equal(loss, torch.ones(2))
    assert not grad.any()
    every = selector_loss(pred, torch.ones(2, 50), mask, dict.fromkeys(TERMS, 1.0))
    (grad,) = torch.autograd.grad(every, pred)
    assert every.isfinite()
    assert grad.isfinite().all()


@pytest.mark.parametrize("spread", [1e-14, 1e-12, 1e-10, 1e-8])
def test_nearly_constant_prediction_is_finite(spread: float) -> None:
    pred = 1e-6 + spread * torch.rand(500, generator=torch.Generator().manual_seed(1))
    loss, grad = value_and_grad(pred, torch.arange(500.0))
    assert 0 <= loss <= 2
    assert grad.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_broken_row_shows_and_spares_the_others(bad: float) -> None:
    pred = random_scores(80, "normal", 1e-3, 12).reshape(2, 40)
    target = random_scores(80, "normal", 1.0, 13).reshape(2, 40)
    good_loss, good_grad = value_and_grad(pred[1], target[1])
    broken = pred.clone()
    broken[0, 7] = bad
    loss, grad = value_and_grad(broken, target, reduction="sum")
    assert loss.isnan()
    assert grad[0].isnan().any()
    torch.testing.assert_close(grad[1], good_grad, rtol=1e-9, atol=1e-12)
    rows = spearman_loss(broken, target, reduction="none")
    torch.testing.assert_close(rows[1], good_loss, rtol=1e-12, atol=1e-14)
    broken_target = target.clone()
    broken_target[0, 7] = math.nan
    rows = spearman_loss(pred, broken_target, reduction="none")
    assert rows.isnan().tolist() == [True, False]


# Precision and determinism.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_upcast(dtype: torch.dtype) -> None:
    pred = random_scores(600, "normal", 1e-3, 14).to(dtype)
    target = random_scores(600, "normal", 1e-3, 15).to(dtype)
    loss, grad = value_and_grad(pred, target)
    exact_loss, exact_grad = value_and_grad(pred.float(), target.float())
    assert torch.equal(loss, exact_loss)
    assert torch.equal(grad, exact_grad.to(dtype))


def test_autocast_changes_nothing() -> None:
    pred = random_scores(600, "normal", 1e-3, 16).float()
    target = random_scores(600, "normal", 1e-3, 17)
    loss, grad = value_and_grad(pred, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast_loss, cast_grad = value_and_grad(pred, target)
    assert torch.equal(loss, cast_loss)
    assert torch.equal(grad, cast_grad)


def test_results_repeat_bit_by_bit() -> None:
    pred = random_scores(3000, "heavy", 1e-3, 18).float()
    target = random_scores(3000, "normal", 1.0, 19)
    first = value_and_grad(pred, target)
    torch.use_deterministic_algorithms(True)
    try:
        again = value_and_grad(pred, target)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_equals_cpu() -> None:
    pred = random_scores(13_440, "heavy", 1e-4, 20).float()
    target = random_scores(13_440, "normal", 1.0, 21)
    loss, grad = value_and_grad(pred, target)
    gpu_loss, gpu_grad = value_and_grad(pred.cuda(), target.cuda())
    torch.testing.assert_close(gpu_loss.cpu(), loss, rtol=EPS32, atol=EPS32)
    torch.testing.assert_close(gpu_grad.cpu(), grad, rtol=0, atol=EPS32 * float(grad.abs().max()))
    assert torch.equal(value_and_grad(pred.cuda(), target.cuda())[1], gpu_grad)


# Terms.


def test_default_is_the_papers_loss() -> None:
    pred, target, mask = small_case()
    assert torch.equal(selector_loss(pred, target, mask), spearman_loss(pred, target, mask))


def test_score_terms_are_sums_and_weights_add_up() -> None:
    pred = torch.tensor([[0.5, 0.25, 9.0], [1.0, 0.0, 0.0]])
    target = torch.tensor([[0.25, 0.75, 1.0], [0.0, 0.5, 0.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])

    def rows(terms: dict[str, float]) -> Tensor:
        return selector_loss(pred, target, mask, terms, reduction="none")

    torch.testing.assert_close(rows({"l1": 1}), torch.tensor([0.75, 1.5]))
    torch.testing.assert_close(rows({"l2": 1}), torch.tensor([0.3125, 1.25]))
    weights = {"spearman": 1.0, "l1": 0.1, "l2": -2.0, "top_recall": 0.5, "listnet": 3.0}
    expected = sum(weight * rows({name: 1.0}) for name, weight in weights.items())
    torch.testing.assert_close(rows(weights), expected)


@pytest.mark.parametrize("n", [1, 2, 3, 16, 34, 100, 333])
@pytest.mark.parametrize("fraction", [0.01, 1 / 23, 1 / 16, 0.3, 2 / 3, 1.0])
def test_top_recall_equals_its_formula(n: int, fraction: float) -> None:
    pred = random_scores(n, "normal", 1e-3, 22)
    target = random_scores(n, "normal", 1.0, 23)
    loss = selector_loss(pred, target, terms={"top_recall": 1.0}, top_fraction=fraction)
    expected = plain_top_recall(pred, target, T, fraction)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)


def test_top_recall_sees_what_spearman_hides() -> None:
    """Sixteen needles in 1,000 tokens: all else in perfect order without them, and the reverse."""
    target = torch.arange(1000.0)
    needles = target >= 984
    without = target.where(~needles, 0.5)  # every token in order, but the needles at the bottom
    bulk = torch.randperm(1000, generator=torch.Generator().manual_seed(24)).float()
    bulk = 0.8 * target + 0.6 * bulk
    only = bulk.where(~needles, 2000 + target)  # a noisier order, but the needles on top

    def loss(pred: Tensor, term: str) -> float:
        return float(selector_loss(pred, target, terms={term: 1.0}, top_fraction=0.016))

    assert loss(without, "spearman") < loss(only, "spearman") < 0.5
    assert loss(only, "top_recall") < 0.1
    assert loss(without, "top_recall") > 0.9


def test_top_recall_shares_the_edge_among_ties() -> None:
    """Of three tied tokens for one place each counts a third, whichever comes first."""
    target = torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    pred = torch.arange(8.0)

    def loss(t: Tensor) -> Tensor:
        return selector_loss(pred, t, terms={"top_recall": 1.0}, top_fraction=0.25)

    broken = [target.clone() for _ in range(3)]
    for i, t in enumerate(broken):
        t[i + 1] += 0.5
    expected = torch.stack([loss(t) for t in broken]).mean()
    torch.testing.assert_close(loss(target), expected)


def test_listnet_is_the_divergence_of_shares() -> None:
    """Of logarithms: it compares the shares themselves, whatever their sum, without padding."""
    generator = torch.Generator().manual_seed(25)
    pred, target = torch.rand(2, 3, 40, generator=generator, dtype=torch.float64)
    mask = torch.rand(3, 40, generator=generator) < 0.7

    def loss(pred: Tensor, target: Tensor) -> Tensor:
        terms = {"listnet": 1.0}
        return selector_loss(pred.log(), target.log(), mask, terms, reduction="none")

    for row in range(3):
        p, q = (scores[row, mask[row]] for scores in (target, pred))
        p, q = p / p.sum(), q / q.sum()
        expected = (p * (p / q).log()).sum()
        torch.testing.assert_close(loss(pred, target)[row], expected)
    torch.testing.assert_close(loss(3 * pred, target / 7), loss(pred, target))
    torch.testing.assert_close(loss(5 * target, target), torch.zeros(3, dtype=torch.float64))


def test_listnet_looks_at_what_stands_out() -> None:
    """Missing the one token that has most of the attention costs more than all other order."""
    target = torch.linspace(1e-4, 2e-4, 64)
    target[5] = 0.5
    missed, shuffled = target.clone(), target.flip(0)
    missed[5] = 1e-4
    shuffled[5], shuffled[58] = 0.5, 1e-4

    def loss(pred: Tensor, term: str) -> float:
        return float(selector_loss(pred.log(), target.log(), terms={term: 1.0}, temperature=0.1))

    assert loss(missed, "spearman") < 0.2 < 1 < loss(shuffled, "spearman")
    assert loss(shuffled, "listnet") < 0.02 < 2 < loss(missed, "listnet")


# Options.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"terms": {"speerman": 1.0}}, "speerman.*spearman, l1, l2, top_recall, listnet"),
        ({"terms": {}}, "at least one"),
        ({"terms": {"l1": math.nan}}, "'l1' must be finite"),
        ({"top_fraction": 0.0}, "top_fraction"),
        ({"top_fraction": 1.5}, "top_fraction"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"reduction": "avg"}, "reduction.*'avg'"),
        ({"mask": torch.ones(8)}, "mask must be bool"),
        ({"mask": torch.ones(7, dtype=torch.bool)}, "mask must be bool"),
        ({"target": torch.rand(7)}, "same shape"),
        ({"target": torch.arange(8)}, "target must be a floating"),
        ({"pred": torch.arange(8)}, "pred must be a floating"),
        ({"pred": torch.rand(8, 0), "target": torch.rand(8, 0)}, r"\(\.\.\., tokens\)"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        selector_loss(**{"pred": torch.rand(8), "target": torch.rand(8), **options})


# Memory.


@pytest.mark.parametrize("scores", ["softmax", "dense", "sparse"])
@pytest.mark.parametrize(("tokens", "limit_mib"), [(13_440, 32), (107_520, 256)])
def test_memory_grows_with_tokens_not_pairs(scores: str, tokens: int, limit_mib: int) -> None:
    """Resident memory of a fresh process; one float32 matrix of pairs takes 689 MiB and 43 GiB."""
    script = Path(__file__).parents[2] / "scripts" / "bench_spearman.py"
    options = ["--here", "--methods", "ours", "--threads", "1", "--repeats", "1"]
    command = [sys.executable, str(script), *options, "--inputs", scores, "--sizes", str(tokens)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result = json.loads(done.stdout)
    assert (result["tokens"], result["input"]) == (tokens, scores)
    assert math.isfinite(result["loss"])
    assert 0 < result["peak_mib"] <= limit_mib
