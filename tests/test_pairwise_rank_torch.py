import pytest
import torch

from mmfast import pairwise_rank
from mmfast.testing import random_pair, widest


@pytest.fixture(autouse=True)
def _no_compiled_code_of_another_test():
    torch.compiler.reset()


@pytest.mark.parametrize("given", [False, True], ids=["bare", "all"])
def test_opcheck(given, compiled_backend):
    q, k = random_pair(17, 13, 5, dtype=torch.float32, requires_grad=False)
    others = (torch.zeros(17), torch.arange(17), torch.arange(13)) if given else (None,) * 3
    inputs = (q, k, *others, compiled_backend)
    torch.library.opcheck(torch.ops.mmfast.pairwise_rank.default, inputs)


def test_compile_without_graph_breaks(backend):
    # to inductor a compiled op is one call
    compiler = "inductor" if backend == "eager" else "aot_eager"
    q, k = random_pair(40, 60, 5, dtype=widest(backend))
    threshold = torch.zeros(40)

    def hardest(q, k):
        largest, index, above = pairwise_rank(2 * q, k, threshold=threshold, backend=backend)
        return (largest * above).sum() + k[index].square().sum()

    compiled = torch.compile(hardest, fullgraph=True, backend=compiler)
    for got, want in zip(
        *((f(q, k), *torch.autograd.grad(f(q, k), (q, k))) for f in (compiled, hardest)),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_func_grad(backend):
    q, k = random_pair(9, 7, 4, dtype=widest(backend), requires_grad=False)

    def loss(q, k):
        return pairwise_rank(q, k, backend=backend)[0].sum()

    index = (q @ k.T).argmax(1)
    torch.testing.assert_close(torch.func.grad(loss)(q, k), k[index])


def test_inference_mode_and_one_tensor_twice(backend):
    q, _ = random_pair(30, 1, 4, dtype=widest(backend))
    rows = torch.arange(30)
    options = {"q_ids": rows, "k_ids": rows, "backend": backend}
    largest, index, _ = pairwise_rank(q, q, **options)
    with torch.inference_mode():
        for x, want in zip(pairwise_rank(q, q, **options)[:2], (largest, index), strict=True):
            assert torch.equal(x, want)
    (dq,) = torch.autograd.grad(largest.sum(), q)
    want = q[index].detach().index_add(0, index, q.detach())
    torch.testing.assert_close(dq, want)


def test_autocast_casts_as_a_matmul(backend):
    q, k = random_pair(33, 40, 16, dtype=torch.float32)
    want = pairwise_rank(q.bfloat16(), k.bfloat16(), backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        got = pairwise_rank(q, k, backend=backend)
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)


def test_one_tensor_twice_under_compile(backend):
    q, _ = random_pair(30, 1, 4, dtype=widest(backend))

    def hardest(q):
        rows = torch.arange(30)
        return pairwise_rank(q, q, q_ids=rows, k_ids=rows, backend=backend)[0].sum()

    compiled = torch.compile(hardest, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(f(q), q)[0] for f in (compiled, hardest))
    torch.testing.assert_close(got, want)


def test_what_dynamo_and_forward_mode_would_get_wrong_is_refused(compiled_backend):
    q, k = random_pair(6, 5, 3, dtype=torch.float32, requires_grad=False)

    def loss(q):
        return pairwise_rank(q, k, backend=compiled_backend)[0].sum()

    with pytest.raises(torch._dynamo.exc.Unsupported, match='only backend="eager" runs'):
        torch.compile(torch.func.grad(loss), fullgraph=True, backend="aot_eager")(q)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        loss(torch.autograd.forward_ad.make_dual(q, torch.ones_like(q)))
