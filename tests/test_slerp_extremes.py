import math

import pytest
import torch
import torch.nn.functional as F

from mmfast import slerp
from mmfast.ops.slerp import reference
from mmfast.testing import LAYOUTS, strided


def name_of(value):
    return getattr(value, "id", str(value).removeprefix("torch."))


def pair(N, D, dtype=torch.float32):
    return (F.normalize(torch.randn(N, D), dim=1).to(dtype) for _ in range(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("D", [1, 24])
@pytest.mark.parametrize("how", LAYOUTS)
def test_layouts_do_not_matter(how, D, dtype, compiled_backend):
    a, b = (0.9 * x for x in pair(50, D, dtype))
    g = torch.randn(50, D).to(dtype)
    lam = torch.rand(100)[::2]
    plain = [x.clone().requires_grad_() for x in (a, b)]
    views = [strided(x, how).requires_grad_() for x in (a, b)]
    want = slerp(*plain, lam.clone(), backend=compiled_backend)
    got = slerp(*views, lam, backend=compiled_backend)
    assert torch.equal(got, want)
    assert got.is_contiguous()
    want.backward(g)
    got.backward(strided(g, how))
    for view, x in zip(views, plain, strict=True):
        assert torch.equal(view.grad, x.grad)


def test_expanded_rows_lam_and_upstream(backend):
    a, b = torch.full((1, 8), 0.3).expand(20, 8), next(pair(20, 8)).requires_grad_()
    lam = torch.tensor([0.3]).expand(20)
    out = slerp(a, b, lam, backend=backend)
    torch.testing.assert_close(out, reference(a, b, 0.3))
    out.sum().backward()
    (want,) = torch.autograd.grad(reference(a, b, 0.3).sum(), b)
    torch.testing.assert_close(b.grad, want)


def test_one_tensor_as_both_sides(backend):
    x = next(pair(9, 4)).requires_grad_()
    slerp(x, x, 0.3, backend=backend).square().sum().backward()
    y = x.detach().clone().requires_grad_()
    reference(y, y, 0.3).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_a_large_result_is_the_same_rows(level_backend):
    # from 8 MB on the result is written past the caches; not by a backend that is slow here
    if level_backend == "triton":
        pytest.skip("its interpreter would take minutes, and it has one way to write")
    for dtype, D in ((torch.float32, 64), (torch.bfloat16, 128), (torch.float64, 96)):
        a, b = pair(300, D, dtype)
        rows = (9 << 20) // (D * a.element_size())
        picks = torch.arange(rows) % 300
        lam = torch.rand(300)
        g = torch.randn(300, D).to(dtype)
        results = []
        for index in (torch.arange(300), picks):
            x, y = (t[index].requires_grad_() for t in (a, b))
            out = slerp(x, y, lam[index], backend=level_backend)
            results.append((out, *torch.autograd.grad(out, (x, y), g[index])))
        for few, many in zip(*results, strict=True):
            assert torch.equal(few[picks], many)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
def test_zero_rows(dtype, level_backend):
    a = torch.zeros(3, 5, dtype=dtype, requires_grad=True)
    b = next(pair(3, 5, dtype)).requires_grad_()
    out = slerp(a, b, 0.5, backend=level_backend)
    # theta = pi / 2
    torch.testing.assert_close(out, b * math.sqrt(0.5))
    out.sum().backward()
    assert a.grad.isfinite().all()
    torch.testing.assert_close(b.grad, torch.full_like(b, math.sqrt(0.5)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("length", [1 + 1e-3, 1.5, 100.0], ids=str)
def test_inner_products_above_one_count_as_one(length, dtype, level_backend):
    a = (next(pair(40, 16)) * length).to(dtype).requires_grad_()
    b = a.detach().clone().requires_grad_()
    lam = torch.rand(40, requires_grad=True)
    out = slerp(a, b, lam, backend=level_backend)
    torch.testing.assert_close(out, a)
    out.sum().backward()
    for x in (a, b, lam):
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("length", [1.0, 1.5], ids=str)
def test_antipodal_rows_are_finite_and_bounded(length, dtype, level_backend):
    a = (next(pair(40, 16, torch.float64)) * length).to(dtype).requires_grad_()
    b = (-a.detach()).requires_grad_()
    lam = torch.linspace(0, 1, 40, dtype=torch.float64).requires_grad_()
    out = slerp(a, b, lam, backend=level_backend)
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    bound = 2 * a.detach().abs().max() / math.sqrt(2 * eps)
    assert out.abs().max() <= 1.01 * bound
    out.sum().backward()
    for x in (a, b, lam):
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("lam", [-1000.5, -2.0, 7.3, 5000.25], ids=str)
def test_lam_far_outside(lam, level_backend):
    # many times around the circle: lam theta itself is rounded to lam theta eps
    a, b = pair(40, 16)
    got = slerp(a, b, lam, backend=level_backend).double()
    want = reference(a.double(), b.double(), lam)
    assert (got - want).abs().max() <= 1e-6 * max(1, abs(lam))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("where", ["a", "b", "lam", "g"])
def test_a_wrong_row_keeps_to_itself(where, value, level_backend):
    a, b = pair(70, 33)
    made = {"a": a, "b": b, "lam": torch.rand(70), "g": torch.randn(70, 33)}

    def results():
        leaves = [made[name].clone().requires_grad_() for name in ("a", "b", "lam")]
        out = slerp(*leaves, backend=level_backend)
        return (out, *torch.autograd.grad(out, leaves, made["g"]))

    before = results()
    made[where][33, ...] = value
    after = results()
    others = torch.arange(70) != 33
    for x, y in zip(before, after, strict=True):
        assert torch.equal(x[others], y[others])
    if where != "g":
        assert not after[0][33].isfinite().all()
    else:
        assert not after[1][33].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_half_results_are_rounded_once(dtype, level_backend):
    # orthogonal rows weigh alike: the result is sqrt(1/2) of what stands in one of the two
    a, b = torch.zeros(64, 64, dtype=dtype), torch.zeros(64, 64, dtype=dtype)
    a[:, :32] = torch.randn(64, 32).to(dtype)
    b[:, 32:] = torch.randn(64, 32).to(dtype)
    got = slerp(a, b, 0.5, backend=level_backend)
    exact = (a.double() + b.double()) * math.sqrt(0.5)
    # half a unit in the last place, and the float32 weight's own error
    allowed = exact.abs() * (torch.finfo(dtype).eps / 2 + 1e-6)
    assert ((got.double() - exact).abs() <= allowed).all()


def test_ends_are_the_rows_even_near_antipodal(level_backend):
    angle = torch.tensor([[3.1], [3.14], [3.141], [math.pi]], dtype=torch.float64)
    a = torch.tensor([[1.0, 0.0]]).expand(4, 2)
    b = torch.cat((angle.cos(), angle.sin()), 1).float()
    torch.testing.assert_close(slerp(a, b, 1.0, backend=level_backend), a, rtol=0, atol=3e-7)
    torch.testing.assert_close(slerp(a, b, 0.0, backend=level_backend), b, rtol=0, atol=3e-7)
