"""What the tests that all backends share do not see of the Triton kernel of pairwise_softplus."""

import itertools

import pytest
import torch

from mmfast.ops.pairwise_softplus import reference
from mmfast.testing import find_case

pytest.importorskip("triton")

from mmfast.kernels import pairwise_softplus

# in the interpreter where there is no card (conftest.py asks for it)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TINY = 1  # bytes: chunks as small as they come
NEEDS = list(itertools.product((False, True), repeat=4))


def name_of(value):
    return str(value).removeprefix("torch.")


def problem(id, dtype=torch.float32):
    """Arguments of a case, and in float64 the sum and its gradients."""
    made = find_case("pairwise_softplus", id).inputs(dtype, device=DEVICE)
    names = ("q", "k", "scale", "bias", "q_ids", "k_ids")
    inputs = [None if made.get(name) is None else made[name].detach() for name in names]
    leaves = [x.to(DEVICE, torch.float64).requires_grad_() for x in inputs[:4]]
    value = reference(*leaves, q_ids=inputs[4], k_ids=inputs[5])
    return inputs, (value.detach(), *torch.autograd.grad(value, leaves))


def assert_close(got, want, tolerance):
    for x, y in zip(got, want, strict=True):
        largest = float(y.abs().max())
        torch.testing.assert_close(x.double(), y.double(), rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
def test_chunks_of_any_size_agree(dtype):
    inputs, want = problem("repeated", dtype)
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    for options in ({}, {"workspace_bytes": 128 * 128 * dtype.itemsize}):
        got = pairwise_softplus.forward(*inputs, *NEEDS[-1], library=False, **options)
        # gradients wait in float32 for their upstream gradient
        assert [x.dtype for x in got] == [torch.float32] * 3 + [torch.float64] * 2
        assert_close(got, want, tolerance)


def test_chunks_multiplied_by_the_library():
    # what aten multiplies on a CPU is float32; bfloat16 into float32 needs a card
    inputs, want = problem("own")
    options = {"library": True, "workspace_bytes": TINY}
    assert_close(pairwise_softplus.forward(*inputs, *NEEDS[-1], **options), want, 2e-6)


@pytest.mark.parametrize("needs", NEEDS, ids=str)
def test_whatever_is_asked(needs):
    inputs, want = problem("odd_width")
    got = pairwise_softplus.forward(*inputs, *needs, workspace_bytes=TINY)
    there = [x is not None for x in got]
    assert there == [True, *needs]
    kept = [i for i, x in enumerate(got) if x is not None]
    assert_close([got[i] for i in kept], [want[i] for i in kept], 1e-5)


def test_same_bits_every_time():
    inputs, _ = problem("ragged")
    first, second = (pairwise_softplus.forward(*inputs, *NEEDS[-1], library=False) for _ in "12")
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.skipif(DEVICE == "cpu", reason="a CUDA graph needs a card")
def test_cuda_graph():
    inputs, _ = problem("own", torch.bfloat16)
    inputs[2:4] = [x.to(DEVICE) for x in inputs[2:4]]
    want = pairwise_softplus.forward(*inputs, *NEEDS[-1])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = pairwise_softplus.forward(*inputs, *NEEDS[-1])
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
