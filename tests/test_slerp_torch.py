import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from mmfast import slerp
from mmfast.ops.slerp import reference
from mmfast.testing import find_case

NAMES = ("a", "b", "lam")


def pair(N=5, D=3, *, requires_grad=False):
    return (F.normalize(torch.randn(N, D), dim=1).requires_grad_(requires_grad) for _ in range(2))


@pytest.mark.parametrize("lam", ["rows", "one"])
def test_opcheck(compiled_backend, lam):
    made = find_case("slerp", "odd_width").inputs()
    a, b = (made[name].detach() for name in NAMES[:2])
    lam = made["lam"].detach().float()[: None if lam == "rows" else 1]
    inputs = (a, b, lam, compiled_backend)
    torch.library.opcheck(torch.ops.mmfast.slerp_fwd.default, inputs)
    g = torch.randn_like(a)
    for needs in ((True, True, True), (False, True, False), (True, False, True)):
        torch.library.opcheck(
            torch.ops.mmfast.slerp_bwd.default, (g, a, b, lam, *needs, compiled_backend)
        )


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_compile_without_graph_breaks(backend, compiler):
    if (backend, compiler) == ("eager", "inductor"):
        pytest.skip("plain torch: nothing of ours in a minute and a half of C++ compilation")
    made = find_case("slerp", "odd_width").inputs()

    def loss(a, b, lam):
        return slerp(F.normalize(a, dim=1), b, lam.sigmoid(), backend=backend).square().sum()

    want = torch.autograd.grad(loss(**made), [made[name] for name in NAMES])
    value = torch.compile(loss, fullgraph=True, backend=compiler)(**made)
    torch.testing.assert_close(value, loss(**made))
    got = torch.autograd.grad(value, [made[name] for name in NAMES])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_compile_takes_a_changing_float_lam_and_size(backend):
    # every number compiles anew, and the other backends' runs count
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda a, b, lam: slerp(a, b, lam, backend=backend), fullgraph=True, backend="aot_eager"
    )
    for N, lam in ((5, 0.25), (6, 0.5), (7, 0.75)):
        a, b = pair(N, 8)
        torch.testing.assert_close(compiled(a, b, lam), reference(a, b, lam))


def test_compile_takes_one_tensor_as_both_sides(backend):
    def loss(x):
        return slerp(x, x, 0.3, backend=backend).square().sum()

    x, _ = pair(9, 4, requires_grad=True)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x), x)
    torch.testing.assert_close(got, torch.autograd.grad(loss(x), x))


def test_compiled_checks_still_speak(backend):
    compiled = torch.compile(
        lambda a, b: slerp(a, b, 0.5, backend=backend), fullgraph=True, backend="eager"
    )
    with pytest.raises(Exception, match=r"b must be \[N=4, D=3\] like a, got \[4, 2\]"):
        compiled(torch.ones(4, 3), torch.ones(4, 2))


def test_autocast_changes_nothing(backend):
    a, b = pair(33, 16)
    want = slerp(a, b, 0.3, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        got = slerp(a, b, 0.3, backend=backend)
        with pytest.raises(TypeError, match="b must be float32 like a, got bfloat16"):
            slerp(a, b.bfloat16(), 0.3, backend=backend)
    assert got.dtype == torch.float32
    assert torch.equal(got, want)


def test_func_grad(backend):
    a, b = pair()
    lam = torch.tensor(0.3, dtype=torch.float64)

    def loss(a, b, lam):
        return (slerp(a, b, lam, backend=backend) * torch.arange(3)).square().sum()

    got = torch.func.grad(loss, argnums=(0, 1, 2))(a, b, lam)
    leaves = [x.clone().requires_grad_() for x in (a, b, lam)]
    loss(*leaves).backward()
    torch.testing.assert_close(got, tuple(x.grad for x in leaves))


def test_func_grad_twice_is_refused(compiled_backend):
    a, b = pair()

    def first(a):
        return torch.func.grad(lambda a: slerp(a, b, 0.3, backend=compiled_backend).sum())(a)

    assert first(a).shape == a.shape
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.func.grad(lambda a: first(a).sum())(a)


def test_func_grad_inside_compile_is_right_or_refused(compiled_backend):
    a, b = pair()

    def first(a):
        return torch.func.grad(lambda a: slerp(a, b, 0.3, backend=compiled_backend).sum())(a)

    for full in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(first, fullgraph=full, backend="aot_eager")
        if full:
            with pytest.raises(torch._dynamo.exc.Unsupported, match='only backend="eager" runs'):
                compiled(a)
        else:  # traced up to the call, which then runs as it is
            torch.testing.assert_close(compiled(a), first(a))


def test_double_backward_is_refused_only_when_it_happens(compiled_backend):
    a, b = pair(requires_grad=True)
    loss = slerp(a, b, 0.3, backend=compiled_backend).sum()
    (da,) = torch.autograd.grad(loss, a, create_graph=True)
    assert da.isfinite().all()
    expected = f'backend="{compiled_backend}" has no second derivative; pass backend="eager"'
    with pytest.raises(NotImplementedError, match=expected):
        da.sum().backward()


def test_inference_mode(backend):
    a, b = pair()
    with torch.inference_mode():
        out = slerp(a, b, 0.3, backend=backend)
    assert out.is_inference()
    torch.testing.assert_close(out.clone(), reference(a, b, 0.3))


def test_same_bits_for_any_number_of_threads(compiled_backend):
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made = find_case("slerp", "chunks").inputs()
            out = slerp(**made, backend=compiled_backend)
            grads = torch.autograd.grad(out, [made[name] for name in NAMES], out.detach())
            results.append((out, *grads))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            assert torch.equal(x, y)


def test_interrupt_ends_a_long_call():
    # rows that all are one row in memory: a long call without the memory of one
    script = """
import os, signal, threading, time, torch
from mmfast import _C
row, lam = torch.full((1, 64), 0.1), torch.tensor([0.3])
rows, sums = row.expand(2**28, 64), torch.zeros(1).expand(2**28)
def interrupt():
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt).start()
try:
    # every row's result in one place: what stands there does not matter
    _C.slerp_backward(rows, rows, rows, lam, None, None, sums, 1)
    print("ran to its end")
except KeyboardInterrupt:
    print("interrupted")
"""
    pytest.importorskip("mmfast._C")
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines() == ["interrupted"]
