import math

import pytest
import torch

from mmfast import sparsemax
from mmfast.ops.sparsemax import reference
from mmfast.testing import LAYOUTS, leaf, strided

OP = "sparsemax"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def name_of(value):
    return str(value).removeprefix("torch.")


def results(x, g, backend):
    x = leaf(x)
    p = sparsemax(x, backend=backend)
    return p, *torch.autograd.grad(p, x, g.to(p.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("M", [1, 24])
@pytest.mark.parametrize("how", LAYOUTS)
def test_layouts_do_not_matter(how, M, dtype, compiled_backend):
    x, g = (torch.randn(50, M).to(dtype) for _ in range(2))
    plain, view = leaf(x), strided(x, how).requires_grad_()
    want, got = (sparsemax(t, backend=compiled_backend) for t in (plain, view))
    assert torch.equal(got, want)
    assert got.is_contiguous()
    want.backward(g)
    got.backward(strided(g, how))
    assert torch.equal(view.grad, plain.grad)


def test_expanded_rows_and_upstream(backend):
    x = torch.randn(1, 8, requires_grad=True)
    sparsemax(x.expand(20, 8), backend=backend)[:, :3].sum().backward()
    (want,) = torch.autograd.grad(20 * reference(x)[:, :3].sum(), x)
    torch.testing.assert_close(x.grad, want)


def test_a_large_result_is_the_same_rows(level_backend):
    # from 8 MB on the result is written past the caches
    for dtype, M in ((torch.float32, 64), (torch.bfloat16, 128), (torch.float64, 96)):
        x, g = (torch.randn(300, M).to(dtype) for _ in range(2))
        rows = torch.arange((9 << 20) // (M * x.element_size())) % 300
        few, many = results(x, g, level_backend), results(x[rows], g[rows], level_backend)
        for a, b in zip(few, many, strict=True):
            assert torch.equal(a[rows], b)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("M", [1, 7, 33, 600])
def test_rows_of_minus_infinity_are_zero(M, dtype, level_backend):
    x, g = torch.randn(5, M).to(dtype), torch.randn(5, M)
    x[2] = -math.inf
    p, dx = results(x, g, level_backend)
    assert (p[2] == 0).all()
    assert (dx[2] == 0).all()
    assert p.isfinite().all()
    assert dx.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_entries_of_minus_infinity_are_as_good_as_absent(dtype, level_backend):
    x, g = torch.randn(6, 40).to(dtype), torch.randn(6, 40).to(dtype)
    keep = torch.arange(40) % 3 != 1
    p, dx = results(x.masked_fill(~keep, -math.inf), g, level_backend)
    want, d_want = results(x[:, keep], g[:, keep], level_backend)
    torch.testing.assert_close(p[:, keep], want)
    torch.testing.assert_close(dx[:, keep], d_want)
    assert (p[:, ~keep] == 0).all()
    assert (dx[:, ~keep] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("place", [0, 20, 32])
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_a_wrong_row_is_nan_and_keeps_to_itself(value, place, dtype, level_backend):
    x, g = torch.randn(70, 33).to(dtype), torch.randn(70, 33)
    before = results(x, g, level_backend)
    # beside numbers, beside -inf alone, in rows of nothing else
    x[33, place] = value
    x[34] = -math.inf
    x[34, place] = value
    x[35] = value
    after = results(x, g, level_backend)
    wrong = (torch.arange(70) - 34).abs() <= 1
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[~wrong], b[~wrong])
        assert b[wrong].isnan().all()


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_a_wrong_upstream_matters_on_the_support_only(value, level_backend):
    x = torch.tensor([[2.0, 0.0, 1.5], [2.0, 0.0, 1.5]])
    g = torch.tensor([[value, 1.0, 2.0], [1.0, value, 2.0]])
    _, dx = results(x, g, level_backend)
    assert not dx[0, [0, 2]].isfinite().any()
    assert dx[0, 1] == 0
    assert dx[1].tolist() == [-0.5, 0.0, 0.5]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("center", [0.0, 1e30, -1e30, 3e4], ids=str)
def test_equal_entries_share(center, dtype, level_backend):
    if dtype == torch.float16 and abs(center) > 6e4:
        pytest.skip("beyond float16")
    x = torch.full((3, 50), center, dtype=dtype)
    p, dx = results(x, torch.arange(50.0).expand(3, 50), level_backend)
    torch.testing.assert_close(p, torch.full_like(p, 1 / 50), rtol=2e-3, atol=0)
    torch.testing.assert_close(dx, (torch.arange(50.0) - 24.5).expand(3, 50).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_a_weight_of_the_support_is_never_rounded_to_zero(dtype, level_backend):
    # far below what a half type resolves beside 1, and weights far below the smallest float16
    M = 16384
    x = torch.zeros(2, M, dtype=torch.float64)
    x[0, 0], x[1, 0] = 1.0, 1.0 - 1e-4
    x[:, 1:] += 1e-9 * torch.arange(1, M)
    x = x.to(dtype)
    p, dx = results(x, torch.randn(2, M), level_backend)
    want = reference(x.double()) > 0
    assert torch.equal(p > 0, want)
    assert torch.equal(dx != 0, want & (dx != 0))
    assert want.sum() > 2


def test_scores_that_differ_by_one_bit(level_backend):
    for one, width in ((1.0, 2), (1e-3, 700), (1e6, 9)):
        x = torch.full((2, width), one)
        x[1, 0] = torch.nextafter(x[1, 0], torch.tensor(math.inf))
        p, _ = results(x, torch.zeros_like(x), level_backend)
        torch.testing.assert_close(p.double(), reference(x.double()), rtol=1e-6, atol=1e-9)
        assert p[1, 0] > p[1, 1]
