"""pairwise_softplus inside torch: opcheck, compile, transforms, autocast, threads, messages."""

import math
import re

import pytest
import torch
from torch.autograd import forward_ad

from mmfast import pairwise_softplus
from mmfast.ops.pairwise_softplus import reference
from mmfast.testing import find_case, random_pair, widest


@pytest.fixture(autouse=True)
def _no_compiled_code_of_another_test():
    torch.compiler.reset()


@pytest.mark.parametrize("needs", [(True, True, True, True), (False, True, False, True)], ids=str)
def test_opcheck(compiled_backend, needs):
    made = find_case("pairwise_softplus", "odd_width").inputs()
    inputs = [made[name].detach() for name in ("q", "k", "scale", "bias")]
    ids = (torch.arange(37), torch.arange(41)) if needs[0] else (None, None)
    torch.library.opcheck(
        torch.ops.mmfast.pairwise_softplus_fwd.default, (*inputs, *ids, *needs, compiled_backend)
    )


def test_compile_without_graph_breaks(backend):
    made = find_case("pairwise_softplus", "own").inputs()
    made["logarithm"] = made.pop("scale").detach().log().requires_grad_()

    def loss(q, k, logarithm, bias, **ids):
        scale = logarithm.exp()
        return 0.1 * pairwise_softplus(2 * q, k, scale, bias, backend=backend, **ids)

    leaves = [made[name] for name in ("q", "k", "logarithm", "bias")]
    want = torch.autograd.grad(loss(**made), leaves)
    value = torch.compile(loss, fullgraph=True)(**made)
    torch.testing.assert_close(value, loss(**made))
    torch.testing.assert_close(torch.autograd.grad(value, leaves), want, rtol=1e-5, atol=1e-5)


def test_compile_takes_changing_numbers_and_sizes(backend):
    compiled = torch.compile(
        lambda q, k, scale, bias: pairwise_softplus(q, k, scale, bias, backend=backend),
        fullgraph=True,
        backend="aot_eager",
    )
    for N, scale, bias in ((5, 1.0, -1.0), (6, 2.5, -2.0), (7, 3.5, 0.5)):
        q, k = random_pair(N, N + 1, dtype=widest(backend), requires_grad=N > 5)
        torch.testing.assert_close(compiled(q, k, scale, bias), reference(q, k, scale, bias))


def test_compile_takes_one_tensor_in_every_place(backend):
    def loss(x, ids, number):
        return pairwise_softplus(x, x, number, number, q_ids=ids, k_ids=ids, backend=backend)

    x, _ = random_pair(9, 1, 4, dtype=widest(backend))
    ids, number = torch.arange(9), torch.tensor(0.7, requires_grad=True)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(f(x, ids, number), (x, number)) for f in (compiled, loss))
    torch.testing.assert_close(got, want)


def test_autocast_casts_as_a_matmul(backend):
    q, k = random_pair(33, 20, 16, dtype=torch.float32)

    def function(q, k):
        with torch.autocast("cpu", torch.bfloat16):
            return pairwise_softplus(q, k, 30.0, -5.0, backend=backend)

    total = function(q, k)
    assert total.dtype == torch.float32
    assert torch.equal(
        total, pairwise_softplus(q.bfloat16(), k.bfloat16(), 30.0, -5.0, backend=backend)
    )
    (dq,) = torch.autograd.grad(total, q)
    assert dq.dtype == torch.float32
    assert dq.abs().sum() > 0
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k), total, rtol=1e-6, atol=1e-6)


def test_func_grad(backend):
    q, k = random_pair(requires_grad=False, dtype=widest(backend))
    scale, bias = (torch.tensor(x, dtype=torch.float64) for x in (1.5, -0.5))

    def loss(q, k, scale, bias, ids):
        total = pairwise_softplus(q, k, scale, bias, q_ids=ids, k_ids=ids[:4], backend=backend)
        return total.square()

    inputs = (q, k, scale, bias)
    ids = torch.arange(5)
    got = torch.func.grad(loss, argnums=(0, 1, 2, 3))(*inputs, ids)
    leaves = [x.clone().requires_grad_() for x in inputs]
    want = torch.autograd.grad(loss(*leaves, ids), leaves)
    torch.testing.assert_close(got, want)


def test_second_derivatives_are_refused(compiled_backend):
    q, k = random_pair(dtype=widest(compiled_backend))
    expected = f'backend="{compiled_backend}" has no second derivative; pass backend="eager"'

    def loss(q):
        return pairwise_softplus(q, k, 1.5, -0.5, backend=compiled_backend)

    (dq,) = torch.autograd.grad(loss(q), q, create_graph=True)
    assert dq.isfinite().all()
    with pytest.raises(NotImplementedError, match=expected):
        dq.sum().backward()
    first = torch.func.grad(loss)
    assert first(q.detach()).shape == q.shape
    with pytest.raises(NotImplementedError, match=expected):
        torch.func.grad(lambda q: first(q).sum())(q.detach())


def test_func_grad_inside_compile_is_right_or_refused(compiled_backend):
    q, k = random_pair(requires_grad=False, dtype=widest(compiled_backend))

    def first(q):
        return torch.func.grad(
            lambda q: pairwise_softplus(q, k, 1.5, -0.5, backend=compiled_backend)
        )(q)

    compiled = torch.compile(first, backend="aot_eager")
    torch.testing.assert_close(compiled(q), first(q))  # traced up to the call
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match='only backend="eager" runs'):
        torch.compile(first, fullgraph=True, backend="aot_eager")(q)


def test_forward_mode_is_refused_and_not_dropped(compiled_backend):
    q, k = random_pair(dtype=widest(compiled_backend), requires_grad=False)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(NotImplementedError, match="jvp"):
            pairwise_softplus(dual, k, 1.0, 0.0, backend=compiled_backend)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_without_gradients(mode, backend):
    q, k = random_pair(dtype=widest(backend))
    with mode():
        total = pairwise_softplus(q, k, 2.0, -1.0, backend=backend)
    assert not total.requires_grad
    torch.testing.assert_close(total.clone(), reference(q.detach(), k.detach(), 2.0, -1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_for_any_number_of_threads(dtype, compiled_backend):
    if compiled_backend == "triton":
        pytest.skip("its kernels know of no CPU threads")
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made = find_case("pairwise_softplus", "many_lanes").inputs(dtype)
            total = pairwise_softplus(**made, backend=compiled_backend)
            results.append((total, *torch.autograd.grad(total, list(made.values()))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


X, Y = torch.ones(5, 3), torch.ones(4, 3)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "q must be a torch.Tensor, got list", {"q": [[1.0]]}),
        (TypeError, "k must be a torch.Tensor, got list", {"k": [[1.0]]}),
        (ValueError, "k must have D=3 columns like q, got 2", {"k": Y[:, :2]}),
        (TypeError, "k must be float32 like q, got bfloat16", {"k": Y.bfloat16()}),
        (ValueError, "k must have no empty side, got [0, 3]", {"k": Y[:0]}),
        (ValueError, "q_ids and k_ids must be given together, got no k_ids",
         {"q_ids": torch.arange(5)}),
        (ValueError, "scale must be finite, got nan", {"scale": math.nan}),
        (TypeError, "bias must be a number or a tensor, got str", {"bias": "1"}),
        (ValueError, "bias must be finite, got inf", {"bias": math.inf}),
        (ValueError, "bias must have one element, got [2]", {"bias": torch.ones(2)}),
        (TypeError, "bias must be floating point, got int64", {"bias": torch.tensor(1)}),
        (ValueError, "bias must be on cpu like q, got meta",
         {"bias": torch.ones((), device="meta")}),
        (ValueError, 'backend must be None or one of "cpp", "triton", "eager", got \'fast\'',
         {"backend": "fast"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_errors(error, message, arguments):
    with pytest.raises(error, match="^" + re.escape("pairwise_softplus: " + message) + "$"):
        pairwise_softplus(**{"q": X, "k": Y, "scale": 1.0, "bias": 0.0, **arguments})


def test_options_are_named_only():
    with pytest.raises(TypeError, match="positional"):
        pairwise_softplus(X, Y, 1.0, 0.0, torch.arange(5))
