"""sparsemax against its definition, exact vectors, exact supports, and the laws it obeys."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmfast import sparsemax
from mmfast.ops.sparsemax import reference
from mmfast.testing import (
    ScoresCase,
    assert_within_budget,
    cases,
    find_case,
    in_double,
    leaf,
    saved_bytes,
)

OP = "sparsemax"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
GOLDEN = np.load(Path(__file__).parent / "golden" / "sparsemax.npz")
GOLDEN_CASES = sorted({key.partition(".")[0] for key in GOLDEN})


def name_of(value):
    return getattr(value, "id", str(value).removeprefix("torch."))


def golden(key):
    return torch.from_numpy(np.array(GOLDEN[key]))


def value_and_gradient(function, x, g, **options):
    p = function(x, **options)
    return {"p": p, "dx": torch.autograd.grad(p, x, g.to(p.dtype))[0]}


def check_case(case, dtype, backend):
    made = case.inputs(dtype)
    g = torch.randn(case.N, case.M).to(dtype).double()
    got = value_and_gradient(sparsemax, made["x"], g, backend=backend)
    eager = value_and_gradient(reference, made["x"], g)
    exact = value_and_gradient(reference, in_double(made)["x"], g)
    assert torch.equal(got["p"] > 0, exact["p"] > 0)
    for name, x in got.items():
        assert x.dtype == dtype
        # what is subtracted from the entries it is subtracted from: p of x, and the mean of g
        size = float(g.abs().max()) if name == "dx" else None
        # the judge of float64 is float64 too, and errs as much
        eps = torch.finfo(dtype).eps * (4 if dtype == torch.float64 else 1)
        assert_within_budget(name, x, eager[name], exact[name], eps=eps, magnitude=size)


def by_counting(row):
    """Weights of a row of fractions by trying every size of the support."""
    down = sorted(row, reverse=True)
    for k in range(len(row), 0, -1):
        tau = (sum(down[:k]) - 1) / k
        if down[k - 1] > tau:
            return [max(x - tau, Fraction(0)) for x in row]
    raise AssertionError("one entry is always in the support")


def test_reference_is_the_definition():
    x = torch.randn(40, 7, dtype=torch.float64)
    want = [[float(p) for p in by_counting([Fraction(v) for v in row])] for row in x.tolist()]
    np.testing.assert_allclose(reference(x), want, rtol=1e-13, atol=1e-15)


def near_ties(rows, width, dtype):
    """Scores with equal entries, entries at the threshold, and their closest neighbours."""
    x = torch.randint(-3, 1, (rows, width)) / torch.tensor([1.0, 2.0, 3.0, 8.0])[:, None, None]
    x = x.reshape(-1, width).to(dtype)
    p = reference(x.double())
    # one entry of each row is moved to where its threshold stands, and some a step off
    tau = (x.double() - p).masked_fill(p == 0, -torch.inf).amax(1)
    x[:, -1] = tau.to(dtype)
    step = torch.randint(-1, 2, x.shape) * (torch.rand(x.shape) < 0.2) * (x != 0)
    bits = {4: torch.int32, 8: torch.int64, 2: torch.int16}[x.element_size()]
    return (x.view(bits) + step.to(bits)).view(dtype)


def test_supports_of_float32_are_exact():
    # x are multiples of 2^-149; the sums that decide fit into the 53 bits of float64
    x = near_ties(60, 9, torch.float32)
    sizes = [sum(p > 0 for p in by_counting([Fraction(v) for v in row])) for row in x.tolist()]
    assert (reference(x) > 0).sum(1).tolist() == sizes


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("width", [2, 5, 64, 300], ids=str)
def test_supports_are_those_of_sorting_in_float64(width, dtype, level_backend):
    x = near_ties(1 + 3000 // width, width, dtype)
    want = reference(x.double())
    got = sparsemax(x, backend=level_backend)
    unlike = (got > 0) != (want > 0)
    if dtype == torch.float64:
        # its sums are rounded, in whatever order: entries within that of the threshold may differ
        assert want[unlike].sum() + got[unlike].sum() <= 1e-13
    else:
        assert not unlike.any()
    equal = x[:, :1] == x
    assert torch.equal(got[equal], got[:, :1].expand_as(x)[equal])


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", cases(OP, "full"), ids=name_of)
def test_matches_reference(case, dtype, level_backend):
    check_case(case, dtype, level_backend)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_matches_reference_at_every_small_width(dtype, level_backend):
    for N in (1, 5):
        for M in range(1, 300):
            for spread in (1e-3, 0.1, 2.0):
                case = ScoresCase("sweep", N, M, "edges of vectors", spread=spread)
                check_case(case, dtype, level_backend)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=name_of)
@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_golden(case, dtype, level_backend):
    z, p, g, dz = (golden(f"{case}.{k}") for k in ("z", "p", "upstream", "grad_z_analytic"))
    x = leaf(z.to(dtype))
    got = value_and_gradient(sparsemax, x, g, backend=level_backend)
    # scores around 1e6, as one case has them, keep six digits less
    eps = torch.finfo(dtype).eps * max(1.0, float(z.abs().max()))
    if eps > 0.01:
        pytest.skip("scores that float32 cannot tell apart")
    torch.testing.assert_close(got["p"].double(), p, rtol=0, atol=4 * eps)
    assert (got["p"] > 0).sum(1).tolist() == golden(f"{case}.support_size").tolist()
    torch.testing.assert_close(got["dx"].double(), dz, rtol=0, atol=1e3 * torch.finfo(dtype).eps)


def test_golden_ties_are_where_autograd_of_the_published_code_differs(backend):
    z, g = golden("ties_4x6.z").requires_grad_(), golden("ties_4x6.upstream")
    got = value_and_gradient(sparsemax, z, g, backend=backend)["dx"]
    at_tau = golden("ties_4x6.z") == torch.tensor([[5 / 6], [1.5], [0.0], [0.0]])
    tied = at_tau.any(1)
    off = (got - golden("ties_4x6.grad_z_autograd_reference")).abs().amax(1)
    assert torch.equal(off > 1e-3, tied)


def test_an_entry_at_the_threshold_has_no_weight_and_no_gradient(level_backend):
    x = torch.tensor([[1.0, 0.0, 0.5, -3.0], [0.0, -1.0, -1.0, -1.0]], requires_grad=True)
    # tau = 0.25, then -1
    p = sparsemax(x, backend=level_backend)
    assert p.tolist() == [[0.75, 0.0, 0.25, 0.0], [1.0, 0.0, 0.0, 0.0]]
    (dx,) = torch.autograd.grad(p, x, torch.tensor([[1.0, 5.0, 3.0, 7.0]]).expand(2, 4))
    assert dx.tolist() == [[-1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_any_dimension(dim, dtype, backend):
    x = torch.randn(4, 5, 6).to(dtype).requires_grad_()
    g = torch.randn(4, 5, 6).to(dtype)
    got = sparsemax(x, dim, backend=backend)
    rows = leaf(x.movedim(dim, -1).reshape(-1, x.shape[dim]))
    want = reference(rows)
    wide = g.movedim(dim, -1).reshape(rows.shape)
    torch.testing.assert_close(got.movedim(dim, -1).reshape(rows.shape), want)
    (dx,), (d_rows,) = torch.autograd.grad(got, x, g), torch.autograd.grad(want, rows, wide)
    torch.testing.assert_close(dx.movedim(dim, -1).reshape(rows.shape), d_rows)


@pytest.mark.parametrize("shape", [(7,), (0, 7), (2, 0, 7), (7, 1), (1, 7)], ids=str)
def test_other_shapes(shape, backend):
    x = torch.randn(shape, requires_grad=True)
    p = sparsemax(x, backend=backend)
    assert p.shape == shape
    torch.testing.assert_close(p.sum(-1), torch.ones(shape[:-1]))
    p.square().sum().backward()
    assert x.grad.shape == shape


@pytest.mark.parametrize("backend", ["cpp", "eager"])
@pytest.mark.parametrize("dim", [0, 1])
def test_gradcheck(backend, dim):
    # tie-free, and no entry near its threshold
    x = torch.tensor([[0.1, 0.9, -0.4], [2.0, 0.2, 0.1]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: sparsemax(x, dim, backend=backend), x)


def test_double_backward_of_eager():
    x = torch.tensor([[0.1, 0.9, -0.4], [0.3, 0.2, 0.1]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: sparsemax(x, backend="eager").square(), x)


def test_only_the_weights_are_kept_for_backward(compiled_backend):
    x = find_case(OP, "aligned").inputs()["x"]
    with saved_bytes(x) as saved:
        p = sparsemax(x, backend=compiled_backend)
    assert saved.bytes == p.numel() * p.element_size()


def test_no_gradient_at_all(backend):
    assert not sparsemax(torch.randn(4, 3), backend=backend).requires_grad


# --- laws --------------------------------------------------------------------------------------

sizes = st.integers(1, 60)
spreads = st.sampled_from([1e-3, 0.1, 1.0, 30.0])


def scores(N, M, spread, seed):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(N, M, generator=random, dtype=torch.float64) * spread


@given(sizes, sizes, spreads, st.integers(0, 2**31))
def test_no_point_of_the_simplex_is_nearer(N, M, spread, seed):
    x = scores(N, M, spread, seed)
    p = sparsemax(x)
    torch.testing.assert_close(p.sum(1), torch.ones(N, dtype=torch.float64), rtol=0, atol=1e-13)
    assert (p >= 0).all()
    # the optimality conditions: what is subtracted is one number on the support, not less outside
    taken = x - p
    tau = torch.where(p > 0, taken, -torch.inf).amax(1, keepdim=True)
    assert ((taken - tau).abs() <= 1e-12)[p > 0].all()
    assert (x - tau <= 1e-12)[p == 0].all()


@given(sizes, sizes, spreads, st.integers(0, 2**31))
def test_order_and_a_common_shift_change_nothing(N, M, spread, seed):
    x = scores(N, M, spread, seed)
    p = sparsemax(x)
    order = torch.randperm(M, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(sparsemax(x[:, order]), p[:, order], rtol=0, atol=1e-14)
    torch.testing.assert_close(sparsemax(x + 3.7), p, rtol=0, atol=1e-13)


@given(sizes, sizes, spreads, st.integers(0, 2**31))
def test_weights_are_their_own_weights(N, M, spread, seed):
    p = sparsemax(scores(N, M, spread, seed))
    torch.testing.assert_close(sparsemax(p), p, rtol=0, atol=1e-14)


@given(sizes, sizes, spreads, st.integers(0, 2**31))
def test_gradients_sum_to_zero_and_leave_a_common_shift_out(N, M, spread, seed):
    x, g = scores(N, M, spread, seed).requires_grad_(), scores(N, M, 1.0, seed + 1)
    p = sparsemax(x)
    (dx,) = torch.autograd.grad(p, x, g, retain_graph=True)
    (shifted,) = torch.autograd.grad(p, x, g + 2.5)
    torch.testing.assert_close(dx.sum(1), torch.zeros(N, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(shifted, dx, rtol=0, atol=1e-13)
    assert (dx[p == 0] == 0).all()
