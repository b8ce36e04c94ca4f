"""pairwise_softplus against its definition: values, gradients, laws, extremes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from mmfast import pairwise_softplus
from mmfast.ops.pairwise_softplus import reference
from mmfast.testing import (
    LAYOUTS,
    assert_within_budget,
    cases,
    find_case,
    in_double,
    random_pair,
    saved_bytes,
    softplus_magnitudes,
    strided,
    widest,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LEAVES = ("q", "k", "scale", "bias")


def name_of(value):
    return getattr(value, "id", str(value).removeprefix("torch."))


def value_and_gradients(function, made, upstream, **options):
    value = function(**made, **options)
    grads = torch.autograd.grad(value, [made[x] for x in LEAVES], upstream.to(value.dtype))
    return {"sum": value, **{f"d{name}": x for name, x in zip(LEAVES, grads, strict=True)}}


def reordered(q, k, scale, bias, **options):
    """The definition, summed in another order: in float64 its error is not zero by identity."""
    return reference(q.flip(1), k.flip(1), scale, bias, **options)


def test_reference_is_the_definition():
    q, k = random_pair(6, 5, 3, requires_grad=False)
    q_ids, k_ids = torch.tensor([0, 1, 2, 3, 3, 9]), torch.tensor([3, 1, 4, 1, 5])
    for ids in ({}, {"q_ids": q_ids, "k_ids": k_ids}):
        want = 0.0
        for i in range(6):
            for j in range(5):
                if not ids or q_ids[i] != k_ids[j]:
                    dot = sum(float(q[i, d]) * float(k[j, d]) for d in range(3))
                    want += math.log(1 + math.exp(1.7 * dot - 0.4))
        assert reference(q, k, 1.7, -0.4, **ids).item() == pytest.approx(want, rel=1e-14)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", cases("pairwise_softplus", "full"), ids=name_of)
def test_matches_reference(case, dtype, level_backend):
    made = case.inputs(dtype)
    double = in_double(made)
    result = torch.float64 if dtype == torch.float64 else torch.float32
    upstream = torch.tensor(-0.7, dtype=result).double()
    got = value_and_gradients(pairwise_softplus, made, upstream, backend=level_backend)
    eager = value_and_gradients(reordered, made, upstream)
    exact = value_and_gradients(reference, double, upstream)
    sizes = softplus_magnitudes(double, upstream)
    types = {"sum": result, "dq": dtype, "dk": dtype, "dscale": torch.float64}
    for name, x in got.items():
        assert x.dtype == types.get(name, torch.float64)
        eps = torch.finfo(result if name in ("sum", "dbias") else dtype).eps
        if dtype == torch.float64:
            # its judge is float64 too, and errs as much
            eps *= 4
        assert_within_budget(name, x, eager[name], exact[name], eps=eps, magnitude=sizes[name])


@pytest.mark.parametrize("left_out", [False, True])
def test_gradcheck(backend, left_out):
    q, k = random_pair(5, 4, 3)
    scale, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (1.3, -0.6))
    ids = {"q_ids": torch.arange(5), "k_ids": torch.arange(4)} if left_out else {}
    # a factor of its own: that the upstream gradient is multiplied in
    assert torch.autograd.gradcheck(
        lambda *leaves: 1.9 * pairwise_softplus(*leaves, backend=backend, **ids).square(),
        (q, k, scale, bias),
    )


def test_double_backward_of_eager():
    q, k = random_pair(4, 3, 2)
    ids = {"q_ids": torch.arange(4), "k_ids": torch.arange(3)}
    assert torch.autograd.gradgradcheck(
        lambda q, k: pairwise_softplus(q, k, 1.3, -0.5, backend="eager", **ids), (q, k)
    )


class Seen(TorchDispatchMode):
    """How many elements the outputs of every forward op inside the block have."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.mmfast.pairwise_softplus_fwd.default:
            self.sizes = [x.numel() for x in out[1:]]
        return out


@pytest.mark.parametrize(
    "asked", [(), ("q",), ("k",), ("scale",), ("bias",), ("scale", "bias"), ("q", "bias")], ids=str
)
def test_only_asked_gradients(asked, backend):
    made = find_case("pairwise_softplus", "own").inputs()
    for name in LEAVES:
        made[name].requires_grad_(name in asked)
    double = in_double(made)
    with Seen() as seen:
        total = pairwise_softplus(**made, backend=backend)
    if backend != "eager":
        assert seen.sizes == [made[name].numel() if name in asked else 0 for name in LEAVES]
    want = reference(**double)
    torch.testing.assert_close(total.double(), want, rtol=2e-6, atol=0)
    assert total.requires_grad == bool(asked)
    if asked:
        total.backward()
        want.backward()
    for name in LEAVES:
        if name in asked:
            got, expected = made[name].grad.double(), double[name].grad
            torch.testing.assert_close(
                got, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item()
            )
        else:
            assert made[name].grad is None


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_gradients_of_numbers_have_their_shapes_and_dtypes(shape, dtype, backend):
    q, k = random_pair(dtype=torch.float32)
    scale, bias = (torch.full(shape, x, dtype=dtype, requires_grad=True) for x in (2.0, -1.0))
    pairwise_softplus(q, k, scale, bias, backend=backend).backward()
    assert scale.grad.shape == bias.grad.shape == shape
    assert scale.grad.dtype == bias.grad.dtype == dtype


@pytest.mark.parametrize("upstream", [1e-6, 30.0])
def test_float16_gradients_wait_for_their_upstream_gradient(upstream, backend):
    # the sum's own gradient is 1e6, beyond float16, or of terms of 1e-9, below it
    q, k = (torch.ones(n, 8, dtype=torch.float16).requires_grad_() for n in (40, 1000))
    scale, bias = (2000.0, 0.0) if upstream < 1 else (1.0, -8 - math.log(1e9))
    (upstream * pairwise_softplus(q, k, scale, bias, backend=backend)).backward()
    slope = 1 / (1 + math.exp(-8 * scale - bias))
    want = torch.full_like(q, upstream * scale * slope * 1000)
    torch.testing.assert_close(q.grad, want, rtol=2e-3, atol=6e-8)


def test_what_is_kept_for_backward_is_linear(compiled_backend):
    made = find_case("pairwise_softplus", "many_lanes").inputs(torch.bfloat16)
    with saved_bytes(*(made[name] for name in LEAVES)) as saved:
        pairwise_softplus(**made, backend=compiled_backend)
    assert saved.bytes == 4 * (made["q"].numel() + made["k"].numel()) + 16


@pytest.mark.parametrize("how", LAYOUTS)
def test_layouts_do_not_matter(how, backend):
    q, k = random_pair(50, 70, 24, dtype=torch.float32, requires_grad=False)
    q_ids, k_ids = torch.arange(100)[::2], torch.arange(70).flip(0)
    results = []
    for leaves, ids in (
        ([q.clone(), k.clone()], {"q_ids": q_ids.clone(), "k_ids": k_ids}),
        ([strided(q, how), strided(k, how)], {"q_ids": q_ids, "k_ids": k_ids}),
    ):
        leaves = [x.requires_grad_() for x in leaves]
        value = pairwise_softplus(*leaves, 2.0, -1.0, backend=backend, **ids)
        results.append((value, *torch.autograd.grad(value, leaves)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-6)


def test_one_tensor_as_both_sides(backend):
    x, _ = random_pair(9, 1, 4, dtype=widest(backend))
    ids = torch.arange(9)
    got, want = (
        torch.autograd.grad(function(x, x, 2.0, -1.0, q_ids=ids, k_ids=ids), x)
        for function in (lambda *a, **b: pairwise_softplus(*a, backend=backend, **b), reference)
    )
    torch.testing.assert_close(got, want)


def test_nothing_left_is_zero(backend):
    q, k = random_pair(dtype=widest(backend))
    ids = {"q_ids": torch.zeros(5, dtype=torch.int64), "k_ids": torch.zeros(4, dtype=torch.int64)}
    total = pairwise_softplus(q, k, 2.0, 3.0, backend=backend, **ids)
    assert total.item() == 0
    assert all((g == 0).all() for g in torch.autograd.grad(total, (q, k)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_wrong_values_reach_the_sum_unless_left_out(value, level_backend):
    q, k = random_pair(70, 90, 8, dtype=torch.float32, requires_grad=False)
    k[:, 3] = k[:, 3].abs()
    clean = pairwise_softplus(q[1:], k, 2.0, -1.0, backend=level_backend)
    q[0, 3] = value
    got = pairwise_softplus(q, k, 2.0, -1.0, backend=level_backend)
    want = clean if value == -math.inf else torch.tensor(abs(value))
    torch.testing.assert_close(got, want, equal_nan=True)
    ids = {"q_ids": (torch.arange(70) > 0).long(), "k_ids": torch.zeros(90, dtype=torch.int64)}
    left_out = pairwise_softplus(q, k, 2.0, -1.0, backend=level_backend, **ids)
    torch.testing.assert_close(left_out, clean)


sizes = st.integers(1, 40)


@given(sizes, st.integers(2, 40), st.floats(-3, 3), st.floats(-20, 20), st.data())
def test_parts_add_up_and_sides_may_swap(N, M, scale, bias, data):
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    q, k = (torch.randn(n, 4, generator=random, dtype=torch.float64) for n in (N, M))
    cut = data.draw(st.integers(1, M - 1))
    total = pairwise_softplus(q, k, scale, bias)
    parts = [pairwise_softplus(q, part, scale, bias) for part in (k[:cut], k[cut:])]
    torch.testing.assert_close(sum(parts), total, rtol=1e-13, atol=0)
    order = torch.randperm(M, generator=random)
    swapped = pairwise_softplus(k[order], q, scale, bias)
    torch.testing.assert_close(swapped, total, rtol=1e-13, atol=0)
    # softplus(x) - softplus(-x) = x
    other = pairwise_softplus(q, k, -scale, -bias)
    scores = (scale * (q @ k.T) + bias).sum()
    torch.testing.assert_close(total - other, scores, rtol=1e-12, atol=1e-11)
