"""slerp against its definition, exact vectors, a float64 judge, and the laws it obeys."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from mmfast import slerp
from mmfast.ops._inputs import SCORE_TYPE
from mmfast.ops.slerp import _bounded, _weight, reference
from mmfast.testing import RowsCase, assert_within_budget, cases, find_case, in_double, saved_bytes

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
GOLDEN = np.load(Path(__file__).parent / "golden" / "slerp.npz")
NAMES = ("a", "b", "lam")


def name_of(value):
    return getattr(value, "id", str(value).removeprefix("torch."))


def golden(key):
    return torch.from_numpy(np.array(GOLDEN[key]))


def unit_rows(N, D, *, dtype=torch.float64, requires_grad=False):
    return (
        F.normalize(torch.randn(N, D, dtype=torch.float64), dim=1)
        .to(dtype)
        .requires_grad_(requires_grad)
    )


def value_and_gradients(function, made, g, **options):
    out = function(**made, **options)
    grads = torch.autograd.grad(out, [made[name] for name in NAMES], g.to(out.dtype))
    return dict(zip(("out", "da", "db", "dlam"), (out, *grads), strict=True))


def reordered(a, b, lam):
    """The definition, summed in another order: in float64 its error is not zero by identity."""
    return reference(a.flip(1), b.flip(1), lam).flip(1)


def weights_of(a, b, lam):
    """Both weights of each row [N, 1], and their derivatives by c and by lam, in float64."""
    c = (a * b).sum(1, keepdim=True).detach().requires_grad_()
    lam = lam.detach().reshape(-1, 1).expand_as(c).clone().requires_grad_()
    found = {}
    for k, share in (("k1", lam), ("k2", 1 - lam)):
        value = _weight(_bounded(c), share)
        by_c, by_lam = torch.autograd.grad(value.sum(), (c, lam), create_graph=True)
        by_c_twice, by_both = torch.autograd.grad(by_c.sum(), (c, lam))
        found[k] = value, by_c, by_c_twice, by_lam, by_both
    return {k: [x.detach().abs() for x in values] for k, values in found.items()}


def error_sizes(made, g):
    """What errors are relative to: the absolute terms behind each result, and how much of the
    rounding of the inner product c reaches it."""
    a, b, lam = (made[name].detach() for name in NAMES)
    (k1, k1_c, k1_cc, k1_lam, k1_both), (k2, k2_c, k2_cc, k2_lam, k2_both) = weights_of(
        a, b, lam
    ).values()
    a, b, g = a.abs(), b.abs(), g.abs()
    c, along_a, along_b = ((x * y).sum(1, keepdim=True) for x, y in ((a, b), (g, a), (g, b)))
    by_c = along_a * (k1_c + c * k1_cc) + along_b * (k2_c + c * k2_cc)
    dlam = along_a * (k1_lam + c * k1_both) + along_b * (k2_lam + c * k2_both)
    return {
        "out": float(((k1 + c * k1_c) * a + (k2 + c * k2_c) * b).max()),
        "da": float(((k1 + c * k1_c) * g + by_c * b).max()),
        "db": float(((k2 + c * k2_c) * g + by_c * a).max()),
        "dlam": float(dlam.max() if lam.dim() else dlam.sum()),
    }


def check_case(case, dtype, backend):
    made = case.inputs(dtype)
    double = in_double(made)
    g = torch.randn(case.N, case.D).to(dtype).double()
    got = value_and_gradients(slerp, made, g, backend=backend)
    eager = value_and_gradients(reordered, made, g)
    exact = value_and_gradients(reference, double, g)
    sizes = error_sizes(double, g)
    for name, x in got.items():
        assert x.dtype == (torch.float64 if name == "dlam" else dtype)
        eps = torch.finfo(SCORE_TYPE[dtype] if name == "dlam" else dtype).eps
        if dtype == torch.float64:
            # its judge is float64 too, and errs as much
            eps *= 4
        assert_within_budget(name, x, eager[name], exact[name], eps=eps, magnitude=sizes[name])


def test_reference_is_the_definition():
    a, b = unit_rows(6, 4), unit_rows(6, 4)
    lam = torch.linspace(-0.5, 1.5, 6, dtype=torch.float64)
    want = np.zeros((6, 4))
    for i in range(6):
        theta = math.acos(sum(float(a[i, d]) * float(b[i, d]) for d in range(4)))
        k1 = math.sin(float(lam[i]) * theta) / math.sin(theta)
        k2 = math.sin((1 - float(lam[i])) * theta) / math.sin(theta)
        for d in range(4):
            want[i, d] = k1 * float(a[i, d]) + k2 * float(b[i, d])
    np.testing.assert_allclose(reference(a, b, lam), want, rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(reference(a[:1], b[:1], float(lam[0])), want[:1], rtol=1e-13)


@pytest.mark.parametrize("lam", [-3.0, -0.5, 0.0, 0.3, 1.0, 2.5, 40.0])
def test_series_of_the_reference_meets_the_formula(lam):
    # the angle is given, so that neither form suffers from the rounding of c
    theta = torch.linspace(1e-3, 1.2, 500, dtype=torch.float64)
    lam = torch.tensor(lam, dtype=torch.float64)
    want = torch.sin(lam * theta) / torch.sin(theta)
    size = lam.abs().clamp(min=1)
    got = _weight(theta.cos(), lam)
    # c is rounded to eps, and the weight changes by at most |lam| (lam^2 + 1) / 3 times that
    assert ((got - want).abs() <= 4e-16 * size * (1 + size**2)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", cases("slerp", "full"), ids=name_of)
def test_matches_reference(case, dtype, level_backend):
    check_case(case, dtype, level_backend)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_matches_reference_at_every_small_width(dtype, level_backend):
    for N in (1, 2, 5):
        for D in range(1, 140):
            check_case(RowsCase("sweep", N, D, "edges of vectors", norm=0.8), dtype, level_backend)


def test_triton_refuses_float64():
    x = unit_rows(2, 3)
    with pytest.raises(RuntimeError, match='slerp: backend="triton" cannot run here because'):
        slerp(x, x, 0.5, backend="triton")


def test_golden_edges(level_backend):
    dtype = torch.float32 if level_backend == "triton" else torch.float64
    a, b, lam, want = (golden(f"edge.{key}") for key in ("a", "b", "lam", "out_exact"))
    got = slerp(a.to(dtype), b.to(dtype), lam, backend=level_backend).double()
    if dtype == torch.float32:
        # rounded rows have other angles: judged where the result does not hang on the last bits
        keep = golden("edge.theta_exact") < 3
        a, b, lam, want, got = (x[keep] for x in (a, b, lam, want, got))
    # c comes from a sum of D = 5 products, so it is off by some eps, and the angle is rounded: near
    # pi, where weights and slopes are large, that much of both reaches the result
    (k1, k1_by_c, _, k1_by_lam, _), (k2, k2_by_c, _, k2_by_lam, _) = weights_of(a, b, lam).values()
    share = lam[:, None]
    sizes = (k1 + k1_by_c + share * k1_by_lam) * a.abs()
    sizes += (k2 + k2_by_c + (1 - share) * k2_by_lam) * b.abs()
    allowed = 8 * torch.finfo(dtype).eps * sizes.amax(1, keepdim=True)
    assert ((got - want).abs() <= allowed).all()
    assert got.isfinite().all()


def test_golden_edges_hold_what_the_published_code_loses():
    lost = golden("edge.out_reference_code_f64").isnan().any(1)
    assert lost.any()
    a, b, lam = (golden(f"edge.{key}")[lost] for key in ("a", "b", "lam"))
    torch.testing.assert_close(
        slerp(a, b, lam), golden("edge.out_exact")[lost], rtol=1e-14, atol=1e-15
    )


def test_golden_gradients(level_backend):
    dtype = torch.float32 if level_backend == "triton" else torch.float64
    case = "vjp_B7_D13"
    a, b = (golden(f"{case}.{key}").to(dtype).requires_grad_() for key in NAMES[:2])
    lam = golden(f"{case}.lam").requires_grad_()
    out = slerp(a, b, lam, backend=level_backend)
    grads = torch.autograd.grad(out, (a, b, lam), golden(f"{case}.upstream").to(dtype))
    wanted = [golden(f"{case}.{key}") for key in ("out", "grad_a", "grad_b", "grad_lam")]
    wanted[3] = wanted[3].reshape(())
    tolerance = 50 * torch.finfo(dtype).eps
    for got, want in zip((out, *grads), wanted, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


def check_gradients(function, *inputs):
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("shape", [(), (1,), (4,)], ids=str)
@pytest.mark.parametrize("backend", ["cpp", "eager"])
def test_gradcheck(backend, shape):
    a, b = unit_rows(4, 3, requires_grad=True), unit_rows(4, 3, requires_grad=True)
    lam = torch.full(shape, 0.3, dtype=torch.float64, requires_grad=True)
    check_gradients(lambda *x: slerp(*x, backend=backend), a, b, lam)


@pytest.mark.parametrize("backend", ["cpp", "eager"])
def test_gradcheck_at_equal_rows(backend):
    # normalised inside, since past c = 1 the op stops: its two-sided difference there means nothing
    b, lam = unit_rows(4, 3), torch.linspace(0, 1, 4, dtype=torch.float64, requires_grad=True)
    a = b.clone().requires_grad_()
    check_gradients(lambda a, lam: slerp(F.normalize(a, dim=1), b, lam, backend=backend), a, lam)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_gradients_at_equal_rows_are_the_limits(dtype, level_backend):
    a = torch.zeros(5, 3, dtype=dtype)
    a[:, 0] = 1.0
    b = a.clone().requires_grad_()
    a.requires_grad_()
    lam = torch.tensor([-0.5, 0.0, 0.3, 1.0, 1.5], dtype=dtype, requires_grad=True)
    out = slerp(a, b, lam, backend=level_backend)
    out.backward(torch.ones_like(a))
    torch.testing.assert_close(out, a)
    # g_c = -lam (1 - lam^2) / 3 - (1 - lam) (1 - (1 - lam)^2) / 3, along the other row
    rest = 1 - lam.detach()
    g_c = -(lam.detach() * (1 - lam.detach() ** 2) + rest * (1 - rest**2)) / 3
    want_a, want_b = (x.detach()[:, None].expand(5, 3).clone() for x in (lam, rest))
    want_a[:, 0] += g_c
    want_b[:, 0] += g_c
    torch.testing.assert_close(a.grad, want_a)
    torch.testing.assert_close(b.grad, want_b)
    torch.testing.assert_close(lam.grad, torch.zeros_like(lam))


def test_double_backward_of_eager():
    a, b = unit_rows(4, 3, requires_grad=True), unit_rows(4, 3, requires_grad=True)
    lam = torch.tensor([0.0, 0.3, 1.0, 1.2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda *x: slerp(*x, backend="eager"), (a, b, lam))
    # 0.1 apart: by the series
    near = F.normalize(a.detach() + 0.1 * b.detach(), dim=1).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda *x: slerp(*x, backend="eager"), (a, near, lam))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (5,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=name_of)
def test_gradient_of_lam_has_its_shape_and_dtype(shape, dtype, backend):
    a, b = unit_rows(5, 3, dtype=torch.float32), unit_rows(5, 3, dtype=torch.float32)
    lam = torch.full(shape, 0.25, dtype=dtype, requires_grad=True)
    slerp(a, b, lam, backend=backend).square().sum().backward()
    exact = torch.full(shape, 0.25, dtype=torch.float64, requires_grad=True)
    reference(a.double(), b.double(), exact).square().sum().backward()
    assert lam.grad.shape == shape
    assert lam.grad.dtype == dtype
    tolerance = max(torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(lam.grad.double(), exact.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ["cpp", "eager"])
def test_float_lam_keeps_double_precision(backend):
    a, b = unit_rows(4, 3), unit_rows(4, 3)
    third = torch.full((4,), 1 / 3, dtype=torch.float64)
    assert torch.equal(slerp(a, b, 1 / 3, backend=backend), slerp(a, b, third, backend=backend))


class Seen(TorchDispatchMode):
    """The arguments and results of every backward op inside the block."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.mmfast.slerp_bwd.default:
            self.needs, self.sizes = args[-4:-1], [x.numel() for x in out]
        return out


@pytest.mark.parametrize("asked", [("a",), ("b",), ("lam",), ("a", "lam"), ("a", "b")], ids=str)
def test_only_asked_gradients(asked, backend):
    made = find_case("slerp", "odd_width").inputs()
    for name in NAMES:
        made[name].requires_grad_(name in asked)
    with Seen() as seen:
        slerp(**made, backend=backend).square().sum().backward()
    expected = in_double(made)
    reference(**expected).square().sum().backward()
    for name in NAMES:
        if name in asked:
            want = expected[name].grad.to(made[name].dtype)
            torch.testing.assert_close(made[name].grad, want, rtol=1e-5, atol=1e-5)
        else:
            assert made[name].grad is None
    if backend != "eager":
        assert seen.needs == tuple(name in asked for name in NAMES)
        full = {name: made[name].numel() for name in NAMES}
        assert seen.sizes == [full[name] if name in asked else 0 for name in NAMES]


def test_no_gradient_at_all(backend):
    a, b = unit_rows(4, 3, dtype=torch.float32), unit_rows(4, 3, dtype=torch.float32)
    assert not slerp(a, b, 0.3, backend=backend).requires_grad


def test_nothing_but_the_inputs_is_kept_for_backward(compiled_backend):
    made = find_case("slerp", "aligned").inputs()
    with saved_bytes(made["a"], made["b"]) as saved:
        slerp(**made, backend=compiled_backend)
    # lam in float32
    assert saved.bytes == 4 * made["lam"].numel()


# --- laws --------------------------------------------------------------------------------------

sizes = st.integers(1, 40)
shares = st.floats(-1, 2)


def random_pair(N, D, seed):
    random = torch.Generator().manual_seed(seed)
    return (
        F.normalize(torch.randn(N, D, generator=random, dtype=torch.float64), dim=1)
        for _ in range(2)
    )


@given(sizes, st.integers(2, 40), shares, st.integers(0, 2**31))
def test_the_other_way_round(N, D, lam, seed):
    a, b = random_pair(N, D, seed)
    # near the antipodal of a row the weights hang on its last bits
    b = torch.where((a * b).sum(1, keepdim=True) < -0.9, -b, b)
    torch.testing.assert_close(slerp(a, b, lam), slerp(b, a, 1 - lam), rtol=1e-11, atol=1e-11)


@given(sizes, sizes, st.integers(0, 2**31))
def test_ends(N, D, seed):
    a, b = random_pair(N, D, seed)
    # sin(theta) / sin(theta): theta is good to eps / sin(theta), and the sine from c is exact
    close = {"rtol": 0, "atol": 1e-11}
    b = torch.where((a * b).sum(1, keepdim=True) < -0.9, -b, b)
    torch.testing.assert_close(slerp(a, b, 1.0), a, **close)
    torch.testing.assert_close(slerp(a, b, 0.0), b, **close)


@given(sizes, st.integers(2, 40), shares, st.integers(0, 2**31))
def test_unit_rows_stay_unit_and_turn_evenly(N, D, lam, seed):
    a, b = random_pair(N, D, seed)
    b = torch.where((a * b).sum(1, keepdim=True) < -0.9, -b, b)
    m = slerp(a, b, lam)
    one = torch.ones(N, dtype=torch.float64)
    torch.testing.assert_close(m.norm(dim=1), one, rtol=1e-12, atol=0)
    theta = (a * b).sum(1).acos()
    torch.testing.assert_close((m * b).sum(1), (lam * theta).cos(), rtol=0, atol=1e-12)


@given(st.floats(1e-12, 1e-4), shares, st.integers(0, 2**31))
def test_a_small_angle_is_a_straight_line(angle, lam, seed):
    a, b = random_pair(5, 8, seed)
    b = F.normalize(b - (a * b).sum(1, keepdim=True) * a, dim=1)
    b = math.cos(angle) * a + math.sin(angle) * b
    want = lam * a + (1 - lam) * b
    # what the arc rises above its chord
    torch.testing.assert_close(slerp(a, b, lam), want, rtol=0, atol=angle**2 + 1e-15)
