import subprocess
import sys

import pytest
import torch

from mmfast import sparsemax
from mmfast.ops.sparsemax import reference
from mmfast.testing import find_case, leaf

OP = "sparsemax"


def test_opcheck(compiled_backend):
    x = find_case(OP, "odd_width").inputs()["x"].detach()
    torch.library.opcheck(torch.ops.mmfast.sparsemax_fwd.default, (x, compiled_backend))
    p, g = sparsemax(x), torch.randn_like(x)
    torch.library.opcheck(torch.ops.mmfast.sparsemax_bwd.default, (g, p, compiled_backend))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compile_without_graph_breaks(backend, compiler):
    x = torch.randn(6, 4, 9, requires_grad=True)

    def loss(x):
        return (sparsemax(2 * x, 1, backend=backend) * torch.arange(9)).square().sum()

    value = torch.compile(loss, fullgraph=True, backend=compiler)(x)
    torch.testing.assert_close(value, loss(x))
    (got,), (want,) = torch.autograd.grad(value, x), torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_compile_takes_a_changing_size(backend):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: sparsemax(x, backend=backend), fullgraph=True, backend="aot_eager"
    )
    for N in (5, 6, 7):
        x = torch.randn(N, 8)
        torch.testing.assert_close(compiled(x), reference(x))


def test_compiled_checks_still_speak(backend):
    compiled = torch.compile(
        lambda x: sparsemax(x, 2, backend=backend), fullgraph=True, backend="eager"
    )
    with pytest.raises(Exception, match=r"dim must be in \[-2, 1\] for x \[4, 3\], got 2"):
        compiled(torch.ones(4, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(dtype, backend):
    x = torch.randn(33, 16).to(dtype)
    want = sparsemax(x, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        got = sparsemax(x, backend=backend)
    assert got.dtype == dtype
    assert torch.equal(got, want)


def loss_of(x, backend):
    return (sparsemax(x, backend=backend) * torch.arange(x.shape[-1])).square().sum()


def test_func_grad(backend):
    x = torch.randn(5, 7)
    got = torch.func.grad(lambda x: loss_of(x, backend))(x)
    torch.testing.assert_close(got, *torch.autograd.grad(loss_of(y := leaf(x), backend), y))


def test_func_grad_twice_is_refused(compiled_backend):
    def first(x):
        return torch.func.grad(lambda x: loss_of(x, compiled_backend))(x)

    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.func.grad(lambda x: first(x).sum())(torch.randn(5, 7))


def test_func_grad_inside_compile_is_refused(compiled_backend):
    torch._dynamo.reset()
    compiled = torch.compile(
        torch.func.grad(lambda x: loss_of(x, compiled_backend)),
        fullgraph=True,
        backend="aot_eager",
    )
    with pytest.raises(torch._dynamo.exc.Unsupported, match='only backend="eager" runs'):
        compiled(torch.randn(5, 7))


def test_vmap_is_refused_but_by_eager(compiled_backend):
    x = torch.randn(3, 5, 7)
    got = torch.vmap(lambda x: sparsemax(x, backend="eager"))(x)
    torch.testing.assert_close(got, reference(x))
    with pytest.raises(RuntimeError, match="vmap"):
        torch.vmap(lambda x: sparsemax(x, backend=compiled_backend))(x)


def test_double_backward_is_refused_only_when_it_happens(compiled_backend):
    x = torch.randn(5, 7, requires_grad=True)
    (dx,) = torch.autograd.grad(loss_of(x, compiled_backend), x, create_graph=True)
    assert dx.isfinite().all()
    expected = f'backend="{compiled_backend}" has no second derivative; pass backend="eager"'
    with pytest.raises(NotImplementedError, match=expected):
        dx.sum().backward()


def test_inference_mode(backend):
    x = torch.randn(5, 7)
    with torch.inference_mode():
        p = sparsemax(x, backend=backend)
    assert p.is_inference()
    torch.testing.assert_close(p.clone(), reference(x))


def test_same_bits_for_any_number_of_threads(compiled_backend):
    before = torch.get_num_threads()
    x, g = torch.randn(700, 300, requires_grad=True), torch.randn(700, 300)
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            p = sparsemax(x, backend=compiled_backend)
            found.append((p, *torch.autograd.grad(p, x, g)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)


def test_interrupt_ends_a_long_call():
    # rows that all are one number in memory
    script = """
import os, signal, threading, time, torch
from mmfast import _C
rows, out = torch.zeros(1, 1).expand(2**24, 1), torch.full((2**24, 1), -1.0)
def interrupt():
    time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt).start()
try:
    _C.sparsemax_forward(rows, out, 1)
    time.sleep(1)
except KeyboardInterrupt:
    print(bool((out == 1).any()), bool((out == 1).all()))
"""
    pytest.importorskip("mmfast._C")
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    # some of the rows are done
    assert out.stdout.split() == ["True", "False"]
