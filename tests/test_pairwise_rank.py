import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmfast import pairwise_rank
from mmfast.ops.pairwise_rank import reference
from mmfast.testing import (
    LAYOUTS,
    assert_within_budget,
    cases,
    find_case,
    random_pair,
    strided,
    unit_rows,
    widest,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def name_of(value):
    return getattr(value, "id", str(value).removeprefix("torch."))


def arguments(case, dtype):
    """What the op takes, without the scale; thresholds near the ends of the scores."""
    made = case.inputs(dtype)
    del made["scale"]
    thresholds = 0.3 * case.norm**2 * torch.randn(case.N, dtype=torch.float64)
    return {**made, "threshold": thresholds}


def test_reference_is_the_definition():
    q, k = random_pair(6, 9, 3, requires_grad=False)
    q_ids, k_ids = torch.tensor([0, 1, 2, 3, 3, 9]), torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5])
    threshold = torch.randn(6, dtype=torch.float64)
    largest, index, above = reference(q, k, threshold, q_ids, k_ids)
    for i in range(6):
        scores = {
            j: sum(float(q[i, d]) * float(k[j, d]) for d in range(3))
            for j in range(9)
            if q_ids[i] != k_ids[j]
        }
        best = max(scores, key=scores.__getitem__)
        assert index[i] == best
        assert largest[i] == pytest.approx(scores[best])
        assert above[i] == sum(s > threshold[i] for s in scores.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", cases("pairwise_rank", "full"), ids=name_of)
def test_matches_reference(case, dtype, level_backend):
    made = arguments(case, dtype)
    largest, index, above = pairwise_rank(**made, backend=level_backend)
    assert (index.dtype, above.dtype) == (torch.int64, torch.int64)
    q, k = (made[name].detach().double() for name in ("q", "k"))
    others = [made.get(name) for name in ("q_ids", "k_ids")]
    exact, _, _ = reference(q, k, None, *others)
    eager, _, _ = reference(*(made[name].detach() for name in ("q", "k")), None, *others)
    eps = torch.finfo(eager.dtype).eps
    # one element of a product can be as large as all of it
    size = float((q.abs() @ k.abs().T).max())
    assert_within_budget("largest", largest, eager, exact, eps=eps, magnitude=2 * size)
    # whatever stands within rounding of the best is right
    scores = torch.where(
        torch.zeros(len(q), len(k), dtype=torch.bool) if others[0] is None
        else others[0][:, None] == others[1],
        -math.inf, q @ k.T,
    )  # fmt: skip
    found = index >= 0
    assert torch.equal(found, scores.amax(1) > -math.inf)
    at = scores.gather(1, index.clamp(min=0)[:, None]).squeeze(1)
    assert ((exact - at)[found] <= 8 * eps * size).all()
    least, most = (
        (scores > made["threshold"].to(eager.dtype).double()[:, None] + shift).sum(1)
        for shift in (8 * eps * size, -8 * eps * size)
    )
    assert ((least <= above) & (above <= most)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_gradients_are_those_of_the_picked_scores(dtype, backend):
    # every row of the first half picks one column, so that its gradient is a sum
    q, k = unit_rows(90, 24, dtype=dtype), unit_rows(40, 24, seed=1, dtype=dtype)
    q[:45] = k[7] + 0.1 * q[:45]
    q.requires_grad_(), k.requires_grad_()
    upstream = torch.randn(90)
    largest, index, _ = pairwise_rank(q, k, backend=backend)
    dq, dk = torch.autograd.grad(largest, (q, k), upstream)
    wide_q, wide_k = (x.detach().double().requires_grad_() for x in (q, k))
    picked = (wide_q * wide_k[index]).sum(1)
    exact = torch.autograd.grad(picked, (wide_q, wide_k), upstream.double())
    eps = torch.finfo(dtype).eps
    for got, want in zip((dq, dk), exact, strict=True):
        assert got.dtype == dtype
        assert (got - want).abs().max() <= 2 * eps * want.abs().max()


@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_gradcheck(backend):
    q, k = random_pair(7, 5, 3)
    ids = {"q_ids": torch.tensor([0, 1, 2, 3, 4, 5, 6]), "k_ids": torch.tensor([0, 0, 0, 0, 0])}

    def largest(q, k):
        # row 0 has nothing left
        return pairwise_rank(q, k, **ids, backend=backend)[0][1:]

    assert torch.autograd.gradcheck(largest, (q, k))
    assert torch.autograd.gradgradcheck(largest, (q, k))


def test_only_asked_gradients(backend):
    q, k = random_pair(6, 9, 3, dtype=widest(backend))
    full = torch.autograd.grad(pairwise_rank(q, k, backend=backend)[0].sum(), (q, k))
    for asked, other, grad in ((q, k.detach(), full[0]), (k, q.detach(), full[1])):
        pair = (asked, other) if asked is q else (other, asked)
        largest, index, above = pairwise_rank(*pair, backend=backend)
        torch.testing.assert_close(torch.autograd.grad(largest.sum(), asked)[0], grad)
        assert not index.requires_grad
        assert not above.requires_grad


@pytest.mark.parametrize("N", [3, 200], ids=["across", "along"])
def test_rows_with_nothing_left(N, level_backend):
    dtype = widest(level_backend.partition("-")[0])
    q, k = torch.ones(N, 2, dtype=dtype, requires_grad=True), torch.ones(70, 2, dtype=dtype)
    options = {"q_ids": torch.arange(N) % 3, "k_ids": torch.ones(70, dtype=torch.int64)}
    threshold = torch.full((N,), -math.inf)
    largest, index, above = pairwise_rank(
        q, k, threshold=threshold, **options, backend=level_backend
    )
    empty = options["q_ids"] == 1
    assert torch.equal(index, torch.where(empty, -1, 0))
    assert torch.equal(largest, torch.where(empty, -math.inf, 2.0).to(largest.dtype))
    assert torch.equal(above, torch.where(empty, 0, 70))
    (dq,) = torch.autograd.grad(largest, q, torch.ones_like(largest))
    assert torch.equal(dq, torch.where(empty, 0.0, 1.0)[:, None].expand(N, 2).to(dq.dtype))


@pytest.mark.parametrize("N", [3, 200], ids=["across", "along"])
def test_scores_that_are_no_numbers(N, level_backend):
    q, k = torch.ones(N, 2), torch.ones(70, 2)
    k[5, 0], k[7, 1], q[2, 0] = math.nan, -math.inf, math.nan
    threshold = torch.full((N,), 1.0)
    threshold[0], threshold[1] = math.nan, math.inf
    largest, index, above = pairwise_rank(q, k, threshold=threshold, backend=level_backend)
    assert (largest[2], index[2], above[2]) == (-math.inf, -1, 0)
    others = torch.arange(N) != 2
    assert (largest[others] == 2).all()
    assert (index[others] == 0).all()
    assert above[:2].eq(0).all()
    assert above[3:].eq(68).all()
    # +inf wins, the lowest column of several, and exceeds any number
    k[[40, 33], 0] = math.inf
    largest, index, above = pairwise_rank(q, k, threshold=threshold, backend=level_backend)
    assert (index[others] == 33).all()
    assert (largest[others] == math.inf).all()
    assert above[1] == 0
    q = torch.full((N, 2), math.inf)
    largest, index, _ = pairwise_rank(q, -torch.ones(70, 2), backend=level_backend)
    assert index.eq(-1).all()
    assert largest.eq(-math.inf).all()


@pytest.mark.parametrize("shape", [(300, 700), (700, 300)], ids=str)
def test_ties_take_the_lowest_column(shape, level_backend):
    # whole numbers of every type, so that products are equal to the bit
    random = torch.Generator().manual_seed(3)
    q, k = (torch.randint(-1, 2, (n, 3), generator=random).float() for n in shape)
    threshold = torch.randint(-3, 4, (shape[0],), generator=random).float()
    got = pairwise_rank(q, k, threshold=threshold, backend=level_backend)
    for x, want in zip(got, reference(q, k, threshold), strict=True):
        assert torch.equal(x, want)


def test_same_bits_for_any_number_of_threads():
    before = torch.get_num_threads()
    made = find_case("pairwise_rank", "many_lanes").inputs()
    try:
        for q, k in ((made["q"], made["k"]), (made["k"], made["q"])):
            threshold = torch.zeros(len(q))
            got = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                got.append(pairwise_rank(q, k, threshold=threshold, backend="cpp"))
            for one, two, three in zip(*got, strict=True):
                assert torch.equal(one, two)
                assert torch.equal(one, three)
    finally:
        torch.set_num_threads(before)


@given(st.integers(1, 150), st.integers(1, 150), st.integers(0, 2**31), st.booleans())
def test_laws(N, M, seed, with_ids):
    random = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(n, 3, generator=random, dtype=torch.float64) for n in (N, M))
    ids = {}
    if with_ids:
        q_ids, k_ids = (torch.randint(-3, 3, (n,), generator=random) << 61 for n in (N, M))
        ids = {"q_ids": q_ids, "k_ids": k_ids}
    threshold = torch.randn(N, generator=random, dtype=torch.float64)
    largest, index, above = pairwise_rank(q, k, threshold=threshold, **ids)
    # what is not below the largest is not above it
    assert pairwise_rank(q, k, threshold=largest, **ids)[2].eq(0).all()
    kept = torch.ones(N, M, dtype=torch.bool) if not ids else q_ids[:, None] != k_ids
    below = torch.full((N,), -math.inf, dtype=torch.float64)
    assert torch.equal(pairwise_rank(q, k, threshold=below, **ids)[2], kept.sum(1))
    assert torch.equal(above > 0, largest > threshold)
    # columns in another order
    order = torch.randperm(M, generator=random)
    if ids:
        ids["k_ids"] = k_ids[order]
    again, at, more = pairwise_rank(q, k[order], threshold=threshold, **ids)
    torch.testing.assert_close(again, largest, rtol=1e-12, atol=1e-12)
    assert torch.equal(torch.where(at < 0, at, order[at]), index)
    assert torch.equal(more, above)


@pytest.mark.parametrize("how", LAYOUTS)
def test_layouts_do_not_matter(how, backend):
    q, k = random_pair(50, 70, 24, dtype=torch.float32, requires_grad=False)
    options = {"q_ids": torch.arange(100)[::2], "k_ids": torch.arange(70).flip(0)}
    threshold = torch.zeros(100)[::2]
    want = pairwise_rank(q, k, threshold=threshold.clone(), **options, backend=backend)
    views = [strided(x, how) for x in (q, k)]
    got = pairwise_rank(*views, threshold=threshold, **options, backend=backend)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)


def test_memory_is_linear(largest_tensor):
    q, k = random_pair(500, 400, 8, dtype=torch.float32)
    with largest_tensor:
        pairwise_rank(q, k, threshold=torch.zeros(500), backend="cpp")[0].sum().backward()
    assert largest_tensor.bytes <= 500 * 8 * 4
