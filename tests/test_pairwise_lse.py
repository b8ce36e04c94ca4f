import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from mmfast import pairwise_lse
from mmfast.ops.pairwise_lse import reference
from mmfast.testing import (
    Case,
    assert_within_budget,
    cases,
    find_case,
    in_double,
    lse_magnitudes,
    random_pair,
    saved_bytes,
    widest,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def name_of(value):
    return getattr(value, "id", str(value).removeprefix("torch."))


def value_and_gradients(function, made, upstream, **options):
    """rows, columns and d/dq, d/dk, d/dscale of their products with `upstream`."""
    rows, columns = function(**made, columns=True, **options)
    g_rows, g_columns = (g.to(rows.dtype) for g in upstream)
    # an empty row is -inf: times its upstream it would be NaN, so gradients are given directly
    leaves = [made[name] for name in ("q", "k", "scale")]
    grads = torch.autograd.grad((rows, columns), leaves, (g_rows, g_columns))
    return dict(
        zip(("rows", "columns", "dq", "dk", "dscale"), (rows, columns, *grads), strict=True)
    )


def reordered(q, k, scale, **options):
    """The definition, summed in another order: in float64 its error is not zero by identity."""
    return reference(q.flip(1), k.flip(1), scale, **options)


def check_case(case, dtype, backend):
    made = case.inputs(dtype)
    double = in_double(made)
    result = torch.float64 if dtype == torch.float64 else torch.float32
    # rounded like the result it belongs to, so that all three see the same upstream gradient
    upstream = [torch.randn(size, dtype=result).double() for size in (case.N, case.M)]
    got = value_and_gradients(pairwise_lse, made, upstream, backend=backend)
    eager = value_and_gradients(reordered, made, upstream)
    exact = value_and_gradients(reference, double, upstream)
    sizes = lse_magnitudes(
        **double, rows=exact["rows"], columns=exact["columns"], upstream=upstream
    )
    types = {"rows": result, "columns": result, "dq": dtype, "dk": dtype, "dscale": torch.float64}
    for name, x in got.items():
        assert x.dtype == types[name]
        eps = torch.finfo(result if name in ("rows", "columns") else dtype).eps
        if dtype == torch.float64:
            # its judge is float64 too, and errs as much
            eps *= 4
        if dtype == torch.bfloat16 and name in ("rows", "columns"):
            # exponentials good to 3e-6 are far below what the inputs resolve
            eps *= 16
        assert_within_budget(name, x, eager[name], exact[name], eps=eps, magnitude=sizes[name])


@pytest.mark.parametrize("left_out", [(), ("ids",), ("mask",), ("ids", "mask")], ids=str)
def test_reference_is_the_definition(left_out):
    q, k = random_pair(6, 5, 3, requires_grad=False)
    q_ids, k_ids = torch.tensor([0, 1, 2, 3, 3, 9]), torch.tensor([3, 1, 4, 1, 5])
    mask = torch.rand(6, 5) < 0.6
    mask[2] = False
    mask[:, 4] = False
    given_ids = {"q_ids": q_ids, "k_ids": k_ids} if "ids" in left_out else {}
    given_mask = {"mask": mask} if "mask" in left_out else {}
    rows, columns = reference(q, k, 1.7, columns=True, **given_ids, **given_mask)
    sums = np.zeros(6), np.zeros(5)
    for i in range(6):
        for j in range(5):
            if "ids" in left_out and q_ids[i] == k_ids[j]:
                continue
            if "mask" in left_out and not mask[i, j]:
                continue
            e = math.exp(1.7 * sum(float(q[i, d]) * float(k[j, d]) for d in range(3)))
            sums[0][i] += e
            sums[1][j] += e
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(rows, np.log(sums[0]), rtol=1e-13)
        np.testing.assert_allclose(columns, np.log(sums[1]), rtol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", cases("pairwise_lse", "full"), ids=name_of)
def test_matches_reference(case, dtype, level_backend):
    check_case(case, dtype, level_backend)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_matches_reference_at_every_small_shape(dtype, level_backend):
    for N in (1, 2, 15, 16, 17, 65):
        for M in (1, 3, 31, 33, 66):
            for D in (1, 2, 15, 17, 33):
                check_case(Case("sweep", N, M, D, "edges of tiles"), dtype, level_backend)


def test_rows_alone_are_the_same_rows(backend):
    made = find_case("pairwise_lse", "ragged").inputs()
    rows, _ = pairwise_lse(**made, columns=True, backend=backend)
    assert torch.equal(pairwise_lse(**made, backend=backend), rows)


def test_scale_defaults_to_one(backend):
    q, k = random_pair(dtype=widest(backend))
    assert torch.equal(pairwise_lse(q, k, backend=backend), pairwise_lse(q, k, 1, backend=backend))


@pytest.mark.parametrize("which", ["rows", "columns"])
def test_one_upstream_gradient_alone(which, backend):
    q, k = random_pair(7, 9, 4, dtype=widest(backend))
    outs = pairwise_lse(q, k, 2.0, columns=True, backend=backend)
    expected = reference(q, k, 2.0, columns=True)
    i = ("rows", "columns").index(which)
    got = torch.autograd.grad(outs[i].square().sum(), (q, k))
    want = torch.autograd.grad(expected[i].square().sum(), (q, k))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("left_out", [False, True])
def test_gradcheck(backend, left_out):
    q, k = random_pair(5, 4, 3)
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    options = {}
    if left_out:
        options = {"q_ids": torch.arange(5), "k_ids": torch.arange(4), "mask": torch.ones(5, 4) > 0}

    def function(q, k, scale):
        return pairwise_lse(q, k, scale, columns=True, backend=backend, **options)

    assert torch.autograd.gradcheck(function, (q, k, scale))


def test_double_backward_of_eager():
    q, k = random_pair(4, 3, 2)
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[1] = False

    def function(q, k):
        rows = pairwise_lse(q, k, 1.3, mask=mask, backend="eager")
        return rows.masked_fill(rows.isinf(), 0.0)

    assert torch.autograd.gradgradcheck(function, (q, k))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=name_of)
def test_gradient_of_scale_has_its_shape_and_dtype(shape, dtype, backend):
    q, k = random_pair(dtype=torch.float32)
    scale = torch.full(shape, 2.0, dtype=dtype, requires_grad=True)
    pairwise_lse(q, k, scale, backend=backend).sum().backward()
    exact = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    reference(q.double(), k.double(), exact).sum().backward()
    assert scale.grad.shape == shape
    assert scale.grad.dtype == dtype
    tolerance = max(torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(
        scale.grad.double().reshape(()), exact.grad, rtol=tolerance, atol=tolerance
    )


def test_float_scale_keeps_double_precision(backend):
    q, k = random_pair()
    third = torch.tensor(1 / 3, dtype=torch.float64)
    assert torch.equal(
        pairwise_lse(q, k, 1 / 3, backend=backend), pairwise_lse(q, k, third, backend=backend)
    )
    torch.testing.assert_close(
        pairwise_lse(q, k, 1 / 3, backend=backend), (q @ k.T / 3).logsumexp(1), rtol=1e-14, atol=0
    )


class Seen(TorchDispatchMode):
    """The arguments and results of the backward op inside the block."""

    needs = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.mmfast.pairwise_lse_bwd.default:
            self.needs, self.sizes = args[-4:-1], [x.numel() for x in out]
        return out


@pytest.mark.parametrize("asked", [("q",), ("k",), ("scale",), ("q", "scale"), ("q", "k")], ids=str)
def test_only_asked_gradients(asked, backend):
    made = find_case("pairwise_lse", "aligned").inputs()
    for name in ("q", "k", "scale"):
        made[name].requires_grad_(name in asked)
    with Seen() as seen:
        pairwise_lse(**made, backend=backend).square().sum().backward()
    expected = in_double(made)
    reference(**expected).square().sum().backward()
    for name in ("q", "k", "scale"):
        if name in asked:
            want = expected[name].grad.to(made[name].dtype)
            torch.testing.assert_close(made[name].grad, want, rtol=1e-4, atol=1e-4)
        else:
            assert made[name].grad is None
    if backend == "cpp" and "k" not in asked:
        assert seen.needs is None  # made in the forward pass
    elif backend != "eager":
        assert seen.needs == tuple(name in asked for name in ("q", "k", "scale"))
        full = {"q": made["q"].numel(), "k": made["k"].numel(), "scale": 1}
        assert seen.sizes == [full[name] if name in asked else 0 for name in full]


def test_no_gradient_at_all(backend):
    q, k = random_pair(requires_grad=False)
    assert not pairwise_lse(q, k, 2.0, backend=backend).requires_grad


def test_memory_kept_for_backward_is_linear(compiled_backend):
    made = find_case("pairwise_lse", "many_lanes").inputs()
    with saved_bytes(made["q"], made["k"], made["scale"]) as saved:
        rows, columns = pairwise_lse(**made, columns=True, backend=compiled_backend)
    assert saved.bytes == 4 * (len(rows) + len(columns))


sizes = st.integers(1, 40)


@given(sizes, sizes, st.integers(1, 9), st.integers(0, 2**31))
def test_permuting_keys_changes_nothing(N, M, D, seed):
    random = torch.Generator().manual_seed(seed)
    q = torch.randn(N, D, generator=random, dtype=torch.float64)
    k = torch.randn(M, D, generator=random, dtype=torch.float64)
    order = torch.randperm(M, generator=random)
    rows, columns = pairwise_lse(q, k, columns=True)
    rows_2, columns_2 = pairwise_lse(q, k[order], columns=True)
    torch.testing.assert_close(rows_2, rows, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(columns_2, columns[order], rtol=1e-12, atol=1e-12)


@given(sizes, sizes, st.integers(1, 9), st.integers(0, 2**31))
def test_swapping_sides_swaps_results(N, M, D, seed):
    random = torch.Generator().manual_seed(seed)
    q = torch.randn(N, D, generator=random, dtype=torch.float64)
    k = torch.randn(M, D, generator=random, dtype=torch.float64)
    rows, columns = pairwise_lse(q, k, 1.5, columns=True)
    columns_2, rows_2 = pairwise_lse(k, q, 1.5, columns=True)
    torch.testing.assert_close((rows_2, columns_2), (rows, columns), rtol=1e-12, atol=1e-12)


@given(sizes, st.integers(2, 40), st.integers(1, 9), st.data())
def test_parts_of_the_keys_add_up(N, M, D, data):
    cut = data.draw(st.integers(1, M - 1))
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    q = torch.randn(N, D, generator=random, dtype=torch.float64)
    k = torch.randn(M, D, generator=random, dtype=torch.float64)
    parts = torch.logaddexp(pairwise_lse(q, k[:cut]), pairwise_lse(q, k[cut:]))
    torch.testing.assert_close(pairwise_lse(q, k), parts, rtol=1e-12, atol=1e-12)


@given(sizes, sizes, st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**31))
def test_ids_are_a_mask(N, M, base, seed):
    random = torch.Generator().manual_seed(seed)
    q = torch.randn(N, 5, generator=random, dtype=torch.float64)
    k = torch.randn(M, 5, generator=random, dtype=torch.float64)
    # any int64 is an id: those near the ends of the range wrap around
    q_ids = torch.randint(0, 4, (N,), generator=random) + base
    k_ids = torch.randint(0, 4, (M,), generator=random) + base
    by_ids = pairwise_lse(q, k, q_ids=q_ids, k_ids=k_ids, columns=True)
    by_mask = pairwise_lse(q, k, mask=q_ids[:, None] != k_ids, columns=True)
    torch.testing.assert_close(by_ids, by_mask, rtol=1e-12, atol=1e-12)


@given(st.integers(1, 60), st.floats(-50, 50))
def test_equal_scores_give_the_logarithm_of_their_number(M, score):
    rows = pairwise_lse(
        torch.ones(3, 1, dtype=torch.float64), torch.ones(M, 1, dtype=torch.float64), score
    )
    torch.testing.assert_close(rows, torch.full_like(rows, score + math.log(M)), rtol=0, atol=1e-12)


@given(st.integers(1, 30), st.floats(0.1, 30), st.integers(0, 2**31))
def test_gradient_weights_sum_to_one(M, scale, seed):
    # with q = 0 added to by one direction common to all keys, dq along it is scale * sum of p
    random = torch.Generator().manual_seed(seed)
    q = torch.randn(4, 3, generator=random, dtype=torch.float64)
    k = torch.randn(M, 3, generator=random, dtype=torch.float64)
    k[:, 0] = 1.0
    q.requires_grad_()
    pairwise_lse(q, k, scale).sum().backward()
    torch.testing.assert_close(q.grad[:, 0], torch.full_like(q[:, 0], scale), rtol=1e-12, atol=0)
