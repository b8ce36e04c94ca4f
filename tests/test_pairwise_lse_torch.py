import signal
import subprocess
import sys

import pytest
import torch
from torch.autograd import forward_ad

from mmfast import _dispatch, pairwise_lse
from mmfast.ops.pairwise_lse import reference
from mmfast.testing import find_case, random_pair, widest


@pytest.fixture(autouse=True)
def _no_compiled_code_of_another_test():
    torch.compiler.reset()


@pytest.mark.parametrize("left_out", [False, True])
@pytest.mark.parametrize("columns", [False, True])
def test_opcheck(compiled_backend, columns, left_out):
    made = find_case("pairwise_lse", "mask_and_ids" if left_out else "odd_width").inputs()
    q, k, scale = (made[name].detach() for name in ("q", "k", "scale"))
    ids = [made.get(name) for name in ("q_ids", "k_ids", "mask")]
    inputs = (q, k, scale, *ids, columns, compiled_backend)
    torch.library.opcheck(torch.ops.mmfast.pairwise_lse_fwd.default, inputs)
    rows, sums = torch.ops.mmfast.pairwise_lse_fwd(*inputs)
    g = [torch.randn_like(rows), torch.randn_like(sums) if columns else None]
    for needs in ((True, True, True), (False, True, False), (True, False, True)):
        torch.library.opcheck(
            torch.ops.mmfast.pairwise_lse_bwd.default,
            (*g, q, k, scale, *ids, rows, sums, *needs, compiled_backend),
        )


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_compile_without_graph_breaks(backend, compiler):
    made = find_case("pairwise_lse", "mask_and_ids").inputs()
    made["logarithm"] = made.pop("scale").detach().log().requires_grad_()

    def loss(q, k, logarithm, **options):
        rows, columns = pairwise_lse(
            2 * q, k, logarithm.exp(), columns=True, backend=backend, **options
        )
        # an empty row is -inf, and clamped it passes no gradient on
        return rows.clamp(min=-50).sum() + columns.clamp(min=-50).square().mean()

    names = ("q", "k", "logarithm")
    want = torch.autograd.grad(loss(**made), [made[name] for name in names])
    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    value = compiled(**made)
    torch.testing.assert_close(value, loss(**made))
    got = torch.autograd.grad(value, [made[name] for name in names])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_compile_takes_a_changing_float_scale_and_size(backend):
    compiled = torch.compile(
        lambda q, k, scale: pairwise_lse(q, k, scale, backend=backend),
        fullgraph=True,
        backend="aot_eager",
    )
    for N, scale in ((5, 1.0), (6, 2.5), (7, 3.5)):
        q, k = random_pair(N, N + 1, dtype=widest(backend))
        torch.testing.assert_close(compiled(q, k, scale), reference(q, k, scale))


def test_compile_without_gradients(backend):
    q, k = random_pair(dtype=widest(backend), requires_grad=False)
    compiled = torch.compile(pairwise_lse, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, 2.0, backend=backend), reference(q, k, 2.0))


@pytest.mark.parametrize("own", [False, True], ids=["all pairs", "no own pairs"])
def test_compile_takes_one_tensor_as_both_sides(own, backend):
    def loss(x, ids):
        options = {"q_ids": ids, "k_ids": ids} if own else {}
        return pairwise_lse(x, x, 2.0, backend=backend, **options).sum()

    x, _ = random_pair(9, 1, 4, dtype=widest(backend))
    ids = torch.arange(9)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x, ids), x)
    torch.testing.assert_close(got, torch.autograd.grad(loss(x, ids), x))


def test_compiled_checks_still_speak(backend):
    compiled = torch.compile(
        lambda q, k: pairwise_lse(q, k, backend=backend), fullgraph=True, backend="eager"
    )
    with pytest.raises(Exception, match="k must have D=3 columns like q, got 2"):
        compiled(torch.ones(4, 3), torch.ones(4, 2))


def test_autocast_casts_as_a_matmul(backend):
    q, k = random_pair(33, 20, 16, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        rows = pairwise_lse(q, k, 30.0, backend=backend)
        # autocast already decides for a tower that is half precision
        mixed = pairwise_lse(q.bfloat16(), k, 30.0, backend=backend)
        double = pairwise_lse(q.double(), k.double(), 30.0, backend=backend)
    assert rows.dtype == torch.float32
    assert double.dtype == torch.float64
    want = pairwise_lse(q.bfloat16(), k.bfloat16(), 30.0, backend=backend)
    assert torch.equal(rows, want)
    assert torch.equal(mixed, want)
    (dq,) = torch.autograd.grad(rows.sum(), q)
    assert dq.dtype == torch.float32
    assert dq.abs().sum() > 0


def test_compiled_autocast(backend):
    q, k = random_pair(33, 20, 16, dtype=torch.float32)

    def function(q, k):
        with torch.autocast("cpu", torch.bfloat16):
            return pairwise_lse(q, k, 30.0, backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k), function(q, k), rtol=1e-6, atol=1e-6)


def test_func_grad(backend):
    q, k = random_pair(requires_grad=False, dtype=widest(backend))
    scale = torch.tensor(1.5, dtype=torch.float64)

    def loss(q, k, scale, ids):
        rows, columns = pairwise_lse(
            q, k, scale, q_ids=ids, k_ids=ids[:4], columns=True, backend=backend
        )
        return rows.sum() + columns.square().sum()

    ids = torch.arange(5)
    got = torch.func.grad(loss, argnums=(0, 1, 2))(q, k, scale, ids)
    leaves = [x.clone().requires_grad_() for x in (q, k, scale)]
    loss(*leaves, ids).backward()
    torch.testing.assert_close(got, tuple(x.grad for x in leaves))


def test_func_grad_twice_is_refused(compiled_backend):
    q, k = random_pair(requires_grad=False, dtype=widest(compiled_backend))

    def first(q):
        return torch.func.grad(lambda q: pairwise_lse(q, k, backend=compiled_backend).sum())(q)

    assert first(q).shape == q.shape
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.func.grad(lambda q: first(q).sum())(q)


def test_func_grad_inside_compile_is_right_or_refused(compiled_backend):
    q, k = random_pair(requires_grad=False, dtype=widest(compiled_backend))

    def first(q):
        return torch.func.grad(lambda q: pairwise_lse(q, k, backend=compiled_backend).sum())(q)

    for full in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(first, fullgraph=full, backend="aot_eager")
        if full:
            with pytest.raises(torch._dynamo.exc.Unsupported, match='only backend="eager" runs'):
                compiled(q)
        else:  # traced up to the call, which then runs as it is
            torch.testing.assert_close(compiled(q), first(q))


def test_double_backward_is_refused_only_when_it_happens(compiled_backend):
    q, k = random_pair(dtype=widest(compiled_backend))
    loss = pairwise_lse(q, k, backend=compiled_backend).sum()
    (dq,) = torch.autograd.grad(loss, q, create_graph=True)
    assert dq.isfinite().all()
    expected = f'backend="{compiled_backend}" has no second derivative; pass backend="eager"'
    with pytest.raises(NotImplementedError, match=expected):
        dq.sum().backward()


# torch 2.14 warns of its own forward mode
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_forward_mode_is_refused_and_not_dropped(compiled_backend):
    q, k = random_pair(dtype=widest(compiled_backend), requires_grad=False)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(NotImplementedError, match="jvp"):
            pairwise_lse(dual, k, backend=compiled_backend)


def test_inference_mode(backend):
    q, k = random_pair(requires_grad=False, dtype=widest(backend))
    with torch.inference_mode():
        rows = pairwise_lse(q, k, 2.0, backend=backend)
    assert rows.is_inference()
    torch.testing.assert_close(rows.clone(), reference(q, k, 2.0))


def test_same_bits_for_any_number_of_threads(compiled_backend):
    if compiled_backend == "triton":
        pytest.skip("its kernels know of no CPU threads")
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made = find_case("pairwise_lse", "many_lanes").inputs()
            outs = pairwise_lse(**made, columns=True, backend=compiled_backend)
            leaves = [made[name] for name in ("q", "k", "scale")]
            grads = torch.autograd.grad(outs, leaves, [x.detach() for x in outs])
            results.append((*outs, *grads))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            assert torch.equal(x, y)


@pytest.mark.skipif(_dispatch.core_error is not None, reason=str(_dispatch.core_error))
def test_interrupt_ends_a_long_call():
    # alone and uninterrupted the call takes half a minute or more on one thread
    script = """
import os, signal, threading, time, torch, mmfast
torch.set_num_threads(1)
q = torch.randn(200_000, 64)
def interrupt():
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt).start()
try:
    mmfast.pairwise_lse(q, q, backend="cpp")
    print("ran to its end")
except KeyboardInterrupt:
    print("interrupted")
    # and the core still works
    rows = mmfast.pairwise_lse(q[:1] * 0, q[:1], backend="cpp")
    print(torch.allclose(rows, torch.zeros(1), atol=1e-6))
"""
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines() == ["interrupted", "True"]
