"""Rows of a constant k: the gradient is made in the forward pass, from the mean of k."""

import math

import pytest
import torch
from torch.autograd import forward_ad

from mmfast import _dispatch, pairwise_lse
from mmfast.ops.pairwise_lse import reference, softmax_mean
from mmfast.testing import (
    assert_within_budget,
    cases,
    cpu_level,
    find_case,
    in_double,
    lse_magnitudes,
    random_pair,
    saved_bytes,
    widest,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LEVELS = [] if _dispatch.core_error else _dispatch.core.isa_levels()


def name_of(value):
    return getattr(value, "id", str(value).removeprefix("torch."))


@pytest.fixture(params=LEVELS)
def level(request):
    with cpu_level(request.param):
        yield request.param


def rows_and_gradients(function, made, g, **options):
    made = {**made, "k": made["k"].detach()}
    rows = function(**made, **options)
    # an empty row is -inf: times its upstream it would be NaN, so gradients are given directly
    dq, dscale = torch.autograd.grad(rows, (made["q"], made["scale"]), g.to(rows.dtype))
    return {"rows": rows, "dq": dq, "dscale": dscale}


def check(made):
    """Rows and gradients of the C++ within the budgets of test_pairwise_lse.py."""
    q, double = made["q"], in_double(made)
    result = torch.float64 if q.dtype == torch.float64 else torch.float32
    g = torch.randn(len(q), dtype=result).double()
    got = rows_and_gradients(pairwise_lse, made, g, backend="cpp")
    # summed in another order: in float64 its error is not zero by identity
    flipped = {**made, "k": made["k"].flip(1), "q": made["q"].detach().flip(1).requires_grad_()}
    eager = rows_and_gradients(reference, flipped, g)
    eager["dq"] = eager["dq"].flip(1)
    exact = rows_and_gradients(reference, double, g)
    none = torch.zeros(len(made["k"]), dtype=torch.float64)
    sizes = lse_magnitudes(**double, rows=exact["rows"], columns=none, upstream=(g, none))
    for name, x in got.items():
        assert x.dtype == {"rows": result, "dq": q.dtype, "dscale": torch.float64}[name]
        eps = torch.finfo(result if name == "rows" else q.dtype).eps
        if q.dtype == torch.float64:
            eps *= 4
        if q.dtype == torch.bfloat16 and name == "rows":
            eps *= 16
        assert_within_budget(name, x, eager[name], exact[name], eps=eps, magnitude=sizes[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", cases("pairwise_lse", "full"), ids=name_of)
def test_matches_reference(case, dtype, level):
    check(case.inputs(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
@pytest.mark.parametrize(("N", "M"), [(70, 1500), (450, 300)], ids=str)
@pytest.mark.parametrize("order", ["growing", "falling", "mixed"])
def test_references_that_rise_at_every_visit(order, N, M, dtype, level):
    # from one block of keys to the next scores grow by up to 100 times what a reference lets come
    k = torch.stack([torch.arange(M), torch.ones(M)], 1).to(dtype)
    k = {"growing": k, "falling": k.flip(0), "mixed": k[torch.randperm(M)]}[order]
    q = torch.stack([torch.linspace(-40, 40, N), torch.linspace(1e3, -1e3, N)], 1).to(dtype)
    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    check({"q": q.requires_grad_(), "k": k, "scale": scale})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize(("N", "M"), [(5, 700), (700, 70)], ids=str)
def test_the_coldest_temperature_picks_a_key(N, M, dtype, level):
    q, k = (torch.nn.functional.normalize(x, dim=1).to(dtype) for x in random_pair(N, M, 16))
    q = (k[torch.arange(N) % M].detach()).requires_grad_()
    scale = torch.tensor(1e6, requires_grad=True)
    rows = pairwise_lse(q, k.detach(), scale, backend="cpp")
    dq, dscale = torch.autograd.grad(rows.sum(), (q, scale))
    best = (q.double() @ k.double().T).max(1)
    torch.testing.assert_close(rows.double(), 1e6 * best.values, rtol=1e-5, atol=1)
    torch.testing.assert_close(dq, (1e6 * k[best.indices]).to(dtype))
    # as everywhere, the weights of bfloat16 keys are rounded to it
    rounding = 3e-3 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(dscale.double(), best.values.sum(), rtol=rounding, atol=0)


@pytest.mark.parametrize("how", ["ids", "mask"])
def test_everything_left_out(how, level):
    q, k = random_pair(20, 30, 4, dtype=torch.float32)
    same, other = torch.zeros(20, dtype=torch.int64), torch.zeros(30, dtype=torch.int64)
    scale = torch.tensor(2.0, requires_grad=True)
    out = {"q_ids": same, "k_ids": other} if how == "ids" else {"mask": torch.zeros(20, 30) > 0}
    rows = pairwise_lse(q, k.detach(), scale, backend="cpp", **out)
    assert rows.eq(-math.inf).all()
    rows.backward(torch.ones(20))
    assert q.grad.eq(0).all()
    assert scale.grad == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize(("N", "M"), [(70, 400), (400, 70)], ids=str)
def test_a_wrong_row_keeps_to_itself(N, M, value, dtype, level):
    q, k = random_pair(N, M, 8, dtype=dtype, requires_grad=False)
    q[33, 3] = value
    made = {"q": q.requires_grad_(), "k": k, "scale": torch.tensor(2.0, requires_grad=True)}
    got = rows_and_gradients(pairwise_lse, made, torch.ones(N), backend="cpp")
    want = rows_and_gradients(reference, made, torch.ones(N))
    torch.testing.assert_close(got["rows"], want["rows"], equal_nan=True)
    rounding = {"rtol": 0, "atol": 0.1 if dtype == torch.bfloat16 else 1e-4}
    torch.testing.assert_close(got["dq"], want["dq"], equal_nan=True, **rounding)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_a_wrong_key_reaches_those_who_see_it(value, level):
    q, k = random_pair(70, 400, 8, dtype=torch.float32, requires_grad=False)
    k[[41, 300], 3] = value
    options = {"q_ids": torch.arange(70) % 2, "k_ids": torch.arange(400) % 2}
    options["k_ids"][300] = 1
    got = pairwise_lse(q.requires_grad_(), k, 2.0, **options, backend="cpp")
    want = reference(q, k, 2.0, **options)
    torch.testing.assert_close(got, want, equal_nan=True)
    assert got[1::2].isfinite().all()


@pytest.mark.parametrize("left_out", [False, True])
def test_softmax_mean(left_out, level_backend):
    q, k = random_pair(9, 7, 5, dtype=widest(level_backend))
    ids = {"q_ids": torch.arange(9) % 3, "k_ids": torch.arange(7) % 3} if left_out else {}
    if left_out:
        ids["q_ids"][4], ids["k_ids"][:] = 0, 0  # rows of id 0 have no key
    scale = torch.tensor(2.0, dtype=torch.float64)
    expected = reference(q, k, scale, **ids)
    (gradient,) = torch.autograd.grad(expected, q, torch.ones_like(expected))
    rows, mean = softmax_mean(q, k, scale, **ids, backend=level_backend)
    torch.testing.assert_close(rows, expected)
    torch.testing.assert_close(mean, gradient / scale)
    assert not rows.requires_grad
    assert not mean.requires_grad


def test_what_is_kept_is_the_mean_and_not_the_keys():
    made = find_case("pairwise_lse", "many_lanes").inputs()
    k = made.pop("k").detach()
    with saved_bytes(made["q"], made["scale"]) as saved:
        pairwise_lse(**made, k=k, backend="cpp")
    assert saved.bytes == 4 * made["q"].numel()


@pytest.mark.parametrize("id", ["many_lanes", "tall"])
def test_same_bits_for_any_number_of_threads(id):
    made, results = find_case("pairwise_lse", id).inputs(), []
    made["q"] = torch.cat([made["q"].detach()] * 2).requires_grad_()
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            g = torch.ones(len(made["q"]))
            results.append(rows_and_gradients(pairwise_lse, made, g, backend="cpp"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, other[name]) for name, x in results[0].items())


# under torch's own machinery


@pytest.mark.parametrize("left_out", [False, True])
def test_opcheck(compiled_backend, left_out):
    made = find_case("pairwise_lse", "mask_and_ids" if left_out else "odd_width").inputs()
    inputs = [made[name].detach() for name in ("q", "k", "scale")]
    inputs += [made.get(name) for name in ("q_ids", "k_ids", "mask")]
    torch.library.opcheck(torch.ops.mmfast.pairwise_lse_mean.default, (*inputs, compiled_backend))


def test_gradcheck():
    q, k = random_pair(5, 4, 3)
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(5, 4) < 0.8
    mask[:, 0] = True

    def function(q, scale):
        return pairwise_lse(q, k.detach(), scale, mask=mask, backend="cpp")

    assert torch.autograd.gradcheck(function, (q, scale))


@pytest.mark.parametrize("asked", ["q", "scale"])
def test_compile_without_graph_breaks(asked, backend):
    torch._dynamo.reset()
    made = find_case("pairwise_lse", "mask_and_ids").inputs()
    for name in ("q", "k", "scale"):
        made[name].requires_grad_(name == asked)

    def loss(scale, **others):
        # an empty row is -inf, and clamped it passes no gradient on
        return pairwise_lse(**others, scale=2 * scale, backend=backend).clamp(min=-50).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, want = compiled(**made), loss(**made)
    torch.testing.assert_close(got, want)
    gradients = (torch.autograd.grad(x, made[asked]) for x in (got, want))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("asked", ["q", "k", "scale"])
def test_func_grad(asked, compiled_backend):
    q, k = random_pair(requires_grad=False, dtype=widest(compiled_backend))
    made = {"q": q, "k": k, "scale": torch.tensor(1.5, dtype=torch.float64)}

    def loss(x, **options):
        return pairwise_lse(**{**made, asked: x}, **options).square().sum()

    got = torch.func.grad(lambda x: loss(x, backend=compiled_backend))(made[asked])
    torch.testing.assert_close(
        got, torch.func.grad(lambda x: loss(x, backend="eager"))(made[asked])
    )


def test_second_derivatives_and_forward_mode_are_refused():
    q, k = random_pair()
    loss = pairwise_lse(q, k.detach(), backend="cpp").square().sum()
    (dq,) = torch.autograd.grad(loss, q, create_graph=True)
    with pytest.raises(NotImplementedError, match='backend="cpp" has no second derivative'):
        dq.sum().backward()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(NotImplementedError, match="jvp"):
            pairwise_lse(dual, k.detach(), backend="cpp")
